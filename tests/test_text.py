"""Text against the tokenizers library and transformers: encoding, decoding piece by piece, chat templates, and bad ones."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from aollm.errors import ModelError, RequestError
from aollm.text import Text
from aollm.text.decoder import Decoder

SPECIAL = ["<s>", "</s>", "<|user|>"]
CORPUS = ["the cat sat on the mat and the dog ran to the mat. ", "naïve café, 你好 world 🙂"] * 3
CHATML = (
    "{{ bos_token }}{% for message in messages %}\n    {%- if message.role == 'odd' %}{{ raise_exception('no odd roles') }}{% endif %}\n"
    "<|user|>{{ message['role'] + ': ' ~ message.content | trim }}\n{% endfor %}\n{% if add_generation_prompt %}assistant:{% endif %}"
)
PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part.text }}{{ loop.last }}|{% endfor %}{% endfor %}"
HELLO = [{"role": "user", "content": " Hello the cat "}, {"role": "assistant", "content": "mat 🙂"}]


def bytelevel() -> Tokenizer:
    """Byte-level BPE, as of Llama 3 and Qwen, with a beginning-of-text id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def fallback() -> Tokenizer:
    """Sentencepiece-like BPE with byte fallback and a space before all, as of Llama 2 and Mistral."""
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"thecasonmdrg.", "▁t", "▁th", "▁the", "at", "你"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("a", "t")]
    vocabulary = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram with a metaspace decoder, as of T5 and Gemma's relatives."""
    pieces = [*SPECIAL, "<unk>", "▁", *"abcdehmnostr🙂", "▁the", "at"]
    tokenizer = Tokenizer(models.Unigram([(piece, -float(id)) for id, piece in enumerate(pieces)], unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


KINDS = {"bytelevel": bytelevel, "fallback": fallback, "metaspace": metaspace}


def write(folder: Path, tokenizer: Tokenizer | None, **files: Any) -> Path:
    """A model folder; a file's name is its keyword with `.json`, or `template` for the one in Jinja."""
    folder.mkdir(exist_ok=True)
    if tokenizer:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        if name == "template":
            (folder / "chat_template.jinja").write_text(content)
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Text, Tokenizer]]:
    found = {}
    for kind, build in KINDS.items():
        tokenizer = build()
        found[kind] = (Text.load(write(tmp_path_factory.mktemp(kind), tokenizer)), tokenizer)
    return found


def pieces(decoder: Decoder, ids: Sequence[int]) -> list[str]:
    return [*(decoder.push(id) for id in ids), decoder.finish()]


# Decoding


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None)
@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" the cat\n🙂👩‍👩‍👧é\ufffd")), max_size=40))
def test_pieces_add_up_for_any_text(texts: dict[str, tuple[Text, Tokenizer]], kind: str, text: str) -> None:
    ours, tokenizer = texts[kind]
    ids = ours.encode(text)
    given_out = pieces(ours.decoder(), ids)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(given_out) == whole
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in given_out)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(picks=st.lists(st.one_of(st.integers(0, 400), st.integers(4, 60), st.sampled_from([0, 1, 4, 5, 9])), max_size=60))
def test_pieces_add_up_for_any_ids(texts: dict[str, tuple[Text, Tokenizer]], kind: str, picks: list[int]) -> None:
    ours, tokenizer = texts[kind]
    decoder, out = ours.decoder(), ""
    whole = tokenizer.decode(picks, skip_special_tokens=True)
    for id in picks:
        out += decoder.push(id)
        assert whole.startswith(out)
    assert out + decoder.finish() == whole


@pytest.mark.parametrize("kind", ["bytelevel", "fallback"])
@pytest.mark.parametrize("text", ["🙂" * 200, "é" * 300, "\ufffd" * 200, "the 🙂" * 100, " " * 300])
def test_long_runs_come_out_in_time(texts: dict[str, tuple[Text, Tokenizer]], kind: str, text: str) -> None:
    ours, _ = texts[kind]
    ids = ours.encode(text)
    decoder, out, lag = ours.decoder(), "", 0
    for position, id in enumerate(ids):
        out += decoder.push(id)
        assert len(decoder._context) + len(decoder._fresh) < 150
        lag = max(lag, position - len(ours.encode(out)))
    assert out + decoder.finish() == ours.decode(ids)
    assert lag < 80


@pytest.mark.parametrize("byte", [0x80, 0xF0, 0xFF])
@pytest.mark.parametrize("kind", ["bytelevel", "fallback"])
def test_bytes_that_are_no_text_come_out_too(texts: dict[str, tuple[Text, Tokenizer]], kind: str, byte: int) -> None:
    ours, tokenizer = texts[kind]
    name = f"<0x{byte:02X}>" if kind == "fallback" else bytes_to_piece(byte)
    ids = [tokenizer.token_to_id(name)] * 300
    decoder = ours.decoder()
    out = "".join(decoder.push(id) for id in ids)
    assert 225 <= len(out) <= 300
    assert out + decoder.finish() == tokenizer.decode(ids)


def bytes_to_piece(byte: int) -> str:
    """How byte-level BPE writes a byte that is no printable character of Latin-1."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + [other for other in range(256) if other not in printable].index(byte))


def test_a_character_waits_for_its_last_byte(texts: dict[str, tuple[Text, Tokenizer]]) -> None:
    ours, _ = texts["bytelevel"]
    ids = ours.encode("a𐍈b")[1:]
    assert pieces(ours.decoder(), ids) == ["a", "", "", "", "𐍈", "b", ""]


def test_special_and_skipped_ids_are_not_shown(texts: dict[str, tuple[Text, Tokenizer]]) -> None:
    ours, tokenizer = texts["bytelevel"]
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert "".join(pieces(ours.decoder(), [0, a, 2, b, 1, 10**6])) == "ab"
    assert "".join(pieces(ours.decoder(skip={b}), [a, b, a])) == "aa"
    assert ours.special == {0, 1, 2}


@pytest.mark.parametrize(
    ("tokens", "stop", "expected", "stopped"),
    [
        (["ab", "cd", "ef"], ["cd"], "ab", True),
        (["ab", "cd", "ef"], ["bcde"], "a", True),
        (["a", "b", "c", "d"], ["bcx"], "abcd", False),
        (["ab", "ab", "ac", "x"], ["abac"], "ab", True),
        (["aab"], ["ab"], "a", True),
        (["abc"], ["b", "abc"], "a", True),  # b is complete first, whatever the tokens
        (["a", "b", "c"], ["b", "abc"], "a", True),
        (["xabc"], ["bc", "abc"], "x", True),
        (["a", "b"], ["abc"], "ab", False),
        (["end"], ["end"], "", True),
    ],
)
def test_stop_strings(tokens: list[str], stop: list[str], expected: str, stopped: bool) -> None:
    decoder = Decoder(lambda ids: "".join(tokens[id] for id in ids), stop)
    given_out = [decoder.push(id) for id in range(len(tokens))]
    assert not any("".join(given_out).endswith(text) for text in stop)
    assert ("".join(given_out) + decoder.finish(), decoder.stopped) == (expected, stopped)
    assert decoder.finish() == "" and (not stopped or decoder.push(0) == "")


@settings(max_examples=150, deadline=None)
@given(text=st.text("ab🙂", max_size=25), stop=st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=3), data=st.data())
def test_stops_do_not_depend_on_token_borders(text: str, stop: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    tokens = [text[a:b] for a, b in pairwise(cuts)]
    ends = [(text.index(each) + len(each), text.index(each)) for each in stop if each in text]
    decoder = Decoder(lambda ids: "".join(tokens[id] for id in ids), stop)
    assert "".join(pieces(decoder, range(len(tokens)))) == (text[: min(ends)[1]] if ends else text)
    assert decoder.stopped == bool(ends)


@pytest.mark.parametrize("stop", ["text", [""], [1], ["x" * 2000], ["x"] * 100, None, 3], ids=lambda value: type(value).__name__)
def test_bad_stops(texts: dict[str, tuple[Text, Tokenizer]], stop: Any) -> None:
    with pytest.raises(RequestError, match="stop takes"):
        texts["bytelevel"][0].decoder(stop)


# Folders


@pytest.mark.parametrize("kind", ["bytelevel", "fallback"])
def test_encoding_equals_transformers(tmp_path: Path, kind: str) -> None:
    added = {"3": {"content": "<|end|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    folder = write(tmp_path, KINDS[kind](), tokenizer_config={**config, "added_tokens_decoder": added, "sep_token": "<sep>"})
    ours, theirs = Text.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("", "the cat", " the  cat 🙂\n", "a<|end|> b</s>c<sep>", "你好"):
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    assert (ours.vocabulary, ours.bos_id, ours.eos_id) == (len(theirs), theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special == set(theirs.all_special_ids) | {ours.encode("<|end|>")[-1], 2}


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    tokenizer = bytelevel()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    assert Text.load(write(tmp_path, tokenizer)).decode(Text.load(tmp_path).encode("the cat sat on the mat")) == "the cat sat on the mat"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 6]}, "config": {"eos_token_id": 7}}, {5, 6}),
        ({"generation_config": {}, "config": {"eos_token_id": 7}}, {7}),
        ({"config": {"text_config": {"eos_token_id": [8, 9]}}}, {8, 9}),
        ({"config": {"eos_token_id": [-1, None, True, "3"]}, "tokenizer_config": {"eos_token": "</s>"}}, {1}),
        ({}, set()),
    ],
)
def test_stop_ids(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    text = Text.load(write(tmp_path, bytelevel(), **files))
    assert text.stop_ids == expected
    assert repr(text) == f"<Text {text.vocabulary} ids, stop {sorted(expected)}>"


def test_a_folder_without_a_tokenizer_serves_ids(tmp_path: Path) -> None:
    text = Text.load(write(tmp_path, None, config={"eos_token_id": 2}, template=CHATML))
    for call in (lambda: text.encode("x"), lambda: text.chat(HELLO), lambda: text.decoder(["x"])):
        with pytest.raises(ModelError, match=r"has no tokenizer.* or prompt with a list of token ids"):
            call()
    assert pieces(text.decoder(), [1, 2, 3]) == ["", "", "", ""]
    assert (text.stop_ids, repr(text)) == ({2}, "<Text without a tokenizer>")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"x"', b"[" * 100_000])
def test_damaged_files_are_model_errors(tmp_path: Path, name: str, content: bytes) -> None:
    write(tmp_path, bytelevel())
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name):
        Text.load(tmp_path)


def test_damaged_added_tokens_and_other_kinds(tmp_path: Path) -> None:
    write(tmp_path, bytelevel(), tokenizer_config={"added_tokens_decoder": {"x": 3}})
    with pytest.raises(ModelError, match="cannot be loaded"):
        Text.load(tmp_path)
    (tmp_path / "tokenizer.json").rename(tmp_path / "tokenizer.model")
    with pytest.raises(ModelError, match=r"add the model's tokenizer\.json"):
        Text.load(tmp_path)


def test_a_tokenizer_of_another_kind_goes_through_transformers(tmp_path: Path) -> None:
    tokenizer = bytelevel()
    tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt
    write(tmp_path, None, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>"})
    text = Text.load(tmp_path)
    assert text.decode(text.encode("the cat 🙂")) == "the cat 🙂"
    assert text.stop_ids == {tokenizer.token_to_id("</s>")}


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", None, b"x", 3])
def test_text_that_is_none(texts: dict[str, tuple[Text, Tokenizer]], text: Any) -> None:
    with pytest.raises(RequestError):
        texts["bytelevel"][0].encode(text)


def test_the_main_path_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write(tmp_path, bytelevel(), tokenizer_config={"bos_token": "<s>"}, template=CHATML)
    program = (
        "import sys; from pathlib import Path; from aollm.text import Text; text = Text.load(Path(sys.argv[1]))\n"
        "text.chat([{'role': 'user', 'content': 'x'}]); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Chat


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        PARTS,
        "{%- set ns = namespace(found=false, self='x') -%}{% for m in messages %}"
        "{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{% endfor %}{{ ns.found }}{{ strftime_now('%Y') }}",
        "{% macro turn(m) %}[{{ m.content.split(' ')[-1] }}{{ caller() }}]{% endmacro %}"
        "{% for m in messages[::-1] %}{% call turn(m) %}é{% endcall %}{% endfor %}",
        "{% for m in messages if m.role != 'system' %}{% generation %}{% set x = 1 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}",
        "{{ messages | map(attribute='content') | join('<|user|>') }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
        "{{ [1, 2] + [3] }}{{ (1, 'a') }}{{ {'a': [1]} }}{{ '%s-%5d' % ('x', 7) }}{{ 'a' * 3 }}"
        "{{ '{:>4}|{}'.format(1, 1700000000) }}{{ 2 ** 10 }}",
        "{{ tools is none }}{{ documents is defined }}{{ eos_token }}{{ nothing }}"
        "{{ messages[0]['content'].replace('the', 'a' * 9) }}{{ dict(a=1) }}",
    ],
)
@pytest.mark.parametrize("where", ["jinja", "config", "named"])
def test_chats_equal_transformers(tmp_path: Path, template: str, where: str) -> None:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    files: dict[str, Any] = {}
    if where == "jinja":
        files["template"], config["chat_template"] = template, "not this one"
    else:
        named = [{"name": "tool_use", "template": "not this one"}, {"name": "default", "template": template}]
        config["chat_template"] = template if where == "config" else named
    folder = write(tmp_path, bytelevel(), tokenizer_config=config, **files)
    messages: list[dict[str, Any]] = [{**message, "name": None, "extra": [1, 2.5, True, {"a": "é"}]} for message in HELLO]
    if template == PARTS:
        messages[0]["content"] = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
        messages[1]["content"] = [{"type": "text", "text": "three"}]
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ours = Text.load(folder)
    assert ours.render(messages) == expected
    assert ours.chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_parts_are_joined_for_templates_that_know_none(tmp_path: Path) -> None:
    text = Text.load(write(tmp_path, bytelevel(), template=CHATML))
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    assert text.render([{"role": "user", "content": parts}]) == text.render([{"role": "user", "content": "Hello there"}])


def test_a_template_of_a_processor_is_the_last_resort(tmp_path: Path) -> None:
    folder = write(tmp_path, bytelevel(), chat_template={"chat_template": "{{ messages[0].content }}!"})
    assert Text.load(folder).render(HELLO) == " Hello the cat !"


@pytest.mark.parametrize("config", [{}, {"chat_template": 3}, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_no_template(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"chat template.* prompt with plain text"):
        Text.load(write(tmp_path, bytelevel(), tokenizer_config=config)).chat(HELLO)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        (None, "at least one"),
        ({"role": "user", "content": "x"}, "at least one"),
        (["hello"], r"messages\[0\] is a str"),
        ([HELLO[0], {"content": "x"}], r"messages\[1\]\.role"),
        ([{"role": 3, "content": "x"}], "role"),
        ([{"role": "", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": None}], "content"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "content"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] takes"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], r"content\[0\] takes"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image", "url": "x"}]}], r"\[1\].*'image'.* text only"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "text only"),
        ([{"role": "user", "content": "x", "tool": object()}], "JSON"),
        ([{"role": "user", "content": "x", "tool": {1: 2}}], "JSON"),
        ([{"role": "odd", "content": "x"}], "no odd roles"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
    ],
)
def test_bad_messages(tmp_path: Path, messages: Any, said: str) -> None:
    text = Text.load(write(tmp_path, bytelevel(), template=CHATML))
    with pytest.raises(RequestError, match=said):
        text.chat(messages)


def test_deep_messages(tmp_path: Path) -> None:
    nested: Any = "x"
    for _ in range(5000):
        nested = [nested]
    with pytest.raises(RequestError, match="deep"):
        Text.load(write(tmp_path, bytelevel(), template=CHATML)).chat([{"role": "user", "content": "x", "extra": nested}])


DOUBLED = "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = GROW %}{% endfor %}{{ ns.x | length }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}BODY{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
        "{% for x in y %}" * 40 + "{% endfor %}" * 40,
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__']['__mro__'] }}",
        "{{ '{0.__class__.__mro__}'.format('') }}{{ ''|attr('__class__')|attr('__mro__')|list }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ namespace(__class__=1) }}",
        "{% include 'x' %}",
        "{% set _ = messages.append(1) %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ [0] * 10**9 }}",
        "{{ 'a'.ljust(10**9) }}{{ 'x'|center(1000000000) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ messages|tojson(indent=1000000000) }}",
        "{{ 'a\n'|indent(1000000000, true) }}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ lipsum(n=1000000) }}",
        "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a|replace('a', a) }}",
        "{% set a = 'a' * 1000000 %}{{ a.join(a) }}",
        "{% set a = 'a' * 1000000 %}{{ ('{0}' * 10000).format(a) }}",
        "{{ range(10**9)|list }}",
        "{{ range(99999)|list|batch(2, range(99999)|list)|list|string * 10000 }}",
        "{% set a = 'a' * 1000000 %}{% set b %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
        "{% set b %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for x in [[1]] recursive %}{{ loop(x * 2) }}{{ loop([[1, 2]]) }}{% endfor %}",
        LOOPS.replace("BODY", ""),
        LOOPS.replace("BODY", "x"),
        LOOPS.replace("BODY", "{{ a * b }}"),
        "{% set x %}" + LOOPS + "{% endset %}",
        "{% for a in range(99999) %}{{ range(99999)|sum }}{% endfor %}",
        DOUBLED.replace("GROW", "ns.x ~ ns.x"),
        DOUBLED.replace("GROW", "ns.x + ns.x"),
        DOUBLED.replace("GROW", "[ns.x, ns.x]"),
        DOUBLED.replace("GROW", "{'a': ns.x, 'b': ns.x}"),
        DOUBLED.replace("GROW", "(ns.x, ns.x)"),
        DOUBLED.replace("GROW", "'%s%s' % (ns.x, ns.x)"),
        DOUBLED.replace("GROW", "'{}{}'.format(ns.x, ns.x)"),
        DOUBLED.replace("GROW", "namespace(a=ns.x, b=ns.x)"),
        "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}",
        "{{ messages|tojson * 1000000 }}",
        "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
    ids=lambda template: template[:40],
)
def test_bad_templates_end_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr("aollm.text.template.BUDGET_S", 0.2)  # a tenth, for the tests' sake
    text = Text.load(write(tmp_path, None, template=template, tokenizer_config={"bos_token": "<s>"}))
    text._encode = lambda text, special: []  # the tokenizer is not what is tried here
    began = time.thread_time()
    with pytest.raises(RequestError, match="chat template"):
        text.chat(HELLO)
    assert time.thread_time() - began < 2


def test_a_bad_conversation_leaves_the_template_usable(tmp_path: Path) -> None:
    text = Text.load(write(tmp_path, bytelevel(), template=CHATML))
    before = text.chat(HELLO)
    with pytest.raises(RequestError):
        text.chat([{"role": "odd", "content": "x"}])
    assert text.chat(HELLO) == before


def test_a_long_conversation_is_no_attack(tmp_path: Path) -> None:
    text = Text.load(write(tmp_path, bytelevel(), template=CHATML))
    rendered = text.render([{"role": "user", "content": "the cat " * 1000}] * 1000)
    assert len(rendered) > 7_900_000
    with pytest.raises(RequestError, match="longer than"):
        text.render([{"role": "user", "content": "the cat " * 1000}] * 3000)
