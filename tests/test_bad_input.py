"""Whatever is wrong with a folder, a setting or a prompt: a typed error that says what to do, and never a crash or a hang."""

import json
import math
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aollm import (
    AollmError,
    CheckpointError,
    ConfigError,
    GenerationConfig,
    MemoryBudgetError,
    ModelError,
    RequestError,
    Runtime,
    RuntimeConfig,
)
from aollm.errors import SpecializationError

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

CONTEXT = 64


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return copied(folder, tmp_path)


def copied(folder: Path, target: Path) -> Path:
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


async def opened(model: Any, **fields: Any) -> None:
    """Open a model and ask it something: what is wrong must show, at the latest, in the first answer."""
    with anyio.fail_after(10):
        async with Runtime.open(model, **fields) as runtime:
            await runtime.generate([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], max_new_tokens=2)


# Folders


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("/no/such/folder", "does not exist"),
        ("no-such-alias", "demo"),
        ("", "folder|path"),
        ("~nobody-of-this-name/model", "folder"),
        ("a" * 5000, "folder"),
        ("nul\0byte", "folder"),
        ("\ud800", "folder"),
        (None, "model"),
        (7, "model"),
        (b"demo", "model"),
    ],
    ids=lambda value: repr(value)[:20],
)
async def test_a_reference_that_is_no_model(reference: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelError, ConfigError), match=words):
        await opened(reference)


async def test_a_file_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        await opened(folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"^[^:]* is no model's folder: it has no config.json; give the folder"),
    "no model_type": (lambda f: (f / "config.json").write_text("{}"), "^config.json names no model_type; [^;]*$"),
    "a GGUF file alone": (
        lambda f: ((f / "config.json").unlink(), (f / "model.safetensors").rename(f / "m.gguf")),
        "no config.json; m.gguf cannot be taken: GGUF is not read; take the model .* as safetensors",
    ),
    "a GGUF file and no weights": (lambda f: (f / "model.safetensors").rename(f / "m.gguf"), "m.gguf cannot be taken: GGUF is not read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    "config is a folder": (lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()), "config.json"),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: the file is empty; download"),
    "weights are a folder": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()), "model.safetensors"),
    "weights are cut": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]), "truncated|again"),
    "only a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "index outside": (lambda f: indexed(f, "../model.safetensors"), "index"),
    "index absolute": (lambda f: indexed(f, "/etc/passwd"), "index"),
    "index to a pickle": (lambda f: indexed(f, "pytorch_model.bin"), "index"),
    "link outside": (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").symlink_to("/etc/hostname")), "link"),
    "tokenizer is damaged": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "tokenizer config is damaged": (lambda f: (f / "tokenizer_config.json").write_text("[1]"), "tokenizer_config.json"),
    "generation config is damaged": (lambda f: (f / "generation_config.json").write_text("nope"), "generation_config.json"),
    "no embedding": (lambda f: altered(f, lambda t: t.pop("model.embed_tokens.weight")), "embed"),
    "no head": (lambda f: altered(f, lambda t: t.pop("lm_head.weight")), "lm_head"),
    "no last norm": (lambda f: altered(f, lambda t: t.pop("model.norm.weight")), "model.norm"),
    "a layer's tensor is missing": (lambda f: altered(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")), "up_proj"),
    "a tensor of another shape": (
        lambda f: altered(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()})),
        "norm",
    ),
    "a tensor of another rank": (lambda f: altered(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]})), "norm"),
    "integers": (lambda f: altered(f, lambda t: t.update({k: v.int() for k, v in t.items()})), "I32"),
    "integer norm": (lambda f: altered(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].int()})), "I32"),
}


def indexed(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / f"{folder.name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))


def altered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_folder_is_a_model_error(copy: Path, name: str) -> None:
    change, words = BROKEN[name]
    change(copy)
    with pytest.raises(ModelError, match=words):
        await opened(copy)


ONLY_GENERIC: dict[str, tuple[Callable[[Path], object], str]] = {
    "doubles": (lambda f: altered(f, lambda t: t.update({k: v.double() for k, v in t.items()})), "F64"),
    "mixed": (lambda f: altered(f, lambda t: t.update({k: v.half() for k, v in t.items() if "up_proj" in k})), "mixed"),
}


@pytest.mark.parametrize("name", ONLY_GENERIC)
async def test_weights_that_only_transformers_computes_with_go_there_and_the_plan_says_why(copy: Path, name: str) -> None:
    change, words = ONLY_GENERIC[name]
    change(copy)
    with pytest.raises(SpecializationError, match=words):
        await opened(copy, backend="optimized-native")
    async with Runtime.open(copy) as runtime:
        assert runtime.plan.backend == "transformers-generic" and runtime.plan.specialization_state == "fallback"
        assert re.search(words, runtime.plan.specialization_reason or "")


async def test_code_in_a_model_folder_is_never_run(copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (copy / name).write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    classes = {
        "AutoConfig": "configuration_evil.Evil",
        "AutoModelForCausalLM": "modeling_evil.Evil",
        "AutoTokenizer": "tokenization_evil.Evil",
    }
    (copy / "vocab.json").write_text("{}")
    (copy / "tokenizer_config.json").write_text(json.dumps({"auto_map": classes, "tokenizer_class": "Evil"}))
    tiny.edit(copy, lambda config: config.update(auto_map=classes))
    try:
        await opened(copy, max_context_tokens=CONTEXT)
    except AollmError:
        pass
    assert not marker.exists()
    (copy / "vocab.json").unlink()
    await opened(copy, max_context_tokens=CONTEXT)
    tiny.edit(copy, lambda config: config.update(model_type="evil"))
    with pytest.raises(ModelError, match="evil"):
        await opened(copy)
    assert not marker.exists()


# config.json

ABSURD: list[Any] = [0, -1, 10**12, 10**400, "x", "64", 1.5, [], {}, True, math.inf, math.nan]
COUNTS = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "intermediate_size"]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("key", [*COUNTS, "max_position_embeddings"])
async def test_an_absurd_size_is_refused(copy: Path, key: str, value: Any) -> None:
    tiny.edit(copy, lambda config: config.update({key: value}))
    with pytest.raises(ModelError):
        await opened(copy)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_size null": ({"hidden_size": None}, "hidden_size"),
    "vocab_size null": ({"vocab_size": None}, "vocab_size"),
    "a million layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers"),
    "more layers than there are": ({"num_hidden_layers": 4}, "layers.3"),
    "heads do not divide": ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads"),
    "more kv heads than heads": ({"num_key_value_heads": 8}, "num_key_value_heads"),
    "vocabulary of another size": ({"vocab_size": 300}, "vocab_size|embed_tokens"),
    "odd head": ({"head_dim": 15}, "head_dim|q_proj|rope"),
    "model_type null": ({"model_type": None}, "model_type"),
    "model_type unknown": ({"model_type": "gpt9"}, "gpt9.*llama"),
    "model_type list": ({"model_type": ["llama"]}, "model_type"),
    "model_type of another model": ({"model_type": "qwen3"}, "q_norm"),
    "activation unknown": ({"hidden_act": "wavy"}, "wavy"),
    "activation null": ({"hidden_act": None}, "hidden_act"),
    "activation list": ({"hidden_act": ["silu"]}, "hidden_act"),
    "eps 0": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "eps text": ({"rms_norm_eps": "x"}, "rms_norm_eps"),
    "eps nan": ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    "rope type unknown": ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
    "rope text": ({"rope_parameters": "linear"}, "rope"),
    "rope theta text": ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope"),
    "rope factor missing": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
    "rope wider than the head": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 2.0}},
        "rope|partial",
    ),
    "biases that are not there": ({"attention_bias": True}, "bias"),
    "biases by a text": ({"attention_bias": "yes"}, "bias"),
}


@pytest.mark.parametrize("name", CONFIGS)
async def test_a_config_that_does_not_fit_is_refused(copy: Path, name: str) -> None:
    change, words = CONFIGS[name]
    tiny.edit(copy, lambda config: config.update(change))
    with pytest.raises(ModelError, match=words):
        await opened(copy)


WINDOWS: dict[str, dict[str, Any]] = {
    "window text": {"sliding_window": "x"},
    "window 0": {"sliding_window": 0},
    "window -1": {"sliding_window": -1},
    "window list": {"sliding_window": [8]},
    "window half": {"sliding_window": 7.5},
    "window true": {"sliding_window": True},
    "max_window_layers text": {"max_window_layers": "x", "layer_types": None},
    "layer_types short": {"layer_types": ["full_attention"]},
    "layer_types number": {"layer_types": 3},
    "layer_types unknown": {"layer_types": ["wavy"] * 3},
    "layer_types of numbers": {"layer_types": [1, 2, 3]},
}


@pytest.mark.parametrize("name", WINDOWS)
async def test_a_malformed_window_is_refused_at_opening(windowed: Path, tmp_path: Path, name: str) -> None:
    tiny.edit(copied(windowed, tmp_path), lambda config: config.update(WINDOWS[name]))
    with pytest.raises(ModelError, match=r"config.json"):
        async with Runtime.open(tmp_path):
            pass


VALUES = st.none() | st.booleans() | st.integers(-10, 300) | st.floats() | st.text(max_size=4) | st.lists(st.integers(0, 3), max_size=3)
VALUES |= st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta"]), st.text(max_size=4) | st.floats(), max_size=3)
KEYS = [
    *COUNTS,
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "max_window_layers",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "model_type",
    "eos_token_id",
    "max_position_embeddings",
]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
async def test_no_config_at_all_gives_another_error(windowed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    tiny.edit(copied(windowed, tmp_path), lambda config: config.update(change))
    try:
        await opened(tmp_path, max_context_tokens=CONTEXT)
    except AollmError:
        pass


# Settings


@pytest.mark.parametrize(
    "memory", [0, -1, True, "", " ", "x", "3 parsecs", "-3GiB", "1.5.2GiB", "0GiB", "GiB", [], {}, b"3GiB", "nan", "inf", "9" * 400 + "GiB"]
)
async def test_a_memory_that_is_no_size(folder: Path, memory: Any) -> None:
    with pytest.raises(ConfigError, match=r"memory.*3GiB"):
        Runtime.open(folder, memory=memory)


@pytest.mark.parametrize(
    ("memory", "nbytes"),
    [
        ("3GiB", 3 << 30),
        ("800MB", 800_000_000),
        ("1.5 gib", 3 << 29),
        (" 12 ", 12),
        (12, 12),
        ("2kb", 2000),
        ("1 TiB", 1 << 40),
        ("0.5MiB", 1 << 19),
    ],
)
def test_a_memory_that_is_one(memory: Any, nbytes: int) -> None:
    assert RuntimeConfig.of("demo", {"memory": memory}).memory == nbytes


@pytest.mark.parametrize("memory", [1, "1MiB", "50MB"])
async def test_too_little_memory_names_the_floor_and_the_setting(folder: Path, memory: Any) -> None:
    with pytest.raises(MemoryBudgetError, match=r"memory=.*at least [\d.]+ (GiB|MiB).*raise memory"):
        await opened(folder, memory=memory)


async def test_the_floor_that_is_named_is_enough(folder: Path) -> None:
    """A budget of what the message says opens, give or take what the process itself has grown by meanwhile."""
    with pytest.raises(MemoryBudgetError) as raised:
        await opened(folder, memory="10MB", max_context_tokens=CONTEXT)
    found = re.search(r"at least ([\d.]+) (MiB|GiB)", str(raised.value))
    assert found is not None
    floor = float(found[1]) * {"MiB": 1 << 20, "GiB": 1 << 30}[found[2]]
    await opened(folder, memory=int(floor * 1.02) + (8 << 20), max_context_tokens=CONTEXT)


@pytest.mark.parametrize("memory", ["100000TiB", 10**30])
async def test_more_memory_than_there_is(folder: Path, memory: Any) -> None:
    try:
        await opened(folder, memory=memory)
    except (MemoryBudgetError, ConfigError):
        pass


@pytest.mark.parametrize("context", [1 << 30, 10**15])
async def test_a_context_that_cannot_be_held(folder: Path, context: int) -> None:
    with pytest.raises((MemoryBudgetError, ConfigError), match="max_context_tokens"):
        await opened(folder, max_context_tokens=context, kv_cache_strategy="resident")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"memry": 3}, "memry.*memory"),
        ({"prefetch": 3}, "prefetch_depth"),
        ({"zzz": 3}, "zzz"),
        ({"disk_backend": "floppy"}, "disk_backend.*threads"),
        ({"disk_backend": None}, "disk_backend"),
        ({"prefetch_depth": 0}, "prefetch_depth"),
        ({"prefetch_depth": "2"}, "prefetch_depth"),
        ({"prefetch_depth": 2.0}, "prefetch_depth"),
        ({"prefetch_depth": True}, "prefetch_depth"),
        ({"max_context_tokens": 0}, "max_context_tokens"),
        ({"max_context_tokens": -5}, "max_context_tokens"),
        ({"max_context_tokens": "x"}, "max_context_tokens"),
        ({"max_concurrent_requests": 0}, "max_concurrent_requests"),
        ({"max_concurrent_requests": 10**9}, "max_concurrent_requests"),
        ({"dense_projection_chunk_rows": 0}, "dense_projection_chunk_rows.*"),
        ({"dense_projection_chunk_rows": 16385}, "dense_projection_chunk_rows.*16384"),
        ({"offload_cpu_layers": -1}, "offload_cpu_layers"),
        ({"offload_cpu_layers": 1.0}, "offload_cpu_layers"),
        ({"offload_cpu_policy": "random"}, "offload_cpu_policy.*middle-band"),
        ({"prefetch_depth": 0, "memory": "x"}, "memory.*prefetch_depth|prefetch_depth.*memory"),
    ],
    ids=str,
)
async def test_a_bad_setting_is_named_with_what_is_accepted(folder: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Runtime.open(folder, **fields)


async def test_more_layers_than_there_are_may_be_kept(folder: Path) -> None:
    await opened(folder, offload_cpu_layers=1000)


# Requests


@pytest.fixture(scope="module")
async def runtime(folder: Path, anyio_backend: str) -> AsyncIterator[Runtime]:
    async with Runtime.open(folder, max_context_tokens=CONTEXT) as runtime:
        yield runtime


@pytest.fixture(scope="module")
async def demo(anyio_backend: str) -> AsyncIterator[Runtime]:
    async with Runtime.open("demo", max_context_tokens=CONTEXT) as runtime:
        yield runtime


PROMPTS: dict[str, Any] = {
    "empty list": [],
    "empty tuple": (),
    "too long": [1] * CONTEXT,
    "much too long": [1] * 100_000,
    "past the end": [256],
    "huge": [10**30],
    "negative": [-1],
    "bool": [True],
    "float": [1.0],
    "nan": [math.nan],
    "text in it": [1, "a"],
    "none in it": [None],
    "nested": [[1, 2]],
    "None": None,
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "memoryview": memoryview(b"abc"),
    "dict": {"role": "user", "content": "x"},
    "set": {1},
    "number": 7,
    "iterator": iter([1]),
    "object": object(),
    "type": str,
    "message without role": [{"content": "x"}],
    "message without content": [{"role": "user"}],
    "content number": [{"role": "user", "content": 7}],
    "image": [{"role": "user", "content": [{"type": "image"}]}],
    "role number": [{"role": 1, "content": "x"}],
    "messages and ids": [{"role": "user", "content": "x"}, 1],
}


@pytest.mark.parametrize("name", PROMPTS)
async def test_a_prompt_that_cannot_be_taken(demo: Runtime, name: str) -> None:
    prompt = [9999] if name == "past the end" else PROMPTS[name]
    with pytest.raises(RequestError, match=r"prompt|id|message|give|shorten"), anyio.fail_after(5):
        await demo.generate(prompt, max_new_tokens=2)
    assert len((await demo.generate([1, 2], max_new_tokens=2)).token_ids) <= 2


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
async def test_half_a_character_is_refused(demo: Runtime, text: str) -> None:
    with pytest.raises(RequestError, match="character"):
        await demo.generate(text)


async def test_an_empty_text_is_refused_or_begins_with_the_first_token(demo: Runtime) -> None:
    if not demo.text.encode(""):
        with pytest.raises(RequestError, match="empty"):
            await demo.generate("")
    else:
        assert (await demo.generate("", max_new_tokens=2)).usage.prompt_tokens == len(demo.text.encode(""))


async def test_a_prompt_that_just_fits_is_taken(runtime: Runtime) -> None:
    assert len((await runtime.generate([1] * (CONTEXT - 1))).token_ids) == 1
    with pytest.raises(RequestError, match=f"{CONTEXT} tokens.*context {CONTEXT}.*max_context_tokens"):
        await runtime.generate([1] * CONTEXT)


async def test_text_without_a_tokenizer_is_refused(runtime: Runtime) -> None:
    for prompt in ("hello", [{"role": "user", "content": "x"}]):
        with pytest.raises(AollmError, match="tokenizer"):
            await runtime.generate(prompt)
    with pytest.raises(AollmError, match="tokenizer"):
        await runtime.generate([1, 2], stop="x")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": 1.0},
        {"max_new_tokens": "5"},
        {"max_new_tokens": None},
        {"max_new_tokens": True},
        {"temperature": math.nan},
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": "hot"},
        {"temperature": None},
        {"temperature": True},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 1.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0},
        {"repetition_penalty": -1.0},
        {"seed": "x"},
        {"seed": 1.5},
        {"seed": 2**70},
        {"logprobs": -1},
        {"logprobs": 10**6},
        {"logprobs": True},
        {"n": 0},
        {"n": 17},
        {"n": 1.0},
        {"stop": 5},
        {"stop": [5]},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": b"a"},
        {"stop": ["x"] * 100},
        {"stop": "x" * 5000},
        {"stop": [None]},
        {"stop": {"a": 1}},
        {"max_tokens": 5},
        {"temprature": 1.0},
    ],
    ids=lambda fields: str(fields)[:40],
)
async def test_a_bad_generation_setting_is_named(demo: Runtime, fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(RequestError, match=name):
        demo.stream([1, 2], **fields)
    with pytest.raises(RequestError, match=name):
        await demo.generate([1, 2], **fields)


async def test_the_nearest_name_is_offered(demo: Runtime) -> None:
    for wrong, right in {"temprature": "temperature", "max_tokens": "max_new_tokens", "stops": "stop"}.items():
        with pytest.raises(RequestError, match=f"{wrong}.*{right}"):
            demo.stream([1], **{wrong: 1})


async def test_a_generation_that_is_none(demo: Runtime) -> None:
    for generation in (5, "x", [1], RuntimeConfig(model_reference="demo")):
        with pytest.raises(RequestError):
            await demo.generate([1, 2], generation)  # type: ignore[arg-type]


async def test_settings_may_come_as_an_object_and_be_changed(demo: Runtime) -> None:
    base = GenerationConfig(max_new_tokens=3, stop=("zzz",))
    assert len((await demo.generate([5, 6], base)).token_ids) == 3
    assert len((await demo.generate([5, 6], base, max_new_tokens=2)).token_ids) == 2


async def test_a_bad_request_hurts_no_other(demo: Runtime) -> None:
    wanted = (await demo.generate([5, 6, 7], max_new_tokens=20)).token_ids
    async with demo.stream([5, 6, 7], max_new_tokens=20) as stream:
        found = [(await anext(stream)).id]
        for name in ("empty list", "huge", "None", "too long", "nested"):
            with pytest.raises(RequestError):
                await demo.generate(PROMPTS[name])
        found += [token.id async for token in stream]
    assert tuple(found) == wanted


async def test_a_request_that_can_never_fit_is_refused_at_once(folder: Path) -> None:
    async with Runtime.open(folder, max_context_tokens=CONTEXT, max_concurrent_requests=1) as runtime:
        with pytest.raises(RequestError, match=r"max_new_tokens or n|shorten"), anyio.fail_after(5):
            await runtime.generate([1] * 30, n=16, max_new_tokens=30)
        assert (await runtime.generate([1], max_new_tokens=2)).token_ids


async def test_errors_are_of_their_kind(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"12")
    with pytest.raises(CheckpointError):
        await opened(copy)
