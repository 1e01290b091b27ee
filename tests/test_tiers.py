"""Which tier answers and why, what is promised of each, and what is left when a tier cannot be opened."""

import gc
import json
import os
import re
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    PhiConfig,
    T5Config,
)

from aollm import ConfigError, ModelError, RequestError, Runtime, RuntimeConfig
from aollm.checkpoint import open_checkpoint
from aollm.cli import main
from aollm.disk.base import Disk, Extent, Priority, Span
from aollm.disk.threads import ThreadsDisk
from aollm.errors import SpecializationError
from aollm.export.writer import write_export
from aollm.families import FAMILIES, TOWERS
from aollm.families.base import Angles, Params, Route, Step, Work
from aollm.families.llama import Llama
from aollm.families.siglip import Siglip
from aollm.outlook import choose
from aollm.passes import Assembled, validated
from aollm.port import Port
from aollm.survey import survey

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(100)]

COUNT = 6
IDS = 260
END = 256
CONTEXT = 128
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
NATIVE, GENERIC = "optimized-native", "transformers-generic"
WHOLE: dict[str, Any] = {"max_context_tokens": CONTEXT}
TEMPLATE = "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"


def tokenizer() -> Tokenizer:
    """Bytes, and an end that is put behind all text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = Tokenizer(models.BPE(vocab={piece: id for id, piece in enumerate(alphabet)}, merges=[]))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return found


def talking(folder: Path) -> Path:
    """With all that text and conversations need."""
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def t5(folder: Path, **options: Any) -> Path:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **options}
    config = T5Config(
        vocab_size=IDS, decoder_start_token_id=0, initializer_factor=2.0, bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes
    )
    return shaken(folder, AutoModelForSeq2SeqLM.from_config(config), 1.0)


def gpt2(folder: Path) -> Path:
    config = GPT2Config(
        vocab_size=IDS, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None, pad_token_id=None
    )
    return shaken(folder, AutoModelForCausalLM.from_config(config))


def phi(folder: Path) -> Path:
    sizes = {name: value for name, value in tiny.SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    return shaken(folder, AutoModelForCausalLM.from_config(PhiConfig(**{**sizes, "vocab_size": IDS})))


def gemma(folder: Path) -> Path:
    """One that sees."""
    config = Gemma3Config(
        text_config={**tiny.SIZES, "vocab_size": IDS, "sliding_window": 16},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
            "patch_size": 14, "vision_use_head": False,
        },
        mm_tokens_per_image=4, image_token_index=257, boi_token_index=258, eoi_token_index=259, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def shaken(folder: Path, model: Any, embedding: float = 0.3) -> Path:
    """The model with weights large enough that its tokens depend on each other."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, embedding if any(word in name for word in ("embed", "wte", "wpe", "shared")) else 0.4)
    model.save_pretrained(folder)
    return talking(folder)


MODELS: dict[str, Callable[[Path], Path]] = {
    "llama": tiny.save, "mixtral": lambda folder: tiny.save(folder, "mixtral"), "t5": t5, "gpt2": gpt2, "phi": phi, "gemma": gemma,
}  # fmt: skip
CLASSES: dict[str, Any] = {"t5": AutoModelForSeq2SeqLM}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in MODELS.items()}


@pytest.fixture
def copy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A llama that a test may spoil."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "copy"))


@torch.inference_mode()
def theirs(folder: Path, prompt: Sequence[int], count: int = COUNT, kind: Any = AutoModelForCausalLM) -> tiny.Answer:
    """Greedy ids and log-probabilities of transformers' own `generate`."""
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    out = model.generate(
        torch.tensor([list(prompt)]), max_new_tokens=count, num_beams=1, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.cat(out.logits).float()
    return tiny.Answer(out.sequences[0, -count:].tolist(), logits.log_softmax(-1), float(logits.abs().max()))


def close(ours: tiny.Answer, wanted: tiny.Answer, tolerance: float = 1e-4) -> None:
    assert ours.ids == wanted.ids
    assert float((ours.logprobs - wanted.logprobs).abs().max()) <= tolerance * wanted.most


async def ids_of(runtime: Runtime, prompt: Any, count: int = COUNT, **fields: Any) -> list[int]:
    return [token.id async for token in runtime.stream(prompt, max_new_tokens=count, **fields)]


def left(*folders: Path) -> tuple[int, set[str], list[str]]:
    """Descriptors, threads and files that there are."""
    gc.collect()
    threads = {thread.name for thread in threading.enumerate() if "aollm" in thread.name}
    return len(os.listdir("/proc/self/fd")), threads, sorted(str(path) for folder in folders for path in folder.rglob("*"))


# ---- which tier


def eight_bits(folder: Path) -> None:
    """As FP8 models are published: projections of eight-bit floats, with a scale for each block."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "proj.weight" in name]:
        scale = tensors[name].abs().amax() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny.edit(folder, lambda config: config.update(quantization_config={
        "quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"],
    }))  # fmt: skip


def turned(folder: Path) -> None:
    """A rotation that only transformers has."""
    rope = {"rope_type": "proportional", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    tiny.edit(folder, lambda config: config.update(rope_parameters=rope))


ONLY_GENERIC: dict[str, tuple[Callable[[Path], object], str]] = {
    "activation": (lambda f: tiny.edit(f, lambda config: config.update(hidden_act="mish")), "hidden_act 'mish' is not known"),
    "rope": (turned, "rope type 'proportional' is not known"),
    "eight-bit floats": (eight_bits, "weights quantized by 'fp8' are not read here"),
}


@ONE_LOOP
@pytest.mark.parametrize("name", ONLY_GENERIC)
async def test_what_the_native_tier_does_not_compute_goes_to_transformers(
    folders: dict[str, Path], copy: Path, tmp_path: Path, name: str
) -> None:  # fmt: skip
    change, words = ONLY_GENERIC[name]
    prompt = tiny.prompt(40)
    async with Runtime.open(copy, **WHOLE) as runtime:
        unchanged = await tiny.ours(runtime, prompt)
    change(copy)
    async with Runtime.open(copy, **WHOLE) as runtime:
        plan = runtime.plan
        assert (plan.backend, plan.specialization_state, plan.passes) == (GENERIC, "fallback", ())
        assert plan.specialization_reason is not None and words in plan.specialization_reason
        found = await tiny.ours(runtime, prompt)
    close(found, await anyio.to_thread.run_sync(theirs, copy, prompt))
    assert float((found.logprobs - unchanged.logprobs).abs().max()) > 1e-2  # it is another model
    before = left(tmp_path)
    with pytest.raises(SpecializationError, match=words):
        async with Runtime.open(copy, backend=NATIVE, **WHOLE):
            pass
    assert left(tmp_path) == before


CHOICES: dict[str, tuple[str, dict[str, Any], tuple[str, str, str | None]]] = {
    "native match": ("llama", {}, (NATIVE, "applied", None)),
    "native, named": ("llama", {"backend": NATIVE}, (NATIVE, "applied", None)),
    "generic, named": ("llama", {"backend": GENERIC}, (GENERIC, "not-planned", "as asked for")),
    "generic, named, without a match": ("gpt2", {"backend": GENERIC}, (GENERIC, "not-planned", "as asked for")),
    "no specialization": ("llama", {"use_specialization": False}, (GENERIC, "not-planned", "as asked for")),
    "both": ("llama", {"use_specialization": False, "backend": GENERIC}, (GENERIC, "not-planned", "as asked for")),
    "no match": ("gpt2", {}, (GENERIC, "not-planned", "config.json: model_type 'gpt2' is not known; known are llama, ")),
    "no match either": ("phi", {}, (GENERIC, "not-planned", "config.json: model_type 'phi' is not known; known are llama, ")),
}


@ONE_LOOP
@pytest.mark.parametrize("name", CHOICES)
async def test_the_tier_that_was_asked_for_else_the_native_one_else_transformers(folders: dict[str, Path], name: str) -> None:
    kind, fields, (backend, state, reason) = CHOICES[name]
    prompt = tiny.prompt(30)
    async with Runtime.open(folders[kind], **WHOLE, **fields) as runtime:
        plan = runtime.plan
        assert (plan.backend, plan.specialization_state) == (backend, state)
        assert plan.specialization_reason == reason or str(plan.specialization_reason).startswith(reason or "-")
        found = await tiny.ours(runtime, prompt)
        answer = await runtime.generate(prompt, max_new_tokens=1)
        assert answer.plan == plan and (answer.profile is None) == (backend == GENERIC)
        mode = "resident-kv" if backend == NATIVE else "transformers-dynamic"
        assert runtime.cache_state()["cache_mode"] == answer.cache_state["cache_mode"] == plan.cache_mode == mode
    close(found, await anyio.to_thread.run_sync(theirs, folders[kind], prompt))


async def test_a_tier_and_the_opposite_are_a_contradiction(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="use_specialization"):
        Runtime.open(folders["llama"], backend=NATIVE, use_specialization=False)


@ONE_LOOP
@pytest.mark.parametrize("kind", ["gpt2", "phi", "t5"])
async def test_a_model_without_a_match_is_refused_where_only_a_match_will_do(folders: dict[str, Path], kind: str) -> None:
    with pytest.raises(SpecializationError, match=f"model_type '{kind}' is not known; known are llama"):
        async with Runtime.open(folders[kind], backend=NATIVE):
            pass


@ONE_LOOP
@pytest.mark.parametrize("backend", ["auto", NATIVE, GENERIC])
@pytest.mark.parametrize("kind", ["evil", "vit", "bert", None, 5])
async def test_a_model_that_nobody_knows_is_refused_by_name(copy: Path, tmp_path: Path, kind: Any, backend: str) -> None:
    tiny.edit(copy, lambda config: config.update(model_type=kind, architectures=[]))
    if kind == "bert" and backend != NATIVE:
        pytest.skip("transformers has a decoder of it")
    before = left(tmp_path)
    with pytest.raises(ModelError, match="names no model_type" if kind is None else repr(kind)) as told:
        async with Runtime.open(copy, backend=backend):
            pass
    assert kind is None or backend == NATIVE or "transformers has no model of type" in str(told.value)
    assert left(tmp_path) == before


BROKEN: dict[str, Any] = {
    "rms_norm_eps": 0.0, "num_key_value_heads": 3, "hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": -1,
    "vocab_size": 255,
}  # fmt: skip


@ONE_LOOP
@pytest.mark.parametrize("key", BROKEN)
async def test_a_broken_config_is_not_handed_to_transformers(copy: Path, key: str) -> None:
    tiny.edit(copy, lambda config: config.update({key: BROKEN[key]}))
    with pytest.raises(ModelError) as told:
        async with Runtime.open(copy):
            pass
    assert not isinstance(told.value, SpecializationError)
    assert "transformers" not in str(told.value)


async def test_what_transformers_would_take_is_still_broken(copy: Path) -> None:
    tiny.edit(copy, lambda config: config.update(rms_norm_eps=0.0))
    async with Runtime.open(copy, backend=GENERIC, **WHOLE) as runtime:
        assert len(await ids_of(runtime, [1, 2, 3])) == COUNT
    with pytest.raises(ModelError, match=r"rms_norm_eps must be a positive number, found 0\.0"):
        async with Runtime.open(copy, **WHOLE):
            pass


# ---- what only the native tier can do

NATIVE_ONLY: dict[str, Any] = {
    "adapter_dir": {"a": Path("/nowhere")}, "kv_cache_strategy": "paged", "offload_cpu_layers": 1, "dense_projection_chunk_rows": 64,
    "expert_memory": "1GiB",
}  # fmt: skip


@ONE_LOOP
@pytest.mark.parametrize("named", [True, False], ids=["named", "fallen back"])
@pytest.mark.parametrize("setting", NATIVE_ONLY)
async def test_what_only_the_native_tier_can_do_is_refused_by_its_name(
    folders: dict[str, Path], tmp_path: Path, setting: str, named: bool
) -> None:  # fmt: skip
    fields = {setting: NATIVE_ONLY[setting], "cache_dir": tmp_path, **({"backend": GENERIC} if named else {})}
    folder, why = (folders["llama"], "as asked for") if named else (folders["gpt2"], "model_type 'gpt2' is not known")
    before = left(tmp_path)
    with pytest.raises(ConfigError, match=f"^{setting}: only the native tier .* through transformers .*{why}"):
        async with Runtime.open(folder, **fields):
            pass
    assert left(tmp_path) == before


async def test_adapters_of_a_request_are_refused_where_there_are_none(folders: dict[str, Path]) -> None:
    async with Runtime.open(folders["gpt2"], **WHOLE) as runtime:
        with pytest.raises(RequestError, match="adapter: this model runs through transformers"):
            await runtime.generate([1], adapter="a")


# ---- an encoder and a decoder through the runtime


@pytest.fixture
async def t5s(folders: dict[str, Path], anyio_backend: str) -> Any:
    async with Runtime.open(folders["t5"], **WHOLE) as runtime:
        yield runtime


def t5_ids(folders: dict[str, Path], prompt: Sequence[int], count: int = COUNT) -> list[int]:
    return theirs(folders["t5"], prompt, count, AutoModelForSeq2SeqLM).ids


async def test_t5_says_what_transformers_says_of_ids_and_of_text(folders: dict[str, Path], t5s: Runtime) -> None:
    prompt = tiny.prompt(50)
    close(await tiny.ours(t5s, prompt), await anyio.to_thread.run_sync(theirs, folders["t5"], prompt, COUNT, AutoModelForSeq2SeqLM))
    said = "Once upon a time"
    answer = await t5s.generate(said, max_new_tokens=COUNT)
    ids = tokenizer().encode(said).ids
    assert ids[-1] == END and answer.usage.prompt_tokens == len(ids)
    assert list(answer.token_ids) == t5_ids(folders, ids)
    assert answer.text == t5s.text.decode(answer.token_ids)
    assert answer.profile is None and answer.cache_state == {
        "kv_cache_strategy": "resident", "cache_mode": "transformers-dynamic", "prefix_hit_tokens": 0, "prefix_miss_reason": None,
    }  # fmt: skip
    assert t5s.profile(0.0) is None and t5s.cache is None and t5s.drive_bytes_per_second is None


async def test_t5_answers_several_at_once_each_as_alone(t5s: Runtime) -> None:
    prompts = [tiny.prompt(5 + 7 * seed, seed) for seed in range(6)]
    alone = [await ids_of(t5s, prompt) for prompt in prompts]
    found: dict[int, list[int]] = {}

    async def ride(number: int) -> None:
        found[number] = await ids_of(t5s, prompts[number])

    async with anyio.create_task_group() as group:
        for number in range(len(prompts)):
            group.start_soon(ride, number)
    assert [found[number] for number in range(len(prompts))] == alone
    assert len({tuple(answer) for answer in alone}) > 1


async def test_t5_drawn_with_a_seed_is_the_same_again_and_each_choice_another(t5s: Runtime) -> None:
    drawn: dict[str, Any] = {"temperature": 1.5, "seed": 4, "max_new_tokens": 12, "n": 2}
    first, second = [(await t5s.generate(tiny.prompt(20), **drawn)).choices for _ in range(2)]
    assert first == second and first[0].token_ids != first[1].token_ids
    greedy = await t5s.generate(tiny.prompt(20), n=2, max_new_tokens=COUNT)
    assert greedy.choices[0].token_ids == greedy.choices[1].token_ids == tuple(await ids_of(t5s, tiny.prompt(20)))
    assert greedy.usage.completion_tokens == 2 * COUNT


async def test_t5_goes_on_when_a_reader_leaves(t5s: Runtime) -> None:
    wanted = await ids_of(t5s, [5, 6, 7])
    async with t5s.stream(tiny.prompt(30), max_new_tokens=80) as stream:
        assert [token.index async for token in _first(stream, 3)] == [0, 1, 2]
    stream = t5s.stream(tiny.prompt(30), max_new_tokens=80)
    token = await anext(stream)
    stream.cancel()
    rest = [token async for token in stream]
    assert token.finish_reason is None and len(rest) < 79
    with anyio.move_on_after(0.05):
        async for _ in t5s.stream(tiny.prompt(30), max_new_tokens=80):
            await anyio.sleep(0.02)
    assert await ids_of(t5s, [5, 6, 7]) == wanted
    with anyio.fail_after(30):
        while t5s.engine.riders or t5s.engine.waiting:  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


async def _first(stream: Any, count: int) -> Any:
    async for token in stream:
        yield token
        if token.index == count - 1:
            return


async def test_t5_in_a_session_reads_its_conversation_anew(t5s: Runtime) -> None:
    async with t5s.session([{"role": "system", "content": "be brief"}]) as session:
        for message in ("hello", "and then?"):
            asked = [*session.messages, {"role": "user", "content": message}]
            wanted = await t5s.generate(asked, max_new_tokens=COUNT)
            assert [token.id async for token in session.stream(message, max_new_tokens=COUNT)] == list(wanted.token_ids)
            assert session.store is None and session.messages[-1] == {"role": "assistant", "content": wanted.text}
        async with session.branch() as branch:
            assert [token.id async for token in branch.stream("or so", max_new_tokens=2)]
    assert len(session.messages) == 5


async def test_t5_that_does_not_fit_is_read_for_each_token(tmp_path: Path) -> None:
    folder = t5(tmp_path / "large", d_model=256, d_ff=1024, num_layers=8)
    cache, prompt = tmp_path / "cache", tiny.prompt(20)
    async with Runtime.open(folder, max_concurrent_requests=1, cache_dir=cache, **WHOLE) as runtime:
        wanted, whole = await ids_of(runtime, prompt), runtime.plan
        assert whole.streamed_nbytes_per_pass == 0 and whole.weights_nbytes > 32 << 20
    del runtime
    needs = sum(nbytes for line, nbytes in whole.ledger.items() if line not in ("interpreter and libraries", "pinned weights"))
    before = left(cache)
    memory = psutil.Process().memory_info().rss + needs + whole.weights_nbytes // 2
    async with Runtime.open(folder, max_concurrent_requests=1, cache_dir=cache, memory=memory, **WHOLE) as runtime:
        plan = runtime.plan
        assert 0 < plan.streamed_nbytes_per_pass < plan.weights_nbytes and {"host", "disk"} == set(plan.placement)
        assert sum(plan.ledger.values()) <= plan.memory == memory
        assert plan.pinned_nbytes + plan.streamed_nbytes_per_pass == plan.weights_nbytes
        assert await ids_of(runtime, prompt) == wanted
    assert left(cache)[:2] == before[:2]
    assert not [path for path in cache.rglob("*") if path.is_file()]


# ---- passes, planned


async def exported(folder: Path) -> Path:
    """The model with its weights in an export alone."""
    async with Port() as port:
        disk = ThreadsDisk(port)
        try:
            await write_export(await open_checkpoint(folder, disk, "published"), folder / "gds_export", disk)
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()
    (folder / "model.safetensors").unlink()
    return folder


async def planned(folder: Path, **fields: Any) -> Any:
    """The choice that a runtime would make."""
    async with Port() as port:
        disk = ThreadsDisk(port)
        try:
            return await choose(RuntimeConfig.of(folder, fields), folder, disk, "for a test")
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


ALWAYS = {"mlp-chunking", "attention-replacement"}
PASSES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "all in memory": ("llama", {}, ALWAYS | {"cpu-offload"}),
    "nothing in memory": ("llama", {"offload_cpu_layers": 0}, ALWAYS),
    "one layer in memory": ("llama", {"offload_cpu_layers": 1}, ALWAYS | {"cpu-offload"}),
    "few rows": ("llama", {"dense_projection_chunk_rows": 7}, ALWAYS | {"cpu-offload"}),
    "keys on disk": ("llama", {"kv_cache_strategy": "paged"}, ALWAYS | {"cpu-offload", "disk-cache"}),
    "keys kept": (
        "llama", {"kv_cache_strategy": "log-structured-journal", "kv_cache_lifecycle": "persistent"},
        ALWAYS | {"cpu-offload", "disk-cache"},
    ),
    "experts": ("mixtral", {}, ALWAYS | {"cpu-offload", "moe-routing"}),
    "images": ("gemma", {}, ALWAYS | {"cpu-offload", "multimodal-shell"}),
    "images left out": ("gemma", {"multimodal": False}, ALWAYS | {"cpu-offload"}),
    "an export": ("exported", {}, ALWAYS | {"cpu-offload", "gds-export-weights"}),
    "another tier": ("llama", {"backend": GENERIC}, set()),
    "no match": ("gpt2", {}, set()),
}  # fmt: skip
SEEN = {
    "disk-cache": "a block was written under {cache}/kv_cache_", "cpu-offload": " pieces are in memory", "mlp-chunking": " rows ran as ",
    "moe-routing": "a row asks for 2 of 8 experts in each of 3 layers", "attention-replacement": "3 layers hand their attention over",
    "multimodal-shell": "image parts become up to 4 rows through ", "gds-export-weights": " reads of a pass are from {model}/gds_export",
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
async def test_passes_are_planned_and_then_seen(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    kind, fields, wanted = PASSES[name]
    folder = folders["llama" if kind == "exported" else kind]
    if kind == "exported":
        folder = await exported(Path(shutil.copytree(folder, tmp_path / "export")))
    fields = {**WHOLE, "cache_dir": tmp_path / "cache", **fields}
    before = (await planned(folder, **fields)).plan
    assert {one.id for one in before.passes} == wanted and len(before.passes) == len(wanted)
    assert all(one.observed is None and one.reason for one in before.passes)
    assert before.specialization_state == ("planned" if wanted else "not-planned")
    async with Runtime.open(folder, **fields) as runtime:
        plan = runtime.plan
        assert plan.specialization_state == ("applied" if wanted else "not-planned")
        assert [replace(one, observed=None) for one in plan.passes] == list(before.passes)
        for one in plan.passes:
            assert SEEN[one.id].format(cache=tmp_path / "cache", model=folder) in (one.observed or "")
        assert not [path for path in tmp_path.rglob("PROBE*")]
        found = json.loads(json.dumps(plan.as_dict()))
        assert found["passes"] == [{"id": one.id, "reason": one.reason, "observed": one.observed} for one in plan.passes]
        assert found["cache_mode"] == plan.cache_mode and found["placement"] == list(plan.placement)
        assert sum(found["ledger"].values()) <= found["memory"]
        assert runtime.planned is None or runtime.planned.passes == before.passes


async def test_a_chunk_of_rows_is_what_was_asked_for(folders: dict[str, Path]) -> None:
    async with Runtime.open(folders["llama"], dense_projection_chunk_rows=7, **WHOLE) as runtime:
        seen = {one.id: one.observed for one in runtime.plan.passes}
    assert seen["mlp-chunking"] == "8 rows ran as 7 + 1"


# ---- passes that do not hold


class Turncoat:
    """A drive, on which something happens when the last weight has been read that opening reads before it looks."""

    name = "turncoat"

    def __init__(self, disk: Disk, norm: Extent, happens: Callable[[], object]) -> None:
        self._disk, self._norm, self._happens = disk, norm, happens
        self.happened = False

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        span = await self._disk.read_into(extents, buffers, priority)
        if list(extents) == [self._norm] and not self.happened:
            self.happened = True
            await anyio.to_thread.run_sync(self._happens)
        return span

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        return await self._disk.write(extents, buffers)

    async def sync(self, file: str) -> None:
        await self._disk.sync(file)

    async def size(self, file: str) -> int:
        return await self._disk.size(file)

    async def forget(self, file: str) -> None:
        await self._disk.forget(file)

    async def aclose(self) -> None:
        await self._disk.aclose()


async def betrayed(folder: Path, happens: Callable[[], object], **fields: Any) -> Runtime:
    """Open the model while something happens; returns what there is then."""
    async with Port() as port:
        own = ThreadsDisk(port)
        try:
            norm = (await open_checkpoint(folder, own))["model.norm.weight"].extent
            disk = Turncoat(own, norm, happens)
            async with Runtime.open(folder, disk=disk, **WHOLE, **fields) as runtime:
                assert disk.happened
                assert len(await ids_of(runtime, [1, 2, 3])) == COUNT
                return runtime
        finally:
            with anyio.CancelScope(shield=True):
                await own.aclose()


def swapped(path: Path, away: Path) -> None:
    """Put a link in the place of a folder that is now elsewhere."""
    path.rename(away)
    path.symlink_to(away)


SPOILT: dict[str, tuple[str, Callable[[Path, Path], object], str]] = {
    "swapped for a link": ("runtime-scoped", swapped, r"the store is at .*kv_cache_paged/scratch-\w+, not under .*/kv_cache_paged"),
    "removed": ("runtime-scoped", lambda root, away: shutil.rmtree(root), "No such file"),
    "moved away": ("runtime-scoped", lambda root, away: root.rename(away), "No such file"),
    "a file instead": ("persistent", lambda root, away: (root.rename(away), root.write_bytes(b"")), "Not a directory"),
    "swapped for a link, to be kept": ("persistent", swapped, "the store is at .*, not under .*/kv_cache_paged"),
    "moved away, to be kept": ("persistent", lambda root, away: root.rename(away), "No such file"),
}


@pytest.mark.parametrize("name", SPOILT)
async def test_a_cache_that_is_not_where_it_was(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    lifecycle, happens, words = SPOILT[name]
    cache = tmp_path / "cache"
    before = left()
    for backend, error in ((NATIVE, SpecializationError), ("auto", ConfigError)):  # transformers keeps nothing on disk
        fields = {"kv_cache_strategy": "paged", "kv_cache_lifecycle": lifecycle, "cache_dir": cache / backend, "backend": backend}
        root, away = cache / backend / "kv_cache_paged", tmp_path / f"away-{backend}"
        with pytest.raises(error, match=f"pass disk-cache does not hold: .*{words}") as told:
            await betrayed(folders["llama"], partial(happens, root, away), **fields)
        assert backend == NATIVE or str(told.value).startswith("kv_cache_strategy: only the native tier can do that")
        assert left() == before
    assert not [path for path in tmp_path.rglob("PROBE*")]


async def test_a_cache_folder_that_was_a_link_from_the_beginning_is_fine(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    async with Runtime.open(folders["llama"], kv_cache_strategy="paged", cache_dir=tmp_path / "link", **WHOLE) as runtime:
        assert runtime.plan.specialization_state == "applied"


async def test_an_export_with_a_file_outside_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = await exported(Path(shutil.copytree(folders["llama"], tmp_path / "export")))
    layer = folder / "gds_export" / "layer-0000"
    before = left()
    with pytest.raises(SpecializationError, match=r"pass gds-export-weights does not hold: .*layer-0000/.* is read, which is not in"):
        await betrayed(folder, lambda: swapped(layer, tmp_path / "away"), backend=NATIVE)
    layer.unlink()
    (tmp_path / "away").rename(layer)
    with pytest.raises(ModelError, match=r"dense\.raw is a link that leaves the model folder"):
        await betrayed(folder, lambda: swapped(layer, tmp_path / "away"))
    assert left() == before


async def test_the_defect_of_an_assembled_runtime_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    async with Port() as port:
        disk = ThreadsDisk(port)
        config = RuntimeConfig.of(folders["llama"], WHOLE)
        async with Runtime.open(config) as runtime:
            found = await survey(config, folders["llama"], disk, "for a test")
            model, compute = runtime.engine._model, runtime.engine._compute
            whole = Assembled(config, runtime.plan, model, None, (), found.checkpoint, disk, compute)
            assert (await validated(whole)).passes == runtime.plan.passes
            rows = replace(whole, model=replace(model, chunk_rows=model.chunk_rows * 2))
            with pytest.raises(SpecializationError, match=r"pass mlp-chunking does not hold: .* rows ran as"):
                await validated(rows)
            model.weights.forget()
            with pytest.raises(SpecializationError, match="pass cpu-offload does not hold: layer 0 attention is not in memory"):
                await validated(whole)
        with anyio.CancelScope(shield=True):
            await disk.aclose()


class Inside(Llama):
    """Attention that is computed where it should be handed over."""

    def attention(self, w: Params, x: torch.Tensor, angles: Angles, layer: int) -> Work:
        if layer == 2:
            return x
        return (yield from super().attention(w, x, angles, layer))


class Failing(Llama):
    """Attention that cannot be computed."""

    def attention(self, w: Params, x: torch.Tensor, angles: Angles, layer: int) -> Work:
        yield from super().attention(w, x[:, :-1], angles, layer)
        return x


class Everybody(Llama):
    """A mixture that asks for all experts."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        super().__init__(config, dtype, prefix)
        self.steps = tuple(step if step.experts is None else replace(step, run=self.all) for step in self.steps)

    def all(self, w: Params, x: torch.Tensor, angles: Angles) -> Work:
        experts = torch.arange(8).expand(x.shape[0], 8)
        yield Route(x, experts, experts.to(x.dtype) / 28)
        return x


class Nobody(Everybody):
    """A mixture that computes by itself."""

    def all(self, w: Params, x: torch.Tensor, angles: Angles) -> Work:
        yield from ()
        return x


class Narrow(Siglip):
    """A tower whose last step forgets a number of each row."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps = (*self.steps[:-1], narrowed(self.steps[-1]))


def narrowed(step: Step) -> Step:
    def run(w: Params, x: torch.Tensor, angles: Angles) -> Work:
        return (yield from step.run(w, x, angles))[:, :-1]

    return replace(step, run=run)


class Short(Siglip):
    """A tower without its last step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps = self.steps[:-1]


DEFECTS: dict[str, tuple[str, str, Any, str]] = {
    "attention inside": ("llama", "llama", Inside, "attention-replacement does not hold: layer 2 does not hand its attention over"),
    "attention fails": ("llama", "llama", Failing, "attention-replacement does not hold: "),
    "all experts": ("mixtral", "mixtral", Everybody, "moe-routing does not hold: layer 0 does not route its rows"),
    "no experts": ("mixtral", "mixtral", Nobody, "moe-routing does not hold: layer 0 does not route its rows"),
    "a narrow tower": (
        "gemma",
        "gemma3",
        Narrow,
        r"multimodal-shell does not hold: its largest image comes out as \[4, 63\], where \[4, 64\]",
    ),
    "a tower cut off": ("gemma", "gemma3", Short, "multimodal-shell does not hold: its largest image comes out as "),
}


@pytest.fixture
def made() -> list[weakref.ref[Any]]:
    """What was built for the native tier."""
    return []


@pytest.fixture(params=DEFECTS)
def defect(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, made: list[weakref.ref[Any]]) -> Iterator[tuple[str, str]]:
    """A family, or a tower, that has it: the model, and what is said of it."""
    kind, registered, defective, words = DEFECTS[request.param]

    def make(*arguments: Any) -> Any:
        built = defective(*arguments)
        made.append(weakref.ref(built))
        return built

    monkeypatch.setitem(TOWERS if registered == "gemma3" else FAMILIES, registered, make)
    yield kind, words


@ONE_LOOP  # a cache that is not where it was gives way on both
async def test_a_pass_that_does_not_hold_gives_way_to_transformers_and_leaves_nothing(
    folders: dict[str, Path], tmp_path: Path, defect: tuple[str, str], made: list[weakref.ref[Any]]
) -> None:  # fmt: skip
    kind, words = defect
    prompt = tiny.prompt(20)
    before = left(tmp_path)
    with pytest.raises(SpecializationError, match=f"^pass {words}"):
        async with Runtime.open(folders[kind], backend=NATIVE, cache_dir=tmp_path, **WHOLE):
            pass
    assert left(tmp_path) == before
    async with Runtime.open(folders[kind], cache_dir=tmp_path, **WHOLE) as runtime:
        plan = runtime.plan
        assert (plan.backend, plan.specialization_state, plan.passes) == (GENERIC, "fallback", ())
        assert re.match(f"pass {words}", plan.specialization_reason or "")
        assert runtime.planned is None  # nothing is said of a plan that was given up
        found = await ids_of(runtime, prompt)
        gc.collect()
        assert len(made) == 2 and not any(built() is not None for built in made)
        assert runtime.cache is None and (await runtime.generate([1], max_new_tokens=1)).profile is None
    del runtime
    assert left(tmp_path) == before
    if kind != "gemma":
        assert found == (await anyio.to_thread.run_sync(theirs, folders[kind], prompt)).ids


# ---- the command line


def test_plan_and_run_of_a_model_without_a_match(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    t5, limit = str(folders["t5"]), ("--max-context-tokens", "64")
    assert main(["plan", t5, *limit, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["backend"], plan["specialization_state"], plan["passes"]) == (GENERIC, "not-planned", [])
    assert plan["cache_mode"] == "transformers-dynamic" and plan["predicted"] is None
    assert main(["plan", t5, *limit]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"\n  tier +{GENERIC}\n +not-planned: config.json: model_type 't5' is not known", told)
    assert re.search(r"\n  context +64 tokens a request, [\d.]+ kB of keys and values\n  kv cache +transformers, runtime-scoped: ", told)
    assert "passes" not in told
    assert "nothing: transformers' modules compute" in told
    assert main(["run", t5, "hello", "--max-new-tokens", "4", *limit, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["token_ids"] == t5_ids(folders, tokenizer().encode("hello").ids, 4)
    assert answer["plan"]["backend"] == GENERIC and answer["profile"] is None
    assert answer["cache_state"] == {
        "kv_cache_strategy": "resident", "cache_mode": "transformers-dynamic", "prefix_hit_tokens": 0, "prefix_miss_reason": None,
    }  # fmt: skip
    assert main(["run", t5, "hello", "--max-new-tokens", "4", *limit]) == 0
    shown = capsys.readouterr()
    assert shown.out.rstrip("\n") == answer["text"].rstrip("\n")
    assert shown.err.splitlines()[-1].startswith("4 tokens in ")


def test_plan_of_experts_and_passes(folders: dict[str, Path], copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folders["mixtral"]), "--max-context-tokens", "64", "--expert-memory", "220kB"]) == 0
    told = capsys.readouterr().out
    assert re.search(rf"\n  tier +{NATIVE}\n  passes +cpu-offload: 8 of 8 pieces stay in memory\n +mlp-chunking: ", told)
    assert re.search(r"\n  experts +\d of 24 have room, 2 of 8 are read a layer and token\n", told)
    assert re.search(r"\n  drive +[\d.]+ [MG]B/s, measured now\n  foretold +one request at 64: .*, reads \d", told)
    tiny.edit(copy, lambda config: config.update(model_type="evil"))
    assert main(["plan", str(copy)]) == 1
    refused = capsys.readouterr()
    assert "model_type 'evil' is not known" in refused.err and refused.out == ""
