"""The text the bundled model learns: small stories, planted facts, questions, sums, lists.

Everything is drawn from one `random.Random`, so a seed is a text. Facts are planted once and
asked for later in the same words, near or far; no two facts of a document share a key. Sizes
are in characters (about 4.4 to a token). This file knows nothing of tokenizers or models.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from .story import ANIMALS, COLOURS, DAYS, MONTHS, NAMES, PLACES, STUFFS, THINGS, story, words

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
MAGIC = words(
    "river candle button thunder pepper marble feather window blanket pumpkin ladder basket mirror needle "
    "pocket whistle saddle velvet anchor lantern"
)
ALPHABET = words("A B C D E F G H I J K L M N O P Q R S T U V W X Y Z")


@dataclass(frozen=True, slots=True)
class Fact:
    """One planted sentence and its question; `says` without `answer` and the full stop is the cue."""

    says: str
    question: str
    answer: str

    @property
    def cue(self) -> str:
        return self.says[: -len(self.answer) - 2]


def number_fact(rng: Random, name: str) -> Fact:
    answer = str(rng.randrange(1000, 10000))
    return Fact(f"The secret number of {name} is {answer}.", f"What is the secret number of {name}?", answer)


def word_fact(rng: Random, name: str) -> Fact:
    answer = rng.choice(MAGIC)
    return Fact(f"The magic word of {name} is {answer}.", f"What is the magic word of {name}?", answer)


def colour_fact(rng: Random, name: str) -> Fact:
    answer = rng.choice(COLOURS)
    return Fact(f"The favourite colour of {name} is {answer}.", f"What is the favourite colour of {name}?", answer)


def place_fact(rng: Random, name: str) -> Fact:
    thing = f"{rng.choice(STUFFS)} {rng.choice(THINGS)}"
    answer = f"{rng.choice(COLOURS)} {rng.choice(PLACES)}"
    return Fact(f"{name} hid the {thing} in the {answer}.", f"Where did {name} hide the {thing}?", answer)


KINDS: tuple[Callable[[Random, str], Fact], ...] = (number_fact, place_fact, word_fact, colour_fact)


def facts(rng: Random, count: int) -> list[Fact]:
    """`count` facts, no two of the same kind about the same name."""
    keys = rng.sample([(name, kind) for name in NAMES for kind in (*KINDS, number_fact, place_fact)], 2 * count)
    return [kind(rng, name) for name, kind in list(dict.fromkeys(keys))[:count]]


def ask(rng: Random, fact: Fact) -> str:
    """The question and its answer, as a line pair or as one sentence that remembers."""
    if rng.random() < 0.3:
        return f"Remember: {fact.says}"
    return f"Question: {fact.question}\nAnswer: {fact.says}"


def sums(rng: Random, count: int) -> str:
    lines = []
    for _ in range(count):
        a, b = rng.randrange(50), rng.randrange(50)
        a, b, sign = (a, b, "+") if rng.random() < 0.7 else (max(a, b), min(a, b), "-")
        lines.append(f"{a} {sign} {b} = {a + b if sign == '+' else a - b}")
    return "\n".join(lines)


def listing(rng: Random) -> tuple[str, str]:
    """A request for a list, and the list."""
    kind, start = rng.randrange(6), rng.randrange(1, 80)
    if kind == 0:
        stop = start + rng.randrange(4, 12)
        return f"Count from {start} to {stop}.", ", ".join(map(str, range(start, stop + 1))) + "."
    if kind == 1:
        first = rng.randrange(20)
        return f"Say the alphabet from {ALPHABET[first]}.", " ".join(ALPHABET[first:]) + "."
    if kind in (2, 3):
        ring, what = (DAYS, "days") if kind == 2 else (MONTHS, "months")
        first = rng.randrange(len(ring))
        return f"Say the {what} from {ring[first]}.", ", ".join(ring[first:] + ring[:first]) + "."
    if kind == 4:
        numbers = rng.sample(range(10, 100), rng.randrange(3, 7))
        return f"Sort the numbers {', '.join(map(str, numbers))}.", ", ".join(map(str, sorted(numbers))) + "."
    names = rng.sample(NAMES, rng.randrange(3, 6))
    return f"Sort the names {', '.join(names)}.", ", ".join(sorted(names)) + "."


def filler(rng: Random) -> str:
    """A piece without facts: mostly a story, sometimes sums or a list."""
    pick = rng.random()
    if pick < 0.75:
        return story(rng)
    return sums(rng, rng.randrange(2, 6)) if pick < 0.88 else "\n".join(listing(rng))


def tale(rng: Random, size: int) -> str:
    """About `size` characters: facts planted mostly early, fillers, every fact asked for at least once, later."""
    known = facts(rng, max(2, min(30, size // rng.choice((100, 140, 200, 400)))))
    early, ask_last = rng.choice((0.0, 0.2, 0.5, 0.9)), rng.random() < 0.4
    timed: list[tuple[float, str]] = [(-1.0, story(rng))] if size > 900 and rng.random() < 0.6 else []
    for fact in known:
        planted = early * rng.random()
        timed.append((planted, fact.says))
        for _ in range(1 + (rng.random() < 0.4)):
            timed.append((1 + rng.random() if ask_last else rng.uniform(planted, 1), ask(rng, fact)))
    room = size - sum(len(text) + 2 for _, text in timed)
    while room > 200:
        text = filler(rng)
        timed.append((rng.random(), text))
        room -= len(text) + 2
    return "\n\n".join(text for _, text in sorted(timed))


def echo(rng: Random, size: int) -> str:
    """A line of words, said again once or twice."""
    line = " ".join(rng.sample(NAMES + ANIMALS + COLOURS + THINGS + PLACES + MAGIC, max(4, min(60, size // 16))))
    return "\n".join([f"Say it again: {line}.", *[f"{line}."] * rng.randrange(1, 3)])


def turn(asked: str, answered: str) -> str:
    return f"{USER}{asked}{END}{ASSISTANT}{answered}{END}"


def chat(rng: Random, size: int) -> str:
    """Turns of a user and an assistant; facts are told first, by the user or in the system line, and asked for later."""
    known = facts(rng, max(2, min(16, size // rng.choice((200, 300, 500)))))
    told = rng.randrange(len(known) + 1)
    system = " ".join(["You are a kind helper.", *(f.says for f in known[:told])]) + "\n" if told else ""
    timed: list[tuple[float, str]] = []
    for i, fact in enumerate(known):
        planted = 0.4 * rng.random()
        if i >= told:
            timed.append((planted, turn(fact.says, rng.choice(("I will remember that.", "Good to know.")))))
        timed.append((rng.uniform(planted, 1), turn(fact.question, fact.says)))
    room = size - len(system) - sum(len(text) for _, text in timed)
    while room > 60:
        text = small_talk(rng)
        timed.append((rng.random(), text))
        room -= len(text)
    return system + "".join(text for _, text in sorted(timed))


def small_talk(rng: Random) -> str:
    """One turn that needs no memory: a story, a sum, a list, a greeting."""
    kind = rng.randrange(7)
    if kind == 0:
        animal = rng.choice(ANIMALS)
        return turn(f"Tell me a story about a {animal}.", story(rng, animal=animal))
    if kind == 1:
        name = rng.choice(NAMES)
        return turn(f"Tell me a story about {name}.", story(rng, name=name))
    if kind in (2, 3):
        said = sums(rng, 1)
        return turn(f"What is {said.split(' =')[0]}?", f"{said}.")
    if kind == 4:
        i = rng.randrange(7)
        return turn(f"Which day comes after {DAYS[i]}?", f"After {DAYS[i]} comes {DAYS[(i + 1) % 7]}.")
    if kind == 5:
        return turn(*listing(rng))
    name = rng.choice(NAMES)
    return turn(
        f"{rng.choice(('Hello', 'Hi', 'Good morning'))}, my name is {name}.",
        f"Hello, {name}! {rng.choice(('How can I help you?', 'Nice to meet you.', 'It is a good day.'))}",
    )


def document(rng: Random, size: int) -> str:
    """One document of very roughly `size` characters, between `<|begin|>` and `<|end|>`."""
    pick = rng.random()
    if size < 900 and pick < 0.2:
        return f"{BEGIN}{story(rng) if pick < 0.12 else echo(rng, size)}{END}"
    if pick < 0.3:
        return f"{BEGIN}{chat(rng, size)}"
    return f"{BEGIN}{tale(rng, size)}{END}"


def documents(seed: int, smallest: int, largest: int) -> Iterator[str]:
    """Documents for ever, sizes log-uniform between two numbers of characters."""
    rng = Random(seed)
    while True:
        yield document(rng, int(smallest * (largest / smallest) ** rng.random()))


def probe(rng: Random, size: int) -> tuple[str, str, str]:
    """A recall test: a text that ends with a planted fact, then fillers and the cue, then the answer to expect."""
    first, *others = facts(rng, 8)
    before = "\n\n".join([story(rng), first.says])
    pieces, length = [f.says for f in others], 0
    while length < size:
        pieces.append(filler(rng))
        length = sum(map(len, pieces))
    rng.shuffle(pieces)
    between = f"\n\nQuestion: {first.question}\nAnswer: {first.cue}"
    return f"{BEGIN}{before}", "\n\n" + "\n\n".join(pieces) + between, f" {first.answer}"
