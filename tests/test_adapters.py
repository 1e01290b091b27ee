"""Adapters: what PEFT saves gives what PEFT gives, alone and in company; every bad folder is refused by name."""

import json
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import peft
import pytest
import tiny
import torch
from safetensors.torch import save_file

from aollm import Runtime
from aollm.adapters import Adapter, Adapters, load_adapters
from aollm.adapters.adapter import CONFIG, TENSORS
from aollm.adapters.lora import Lora
from aollm.checkpoint import Checkpoint, TensorEntry
from aollm.disk.base import Extent
from aollm.errors import ConfigError, ModelError, RequestError
from aollm.families.base import Params
from aollm.families.llama import Llama


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """One loop is enough for what numbers come out; the engine's own tests run on both."""
    return "trio"


pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PROMPT = tiny.prompt(21)

# name: kind of the base, options of its config, fields of LoraConfig
ADAPTERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rank-4": ("llama", {}, {"r": 4, "target_modules": QV}),
    "alpha": ("llama", {}, {"r": 4, "lora_alpha": 24, "target_modules": QV}),
    "rslora": ("llama", {}, {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": LINEAR}),
    "rank-1": ("llama", {}, {"r": 1, "target_modules": ["k_proj"]}),
    "rank-pattern": (
        "llama",
        {},
        {
            "r": 4,
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 7, r"layers\.[12]\.mlp\.up_proj": 2, "^model.layers.0.self_attn.o_proj": 3},
            "alpha_pattern": {"v_proj": 30, r"layers.1\..*down_proj": 2},
        },
    ),
    "rank-pattern-rslora": ("llama", {}, {"r": 4, "target_modules": QV, "rank_pattern": {"v_proj": 9}, "use_rslora": True}),
    "regex": ("llama", {}, {"r": 4, "target_modules": r".*\.[02]\.(self_attn\.(q|o)|mlp\.down)_proj"}),
    "all-linear": ("qwen3", {}, {"r": 4, "target_modules": "all-linear"}),
    "excluded": ("llama", {}, {"r": 4, "target_modules": LINEAR, "exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]}),
    "excluded-regex": ("llama", {}, {"r": 4, "target_modules": LINEAR, "exclude_modules": r".*\.1\..*"}),
    "layers": ("llama", {}, {"r": 4, "target_modules": LINEAR, "layers_to_transform": [0, 2]}),
    "layer-pattern": ("llama", {}, {"r": 4, "target_modules": QV, "layers_to_transform": 1, "layers_pattern": "layers"}),
    "whole-name": ("llama", {}, {"r": 4, "target_modules": ["model.layers.1.mlp.gate_proj", "o_proj"]}),
    "gaussian": ("llama", {}, {"r": 4, "target_modules": QV, "init_lora_weights": "gaussian"}),
    "gemma3": ("gemma3_text", {}, {"r": 4, "target_modules": LINEAR}),
    "qwen3-next": ("qwen3_next", {}, {"r": 4, "target_modules": [*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"]}),
    "gpt-oss": ("gpt_oss", {}, {"r": 4, "target_modules": ATTENTION}),
    "mixture": ("qwen3_moe", {}, {"r": 4, "target_modules": ATTENTION}),
    "biases": ("qwen2", {}, {"r": 4, "target_modules": LINEAR}),
    "mlp-bias": ("llama", {"attention_bias": True, "mlp_bias": True}, {"r": 4, "target_modules": LINEAR}),
}
SEVERAL = {"a": {"r": 4, "target_modules": QV}, "b": {"r": 16, "target_modules": LINEAR}, "c": {"r": 3, "target_modules": ["down_proj"]}}

Kept = Callable[..., Awaitable[tuple[Path, dict[str, tiny.Answer]]]]


def make(base: Path, folder: Path, seed: int = 3, **fields: Any) -> tiny.Answer:
    """An adapter with random weights in `folder`, and what PEFT says with it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(tiny.load(base), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    return tiny.answer(model, PROMPT)


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A base with adapters beside it, in `adapters`, and PEFT's answer with each, and without any as `""`; made once."""
    made: dict[str, tuple[Path, dict[str, tiny.Answer]]] = {}

    async def get(name: str, kind: str, options: dict[str, Any], adapters: dict[str, dict[str, Any]]) -> Any:
        if name not in made:
            folder = tmp_path_factory.mktemp("base")

            def work() -> dict[str, tiny.Answer]:
                tiny.save(folder, kind, **options)
                answers = {"": tiny.answer(tiny.load(folder), PROMPT)}
                return answers | {
                    own: make(folder, folder / "adapters" / own, seed, **fields) for seed, (own, fields) in enumerate(adapters.items())
                }

            made[name] = folder, await anyio.to_thread.run_sync(work)
        return made[name]

    return get


async def several(kept: Kept) -> tuple[Path, dict[str, tiny.Answer]]:
    return await kept("several", "llama", {}, SEVERAL)


def check(found: tiny.Answer, expected: tiny.Answer) -> None:
    assert found.ids == expected.ids
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)


async def ask(runtime: Runtime, adapter: str | None, prompt: list[int] = PROMPT, **fields: Any) -> tiny.Answer:
    """What a runtime says with an adapter."""
    rows, ids = [], []
    async for token in runtime.stream(prompt, max_new_tokens=tiny.COUNT, logprobs=1000, adapter=adapter, **fields):
        numbers, values = zip(*token.top_logprobs, strict=True)
        row = torch.full((len(values),), torch.nan)
        row[list(numbers)] = torch.tensor(values)
        rows.append(row)
        ids.append(token.id)
    return tiny.Answer(ids, torch.stack(rows), 0.0)


@pytest.mark.parametrize("name", ADAPTERS)
async def test_equals_peft(kept: Kept, name: str) -> None:
    kind, options, fields = ADAPTERS[name]
    folder, answers = await kept(name, kind, options, {"own": fields})
    async with Runtime.open(folder, adapter_dir=folder / "adapters") as runtime:
        check(await ask(runtime, "own"), answers["own"])
    assert (answers["own"].logprobs - answers[""].logprobs).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"offload_cpu_layers": 0}, {"dense_projection_chunk_rows": 8}, {"offload_cpu_layers": 1}])
async def test_several_in_one_batch(kept: Kept, options: dict[str, Any]) -> None:
    folder, answers = await several(kept)
    found: dict[tuple[str, int], tiny.Answer] = {}
    async with Runtime.open(folder, adapter_dir=folder / "adapters", **options) as runtime:

        async def one(name: str, number: int) -> None:
            found[name, number] = await ask(runtime, name or None)

        async with anyio.create_task_group() as group:
            for number in range(2):
                for name in answers:
                    group.start_soon(one, name, number)
    for (name, _), answer in found.items():
        check(answer, answers[name])
    assert len(found) == 2 * len(answers)


async def test_history_is_not_shared_between_adapters(kept: Kept, tmp_path: Path) -> None:
    folder, answers = await several(kept)
    stored = {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent", "cache_dir": tmp_path}
    for _ in range(2):
        async with Runtime.open(folder, adapter_dir=folder / "adapters", **stored) as runtime:
            for name in answers:
                check(await ask(runtime, name or None), answers[name])


async def test_folders_by_name(kept: Kept) -> None:
    folder, answers = await several(kept)
    async with Runtime.open(folder, adapter_dir={"formal": folder / "adapters" / "b"}) as runtime:
        check(await ask(runtime, "formal"), answers["b"])
        check(await ask(runtime, None), answers[""])
        with pytest.raises(RequestError, match="there is no 'b'; there are formal"):
            await ask(runtime, "b")
    async with Runtime.open(folder) as runtime:
        with pytest.raises(RequestError, match="open the runtime with adapter_dir"):
            await ask(runtime, "b")


def test_load_adapters_takes_one_or_many(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nor has a folder in it"):
        load_adapters(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        load_adapters(tmp_path / "absent")
    write(tmp_path / "x")
    write(tmp_path / "y")
    (tmp_path / "z").mkdir()
    assert list(load_adapters(tmp_path)) == ["x", "y"]
    assert list(load_adapters(tmp_path / "y")) == ["y"]
    assert list(load_adapters({"k": tmp_path / "x"})) == ["k"]


# Below, adapters are written by hand, for bases that are.

CONFIGURED: dict[str, Any] = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": "org/other",
}  # fmt: skip
SIZES: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 16,
}  # fmt: skip
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def halves(module: str = "model.layers.{}.self_attn.q_proj", rank: int = 2, wide: int = 8, out: int = 8) -> dict[str, torch.Tensor]:
    """The tensors of an adapter of one module in each of two layers."""
    torch.manual_seed(1)
    names = [f"base_model.model.{module.format(layer)}.lora_" for layer in range(2)]
    return {f"{name}{half}.weight": torch.randn(shape) for name in names for half, shape in (("A", (rank, wide)), ("B", (out, rank)))}


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Path:
    """An adapter's folder; a field that is `...` is left out."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIGURED, **fields}.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(halves() if tensors is None else tensors, folder / TENSORS)
    return folder


def base(prefix: str = "model.", dtype: torch.dtype = torch.float32) -> tuple[Llama, Checkpoint]:
    family = Llama(SIZES, dtype, prefix)
    rows = {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 12, "up_proj": 12}
    tensors = {
        name: TensorEntry(name, "F32", (rows.get(name.split(".")[-2], need.shape[0]), *need.shape[1:]), Extent("x", 0, 0))
        for step in family.steps
        for need in step.params.values()
        for name in need.tensors
    }
    return family, Checkpoint(Path("base"), tensors, (), 0)


def without(part: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in halves().items() if part not in name}


def beside(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return halves() | {name: tensor}


SLOW = r"(\w|.|\w.)*(?<=[!?])"
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "only LORA is supported"),
    "no kind": ({"peft_type": ...}, "only LORA is supported"),
    "bias": ({"bias": "all"}, "train it with bias='none'"),
    "dora": ({"use_dora": True}, "use_dora is set: DoRA scales"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: it holds whole modules"),
    "biases of its own": ({"lora_bias": True}, "lora_bias is set"),
    "parameters": ({"target_parameters": ["experts.down_proj"]}, "target_parameters is set: it changes parameters of fused experts"),
    "transposed": ({"fan_in_fan_out": True}, "stored transposed"),
    "tokens": ({"trainable_token_indices": [1]}, "rows of the embedding table"),
    "replication": ({"layer_replication": [[0, 1]]}, "more than once"),
    "invocation": ({"alora_invocation_tokens": [5]}, "in the middle of a prompt"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights"),
    "unknown": ({"use_miracle": {"x": 1}}, "'use_miracle' is set, which is not known here"),
    "rank 0": ({"r": 0}, "r must be a whole number from 1"),
    "rank true": ({"r": True}, "r must be a whole number from 1"),
    "rank huge": ({"r": 1 << 40}, "r must be a whole number from 1"),
    "alpha": ({"lora_alpha": "4"}, "lora_alpha must be a number, found '4'"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    "no targets": ({"target_modules": ...}, "target_modules must name modules"),
    "targets empty": ({"target_modules": []}, "target_modules must name modules"),
    "targets numbers": ({"target_modules": [1]}, "target_modules must be names or a pattern"),
    "bad pattern": ({"target_modules": "(q_proj"}, "target_modules has a pattern that cannot be read"),
    "long pattern": ({"target_modules": "q" * 3000}, "longer than 2048"),
    "slow pattern": ({"target_modules": SLOW}, "takes too long"),
    "slow rank": ({"rank_pattern": {SLOW: 3}}, "takes too long"),
    "ranks": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be a whole number"),
    "ranks as list": ({"rank_pattern": [4]}, "rank_pattern must map"),
    "alphas": ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern must be a number"),
    "layers": ({"layers_to_transform": ["0"]}, "layers_to_transform must be whole numbers"),
    "layer names": ({"layers_pattern": 3}, "layers_pattern must be names"),
    "excluded": ({"exclude_modules": [None]}, "exclude_modules must be names"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_refused(tmp_path: Path, name: str) -> None:
    fields, message = CONFIGS[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        Adapter.load(write(tmp_path / "a", **fields))


SPOILT: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no B": (without("1.self_attn.q_proj.lora_B"), {}, "layers.1.self_attn.q_proj has lora_A and no lora_B"),
    "no A": (without("0.self_attn.q_proj.lora_A"), {}, "layers.0.self_attn.q_proj has lora_B and no lora_A"),
    "nothing": ({}, {"target_modules": ".*"}, "it has no tensors at all"),
    "not declared": (halves(), {"target_modules": ["k_proj", "v_proj"]}, "which target_modules of adapter_config.json leaves out"),
    "excluded": (halves(), {"exclude_modules": ["layers.1.self_attn.q_proj"]}, "adapts model.layers.1.self_attn.q_proj, which"),
    "another layer": (halves(), {"layers_to_transform": [0]}, "adapts model.layers.1.self_attn.q_proj, which"),
    "rank": (halves(rank=3), {}, "has rank 3, adapter_config.json says 2"),
    "patterned rank": (halves(), {"rank_pattern": {"1.self_attn.q_proj": 4}}, "has rank 2, adapter_config.json says 4"),
    "shapes": (beside(f"{FIRST}B.weight", torch.ones(8, 3)), {}, "are not [rank, in] and"),
    "vector": (beside(f"{FIRST}B.weight", torch.ones(8)), {}, "are not [rank, in] and"),
    "empty": (halves(wide=0), {}, "are not [rank, in] and"),
    "NaN": (beside(f"{FIRST}B.weight", torch.full((8, 2), math.nan)), {}, "lora_B.weight holds NaN or infinity"),
    "infinite": (beside(f"{FIRST}A.weight", torch.full((2, 8), -math.inf)), {}, "lora_A.weight holds NaN or infinity"),
    "integers": ({name: tensor.int() for name, tensor in halves().items()}, {}, "is stored as I32; save the adapter in BF16"),
    "bytes": ({name: tensor.to(torch.uint8) for name, tensor in halves().items()}, {}, "is stored as U8; save the adapter in BF16"),
    "embedding": (beside("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 16)), {}, "adapts the embedding table"),
    "magnitudes": (beside("base_model.model.x.lora_magnitude_vector", torch.ones(8)), {}, "it is a DoRA"),
    "a module": (beside("base_model.model.lm_head.modules_to_save.weight", torch.ones(8)), {}, "it holds whole modules"),
    "a bias": (beside("base_model.model.x.lora_B.bias", torch.ones(8)), {}, "biases of adapters are not supported"),
    "a stranger": (beside("x.weight", torch.ones(8)), {}, "x.weight: it is no part of a LoRA"),
    "twice": (beside(f"{FIRST}A.default.weight", torch.ones(2, 8)), {}, "are the same"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_tensors_that_are_refused(tmp_path: Path, name: str) -> None:
    tensors, fields, message = SPOILT[name]
    with pytest.raises(ModelError, match=re.escape(message)):
        Adapter.load(write(tmp_path / "a", tensors, **fields))


def link_out(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "give the folder of a LoRA adapter"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "adapter_config.json cannot be used"),
    "a key twice": (lambda folder: (folder / CONFIG).write_text('{"r": 1, "r": 2}'), "'r' appears twice"),
    "not an object": (lambda folder: (folder / CONFIG).write_text("[]"), "not a JSON object"),
    "huge config": (lambda folder: (folder / CONFIG).write_bytes(b" " * (5 << 20)), "larger than"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "has no adapter_model.safetensors; download it too"),
    "a pickle": (
        lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"),
        "only as a pickle (adapter_model.bin), which can run",
    ),
    "a link": (link_out, "is a link that leaves the model folder"),
    "a folder": (lambda folder: ((folder / TENSORS).unlink(), (folder / TENSORS).mkdir()), "is not a regular file"),
    "empty": (lambda folder: (folder / TENSORS).write_bytes(b""), "the file is empty"),
    "no safetensors": (lambda folder: (folder / TENSORS).write_bytes(b"\xff" * 100), "its header claims"),
    "a pointer": (lambda folder: (folder / TENSORS).write_bytes(b"version https://git-lfs\n"), "git lfs pull"),
    "truncated": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-1]), "is truncated"),
    "a rest": (lambda folder: (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes() + b"x"), "has trailing bytes"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    spoil, message = FILES[name]
    spoil(folder := write(tmp_path / "a"))
    with pytest.raises(ModelError, match=re.escape(message)):
        Adapter.load(folder)


OTHERS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no such modules": (
        halves("model.layers.{}0.self_attn.q_proj") | halves("model.layers.{}1.self_attn.q_proj"),
        {},
        r"layers\.\d+\.self_attn\.q_proj, .*, .* and 1 more, which the base does not have; .* trained on org/other",
    ),
    "a tower": (halves("vision_tower.layers.{}.self_attn.q_proj"), {}, "vision_tower.layers.0.* which the base does not have"),
    "wider": (halves(wide=10), {}, r"q_proj is for a weight \[8, 10\], and .*q_proj.weight of the base is \[8, 8\].*trained on org/other"),
    "taller": (halves(out=12), {}, r"q_proj is for a weight \[12, 8\], and .*q_proj.weight of the base is \[8, 8\]"),
    "experts": (halves("model.layers.{}.mlp.experts.0.q_proj"), {}, "adapts experts .* is not supported"),
    "head": (halves() | halves("lm_head"), {"target_modules": ["q_proj", "lm_head"]}, r"or the head \(lm_head\), which is not"),
    "a layer less": (without("layers.1"), {}, "no tensors for model.layers.1.self_attn.q_proj, which its target_modules name"),
    "declared, and absent": (
        halves(),
        {"target_modules": ["q_proj", "up_proj", "v_proj"]},
        r"no tensors for model.layers.0.self_attn.v_proj, model.layers.0.mlp.up_proj, .* and 1 more, which its",
    ),
    "huge": ({name: tensor * 1e30 for name, tensor in halves().items()}, {}, "which no trained adapter has"),
    "two of one": (halves() | halves("model.language_model.layers.{}.self_attn.q_proj"), {}, "are both model.layers.0.self_attn.q_proj"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_adapter_for_another_base(tmp_path: Path, name: str) -> None:
    tensors, fields, message = OTHERS[name]
    adapter = Adapter.load(write(tmp_path / "a", tensors, **fields))
    with pytest.raises(ModelError, match=message) as raised:
        Adapters({"mine": adapter}, *base())
    assert str(raised.value).startswith(f"adapter mine ({tmp_path / 'a'})")


async def test_a_bad_adapter_stops_open(kept: Kept, tmp_path: Path) -> None:
    folder, _ = await several(kept)
    with pytest.raises(ModelError, match="trained on org/other"):
        async with Runtime.open(folder, adapter_dir=write(tmp_path / "a")):
            pass
    with pytest.raises(ConfigError, match="adapter_dir"):
        Runtime.open(folder, adapter_dir=3)


@pytest.mark.parametrize("own", ["model.", "language_model.model.", "model.language_model.", ""])
@pytest.mark.parametrize("trained", ["model.", "language_model.model.", "model.language_model.", ""])
def test_names_of_one_class_fit_those_of_another(tmp_path: Path, own: str, trained: str) -> None:
    adapter = Adapter.load(write(tmp_path / "a", halves(trained + "layers.{}.self_attn.q_proj")))
    family, checkpoint = base(own)
    found = Adapters({"a": adapter}, family, checkpoint)
    for layer in range(2):
        pair = adapter.modules[f"{trained}layers.{layer}.self_attn.q_proj"]
        delta = found.deltas(family.steps[2 * layer], torch.ones(1, 1))["qkv"]
        torch.testing.assert_close(delta.up @ delta.down, torch.cat((2 * pair.up @ pair.down, torch.zeros(8, 8))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(tmp_path: Path, dtype: torch.dtype, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in halves().items()}
    family, checkpoint = base(dtype=dtype)
    adapters = Adapters({"a": Adapter.load(write(tmp_path / "a", tensors))}, family, checkpoint)
    mask = adapters.mask([(0, 3)])
    assert mask is not None
    delta = adapters.deltas(family.steps[0], mask)["qkv"]
    assert {delta.down.dtype, delta.up.dtype, delta.mask.dtype} == {dtype}
    assert torch.equal(delta.up[:8], (2 * tensors[f"{FIRST}B.weight"].float()).to(dtype))
    assert torch.equal(delta.down, tensors[f"{FIRST}A.weight"].to(dtype))


def test_targets_that_neither_adapter_nor_base_has_do_no_harm(tmp_path: Path) -> None:
    adapter = Adapter.load(write(tmp_path / "a", target_modules=["q_proj", "c_attn", "w1"]))
    assert len(Adapters({"a": adapter}, *base()).digests) == 1


def three(tmp_path: Path) -> tuple[dict[str, Adapter], Adapters, Llama]:
    adapters = {
        "q": Adapter.load(write(tmp_path / "q")),
        "v": Adapter.load(write(tmp_path / "v", halves("model.layers.{}.self_attn.v_proj", 3, out=4), r=3, target_modules=["v_proj"])),
        "up": Adapter.load(write(tmp_path / "up", halves("model.layers.{}.mlp.up_proj", out=12), target_modules=["up_proj"])),
    }
    family, checkpoint = base()
    return adapters, Adapters(adapters, family, checkpoint), family


def test_rows_get_their_own_adapter(tmp_path: Path) -> None:
    adapters, found, family = three(tmp_path)
    x = torch.randn(7, 8)
    mask = found.mask([(0, 2), (None, 1), (1, 3), (2, 1)])
    assert mask is not None
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]]
    added = Params({"qkv": torch.zeros(16, 8)}, found.deltas(family.steps[0], mask)).linear("qkv", x)
    q, v = (adapters[name].modules[f"model.layers.0.self_attn.{name}_proj"] for name in "qv")
    expected = torch.zeros(7, 16)
    expected[:2, :8] = x[:2] @ q.down.t() @ q.up.t() * 2
    expected[3:6, 12:] = x[3:6] @ v.down.t() @ v.up.t() * 4 / 3
    torch.testing.assert_close(added, expected)
    up = adapters["up"].modules["model.layers.1.mlp.up_proj"]
    added = Params({"gate_up": torch.zeros(24, 8)}, found.deltas(family.steps[3], mask)).linear("gate_up", x)
    expected = torch.zeros(7, 24)
    expected[6, 12:] = 2 * up.up @ (up.down @ x[6])
    torch.testing.assert_close(added, expected)


def test_who_is_not_used_is_not_computed(tmp_path: Path) -> None:
    _, found, family = three(tmp_path)
    assert found.mask([]) is None and found.mask([(None, 3), (None, 1)]) is None
    ranks: dict[tuple[int, ...], dict[str, int]] = {}
    for used in [(), (0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2)]:
        mask = torch.zeros(2, 3)
        mask[1, list(used)] = 1
        ranks[used] = {name: delta.down.shape[0] for step in family.steps[:2] for name, delta in found.deltas(step, mask).items()}
    assert ranks == {
        (): {}, (0,): {"qkv": 2}, (1,): {"qkv": 3}, (2,): {"gate_up": 2}, (0, 1): {"qkv": 5}, (0, 2): {"qkv": 5, "gate_up": 2},
        (0, 1, 2): {"qkv": 5, "gate_up": 2},
    }  # fmt: skip


def test_names_and_sizes(tmp_path: Path) -> None:
    _, found, _ = three(tmp_path)
    assert [found.index(name) for name in ("q", "v", "up")] == [0, 1, 2] and len(found) == 3
    with pytest.raises(RequestError, match="there is no 'x'; there are q, v, up"):
        found.index("x")
    assert found.nbytes == 2 * (4 * (5 * (8 + 16) + 2 * (8 + 24)) + 8 * 7)


@pytest.mark.parametrize(
    ("change", "same"), [({"lora_dropout": 0.5}, True), ({"lora_alpha": 5}, False), ({"use_rslora": True}, False), ({"r": 2}, True)]
)
def test_a_digest_tells_adapters_apart(tmp_path: Path, change: dict[str, Any], same: bool) -> None:
    one, other = Adapter.load(write(tmp_path / "a")), Adapter.load(write(tmp_path / "b", **change))
    assert (one.digest == other.digest) is same
    altered = halves()
    altered[f"{FIRST}A.weight"][0, 0] += 1e-3
    assert Adapter.load(write(tmp_path / "c", altered)).digest != one.digest


NAMES = [
    f"{prefix}layers.{layer}.{name}" for prefix in ("model.", "") for layer in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.up_proj")
]
RULES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": ["self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    {"target_modules": "q_proj"},
    {"target_modules": r".*\.1\..*"},
    {"target_modules": r"(model\.)?layers\.\d\..*up.*"},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["mlp.up_proj"]},
    {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*11.*"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_targets_are_those_of_peft(rule: dict[str, Any]) -> None:
    theirs, ours = peft.LoraConfig(**rule), Lora.parse({"peft_type": "LORA", **rule})
    found = {name: bool(peft.tuners.tuners_utils.check_target_module_exists(theirs, name)) for name in NAMES}
    assert {name: ours.takes(name) for name in NAMES} == found


@pytest.mark.parametrize(
    ("pattern", "scales"),
    [
        ({}, [2.0, 2.0]),
        ({"rank_pattern": {"q_proj": 4}}, [1.0, 2.0]),
        ({"alpha_pattern": {"up_proj": 1.0}}, [2.0, 0.5]),
        ({"rank_pattern": {"_proj": 8, r"mlp\..*": 1, "up_proj": 4}}, [2.0, 4.0]),
        ({"rank_pattern": {"^layers.0.mlp.up_proj": 1, "^model.layers.0.mlp.up_proj": 8}}, [2.0, 0.5]),
        ({"rank_pattern": {"q_proj": 16}, "use_rslora": True}, [1.0, 4 / math.sqrt(2)]),
    ],
)
def test_scales(pattern: dict[str, Any], scales: list[float]) -> None:
    lora = Lora.parse({**CONFIGURED, **pattern})
    found = [lora.scale_of(f"model.layers.0.{name}") for name in ("self_attn.q_proj", "mlp.up_proj")]
    assert found == pytest.approx(scales)


def test_large_factors_do_not_reach_rows_of_others(tmp_path: Path) -> None:
    largest = torch.finfo(torch.float32).max ** 0.5 / 2.1
    adapters = {
        "large": write(tmp_path / "large", {name: torch.full_like(t, largest) for name, t in halves().items()}),
        "q": write(tmp_path / "q"),
    }
    family, checkpoint = base()
    found = Adapters(load_adapters(adapters), family, checkpoint)
    mask = found.mask([(0, 1), (1, 1)])
    assert mask is not None
    added = Params({"qkv": torch.zeros(16, 8)}, found.deltas(family.steps[0], mask)).linear("qkv", torch.full((2, 8), 1e3))
    assert torch.isfinite(added[1]).all()


def test_the_name_that_an_adapter_had_in_peft_may_be_in_its_tensors(tmp_path: Path) -> None:
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in halves().items()}
    pair = Adapter.load(write(tmp_path / "a", renamed)).modules["model.layers.0.self_attn.q_proj"]
    assert pair.scale == 2.0
    assert torch.equal(pair.down, halves()[f"{FIRST}A.weight"]) and torch.equal(pair.up, halves()[f"{FIRST}B.weight"])
