"""Small stories in simple English, from templates and one `random.Random`.

`[a|b]` in a template is a choice, `{hero}` a word drawn once for the whole story. The word lists are
public: facts and chats draw from them too.
"""

import re
from random import Random


def words(line: str) -> list[str]:
    return line.split()


GIRLS = words(
    "Mira Anna Lily Rosa Nina Ella Clara Ruth Maya Zoe Ivy Nora Lena Tess Emma Alma Vera Dora Iris June "
    "Hanna Molly Sofia Wilma Olga Paula Greta Julia"
)
BOYS = words(
    "Tom Ben Max Leo Sam Finn Oscar Hugo Jack Noah Otto Paul Felix Theo Liam Adam Carl Emil Ivan Luke "
    "Peter Simon Victor Walter Robin David Martin Erik"
)
NAMES = GIRLS + BOYS
ANIMALS = words("fox rabbit bear mouse crow cat dog duck frog hen goat lamb pony squirrel hedgehog turtle sparrow donkey badger goose")
MOODS = words("brave kind little clever quiet happy curious gentle young funny lazy shy wise proud")
COLOURS = words("red blue green yellow white black brown pink purple violet grey golden")
STUFFS = words("silver wooden golden glass paper copper tiny round shiny heavy")
THINGS = words("key ring ball book bell cup lamp map box coin drum kite spoon hat clock doll")
PLACES = words("barn house tower cave garden shed mill boat tent well castle hut school church cabin shop")
FOODS = words("pear plum carrot fig lemon nut pumpkin melon turnip bean")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
LANDS = words("forest valley village meadow town park garden desert field kingdom")

OPENINGS = (
    "Once upon a time there was a {mood} {animal} named {hero}.",
    "Once upon a time, in a [small|quiet|green|far away] {land}, there lived a {mood} {animal} named {hero}.",
    "Once upon a time there was a {mood} {child} named {hero} who lived near a {land}.",
    "Once upon a time, a {mood} {child} named {hero} and a {mood2} {animal} named {friend} were best friends.",
    "One [sunny|cold|warm|rainy] {day}, a {mood} {child} named {hero} went for a walk.",
)
MIDDLES = (
    "{hero} loved to play with a {colour} {thing}. Every morning {he} took the {thing} to the {land}. One day the {thing} "
    "was gone. {hero} looked under the bed and behind the door, but the {thing} was not there. {Friend} came to help. They "
    "looked [all day|for a long time|until the evening]. At last {friend} saw the {thing} in the grass. {hero} was so happy "
    "that {he} gave {friend} a big hug.",
    "One day {hero} wanted to bake a {food} pie. {He} had flour and milk, but {he} had no {food}. {hero} went to the market "
    'and met {friend} there. "I have one {food} left," said {friend}. "We can share it." They went home and made the pie '
    "together. It was [warm and sweet|the best pie in the {land}|very good].",
    "It was a [cold|dark|stormy] night and the wind was loud. {hero} heard a small sound at the door. {He} opened it and "
    'saw {friend}, who was wet and [tired|cold|afraid]. "Please come in," said {hero}. {He} made a fire and gave {friend} '
    "some {food} and warm milk. Soon {friend} was dry and they told stories until they fell asleep.",
    "{hero} had a dream. {He} wanted to [climb the highest hill|swim across the lake|see the sea|fly like a bird]. {Friend} "
    'said, "That is too hard for you." But {hero} did not give up. {He} tried again and again, every day after breakfast. '
    'After [seven days|three weeks|a long time] {he} could do it. "You were right," said {friend}, "and I was wrong."',
    "In the {land} there stood an old {place}. Nobody went inside because it was dark. One {day} {hero} took a lamp and "
    "opened the door. There was no monster in the {place}. There was only {friend}, who was looking for a {colour} {thing}. "
    "They laughed, and together they found the {thing} under a chair.",
    '{hero} and {friend} were playing near the {land}. They saw a {colour} {thing} on the road. "It is mine," said {hero}. '
    '"No, it is mine," said {friend}. They were both angry. Then an old {animal2} came by and said, "Why do you not take '
    'turns?" So {hero} played with the {thing} on {day} and {friend} played with it on {day2}.',
    "{hero} was [sad|lonely|bored] because {he} had nobody to play with. {He} walked to the {land} and sat down under a "
    'tree. A {animal2} sat there too. "Why are you sad?" asked the {animal2}. "I have no friends," said {hero}. "Then I '
    'will be your friend," said the {animal2}. From that day on they played together every day.',
    'On {day} {hero} found a tiny seed. {He} put it in the ground and gave it water. {Friend} asked, "What will it be?" "I '
    'do not know," said {hero}. "We have to wait." They waited for many days. In {month} a [big|small|tall] {colour} flower '
    "came out of the ground, and everybody in the {land} came to see it.",
    "{hero} wanted to give {friend} a present. {He} had no money, so {he} made a {stuff} {thing} with {his} own hands. It "
    "took {him} the whole week. When {friend} opened the box, {hero} was [afraid|shy|quiet]. But {friend} smiled and said, "
    '"This is the best {thing} I have ever seen. Thank you, {hero}!"',
    "One morning {hero} got lost in the {land}. All the trees looked the same. {He} called, but nobody answered. Then {he} "
    'remembered what {his} [mother|father|grandmother] had said: "If you are lost, stay where you are." So {hero} sat down '
    "and ate a {food}. After an hour {friend} came with a lamp and took {him} home.",
    "There was a race in the {land} on {day}. {hero} ran fast, and {friend} ran fast too. Near the {place}, {friend} fell "
    "and hurt {his2} leg. {hero} could win the race now, but {he} stopped and helped {friend} to stand up. They walked over "
    "the line together, and everybody [clapped|cheered|was happy].",
    "{hero} told a lie. {He} said that {friend} had broken the {colour} {thing}. {Friend} was sad and did not say a word. "
    'That night {hero} could not sleep. In the morning {he} went to {friend} and said, "I am sorry. I broke the {thing}, '
    'not you." {Friend} said, "Thank you for telling the truth."',
    "{hero} had a small boat with a {colour} sail. One {day} the wind took the boat far out on the water. {hero} was afraid "
    "and called for help. {Friend} heard {him} and threw a long rope. {hero} held the rope with both hands, and {friend} "
    'pulled {him} back to the shore. "Next time we sail together," said {friend}.',
    "It was the birthday of {hero}, but nobody said a word about it. {hero} went to school, came home and sat in the "
    'kitchen. Then the door opened and {friend} came in with a big {food} cake. "Happy birthday!" they all shouted. {hero} '
    "[laughed and cried at the same time|blew out the candles|had never seen such a big cake].",
    "A {animal2} was stuck in a hole near the {place}. {hero} heard it cry. {He} put a long board into the hole, and the "
    '{animal2} climbed out. "I will never forget this," it said. A week later {hero} lost {his} {colour} {thing} in the '
    "dark {land}, and it was the {animal2} that brought it back.",
    "In winter the snow was so high that {hero} could not open the door. {He} waved at {friend} through the window. "
    "{Friend} took a shovel and worked until noon. Then they built a [snowman|wall of snow|white castle] with a {food} for "
    "a nose, and drank hot milk in the {place}.",
    'The teacher asked a hard question, and nobody knew the answer. {hero} raised {his} hand. "I do not know it yet," {he} '
    'said, "but I can find out." {He} read a thick book about [stars|fish|old kings|the moon] all evening. On {day2} {he} '
    "told the answer to the class, and {friend} wrote it on the board.",
    '{hero} sold {food}s at the market, but nobody wanted to buy them. "They are too small," the people said. {Friend} ate '
    'one and smiled. "They are small, but they are sweeter than all the others," {friend} said in a loud voice. Soon there '
    "was a long line, and before noon the basket was empty.",
    "Every night a {colour} light moved over the {land}. People said it was a ghost. {hero} was not so sure. {He} waited "
    "behind a stone until the light came near. It was {friend} with a lamp, who was counting the [frogs|owls|stars|sheep]. "
    '"May I count with you?" asked {hero}.',
    "The clock of the {place} had stopped, and so everybody came too late. {hero} climbed up the stairs with a bag of "
    "tools. Inside the clock {he} found a nest with three young birds. {hero} waited until they could fly. In {month} {he} "
    "cleaned the wheels, and the clock was right again.",
)
ENDINGS = (
    "And they lived happily ever after.",
    "{hero} and {friend} were friends for ever.",
    "{hero} learned that it is good to [share|be kind|help others|tell the truth|try again].",
    "That evening {hero} went to bed and slept well.",
    "Then they all went home and ate {food} soup.",
    "It was the best day of the year.",
    "{friend} never forgot that {day}.",
    "After that, the whole {land} talked about {hero} and {friend}.",
)
SLOTS = dict(
    mood=MOODS, mood2=MOODS, animal=ANIMALS, animal2=ANIMALS, land=LANDS, day=DAYS, day2=DAYS, month=MONTHS,
    colour=COLOURS, stuff=STUFFS, thing=THINGS, place=PLACES, food=FOODS,
)  # fmt: skip


def fill(rng: Random, template: str, drawn: dict[str, str]) -> str:
    """`[a|b]` becomes one of the two, then `{name}` the word of that name."""
    chosen = re.sub(r"\[([^]]*)\]", lambda m: rng.choice(m[1].split("|")), template)
    return chosen.format_map(drawn)


def story(rng: Random, name: str = "", animal: str = "") -> str:
    """One story of 300 to 700 characters, optionally about a given name or animal."""
    hero, friend = rng.sample(NAMES, 2)
    hero = name or hero
    friend = friend if friend != hero else "Mother"
    he, him, his = ("she", "her", "her") if hero in GIRLS else ("he", "him", "his")
    drawn = {key: rng.choice(options) for key, options in SLOTS.items()}
    drawn |= dict(hero=hero, friend=friend, Friend=friend, he=he, He=he.title(), him=him, his=his)
    drawn |= dict(his2="his" if friend in BOYS else "her", child="girl" if hero in GIRLS else "boy")
    drawn["animal"] = animal or drawn["animal"]
    opening = OPENINGS[rng.randrange(2)] if animal else rng.choice(OPENINGS)
    return " ".join(fill(rng, t, drawn) for t in (opening, rng.choice(MIDDLES), rng.choice(ENDINGS)))
