"""Our layers against transformers' on tiny models: every option, any chunking, any company, any placement."""

from collections.abc import Awaitable, Callable
from itertools import product
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from aollm import MemoryDisk, Runtime

pytestmark = pytest.mark.anyio
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
"""Where it is numbers that are compared; riders, shards and placement are tried on both."""

THETA = {"rope_theta": 10_000.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)], **THETA}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **THETA}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {**THETA, **parameters}}


# name: kind, options of the model's config, length of the prompt
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 21),
    "theta": ("llama", rope(rope_type="default", rope_theta=500_000.0), 40),
    "linear": ("llama", rope(rope_type="linear", factor=4.0), 40),
    "dynamic-short": ("llama", {**rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 64}, 60),
    "dynamic-long": ("llama", {**rope(rope_type="dynamic", factor=2.0), "max_position_embeddings": 64}, 150),
    "llama3": (
        "llama",
        rope(
            rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        200,
    ),
    "yarn": ("llama", rope(**YARN), 200),
    "yarn-mscale": ("llama", rope(**YARN, mscale=0.7, mscale_all_dim=1.3), 100),
    "yarn-factor": ("llama", rope(**YARN, attention_factor=1.4), 100),
    "yarn-untruncated": ("llama", rope(**YARN, truncate=False, beta_fast=20.0, beta_slow=2.0), 100),
    "longrope-short": ("llama", rope(**LONGROPE, original_max_position_embeddings=64, factor=4.0), 40),
    "longrope-long": ("llama", rope(**LONGROPE, original_max_position_embeddings=64, factor=4.0), 100),
    "longrope-crossing": ("llama", rope(**LONGROPE, original_max_position_embeddings=64, factor=4.0), 61),
    "longrope-factor": ("llama", rope(**LONGROPE, original_max_position_embeddings=64, factor=4.0, attention_factor=1.3), 100),
    "attention-bias": ("llama", {"attention_bias": True}, 21),
    "mlp-bias": ("llama", {"mlp_bias": True}, 21),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 21),
    "tied": ("llama", {"tie_word_embeddings": True}, 21),
    "head-20": ("llama", {"head_dim": 20}, 21),
    "head-80": ("llama", {"head_dim": 80}, 21),
    "mha": ("llama", {"num_key_value_heads": 4}, 21),
    "mqa": ("llama", {"num_key_value_heads": 1}, 21),
    "gelu": ("llama", {"hidden_act": "gelu"}, 21),
    "gelu-tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, 21),
    "eps": ("llama", {"rms_norm_eps": 0.1}, 21),
    "odd-sizes": ("llama", {"vocab_size": 253, "intermediate_size": 37, "hidden_size": 36, "head_dim": 6}, 21),
    "one-token": ("llama", {}, 1),
    "long": ("llama", {"max_position_embeddings": 4096}, 1100),
    "mistral": ("mistral", {"sliding_window": 16}, 50),
    "mistral-no-window": ("mistral", {"sliding_window": None}, 50),
    "mistral-window-2": ("mistral", {"sliding_window": 2}, 20),
    "mistral-long": ("mistral", {"sliding_window": 700, "max_position_embeddings": 4096}, 1300),
    "qwen2": ("qwen2", {}, 21),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 40),
    "qwen2-layer-types": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        40,
    ),
    "qwen2-window-off": ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, 40),
    "qwen3": ("qwen3", {}, 21),
    "qwen3-bias": ("qwen3", {"attention_bias": True}, 21),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, 40),
}


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Awaitable[tuple[Path, tiny.Answer]]]:
    """A model's folder and transformers' answer, made once."""
    made: dict[str, tuple[Path, tiny.Answer]] = {}

    async def get(name: str, make: Callable[[Path], int], dtype: torch.dtype = torch.float32) -> tuple[Path, tiny.Answer]:
        if name not in made:
            folder = tmp_path_factory.mktemp("model")

            def ask() -> tiny.Answer:
                length = make(folder)
                return tiny.answer(tiny.load(folder, dtype), tiny.prompt(length))

            made[name] = folder, await anyio.to_thread.run_sync(ask)
        return made[name]

    return get


def plain(kind: str, options: dict[str, Any], length: int, **how: Any) -> Callable[[Path], int]:
    def make(folder: Path) -> int:
        tiny.save(folder, kind, **how, **options)
        return length

    return make


def same(ours: tiny.Answer, theirs: tiny.Answer, tolerance: float = 1e-4) -> None:
    error = float((ours.logprobs[0] - theirs.logprobs[0]).abs().max())
    assert error <= tolerance * theirs.most, f"first token: {error} of {theirs.most}"
    assert ours.ids == theirs.ids
    error = float((ours.logprobs - theirs.logprobs).abs().max())
    assert error <= tolerance * theirs.most, f"later tokens: {error} of {theirs.most}"


@ONE_LOOP
@pytest.mark.parametrize("name", MODELS)
async def test_every_option_of_a_model_gives_the_logits_of_transformers(kept: Any, name: str) -> None:
    kind, options, length = MODELS[name]
    folder, theirs = await kept(name, plain(kind, options, length))
    async with Runtime.open(folder, backend="optimized-native", max_context_tokens=length + 16) as runtime:
        same(await tiny.ours(runtime, tiny.prompt(length)), theirs)


OLD: dict[str, dict[str, Any]] = {
    "theta": {"rope_theta": 1234.5},
    "no rope keys": {},
    "null scaling": {"rope_theta": 1234.5, "rope_scaling": None},
    "type": {"rope_theta": 1234.5, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "rope_type": {"rope_theta": 1234.5, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
        },
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "no head_dim, no kv heads": {"head_dim": None, "num_key_value_heads": None},
}  # fmt: skip


@ONE_LOOP
@pytest.mark.parametrize("name", OLD)
async def test_configs_in_the_style_of_transformers_4(kept: Any, name: str) -> None:
    def make(folder: Path) -> int:
        tiny.save(folder, num_key_value_heads=4)
        tiny.edit(folder, lambda config: (config.pop("rope_parameters"), config.pop("rope_theta", None), config.update(OLD[name])))
        if "head_dim" in OLD[name]:
            tiny.edit(folder, lambda config: (config.pop("head_dim"), config.pop("num_key_value_heads")))
        return 100

    folder, theirs = await kept(f"old {name}", make)
    async with Runtime.open(folder, backend="optimized-native") as runtime:
        same(await tiny.ours(runtime, tiny.prompt(100)), theirs)


@ONE_LOOP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "biases", "qwen3", "mistral", "head-80", "long", "yarn-mscale", "odd-sizes"])
async def test_half_precision_is_within_rounding(kept: Any, name: str, dtype: torch.dtype) -> None:
    kind, options, length = MODELS[name]
    folder, theirs = await kept(f"{dtype} {name}", plain(kind, options, length, dtype=dtype), dtype)
    async with Runtime.open(folder, backend="optimized-native", max_context_tokens=length + 16) as runtime:
        ours = await tiny.ours(runtime, tiny.prompt(length), 1)
    error = float((ours.logprobs[0] - theirs.logprobs[0]).abs().max())
    assert error <= (0.06 if dtype == torch.bfloat16 else 0.01) * theirs.most, f"{error} of {theirs.most}"


@pytest.mark.parametrize("name", ["llama", "tied", "qwen2"])
async def test_a_sharded_checkpoint_is_the_same_model(kept: Any, name: str) -> None:
    kind, options, length = MODELS[name]
    folder, theirs = await kept(f"sharded {name}", plain(kind, options, length, shard="30KB"))
    assert len(list(folder.glob("*.safetensors"))) > 5
    for layers in (None, 0):
        async with Runtime.open(folder, backend="optimized-native", offload_cpu_layers=layers) as runtime:
            same(await tiny.ours(runtime, tiny.prompt(length)), theirs)


@ONE_LOOP
@pytest.mark.parametrize("matrices", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norms", [torch.float32, torch.bfloat16], ids=str)
async def test_norms_and_biases_may_have_another_dtype_than_matrices(kept: Any, matrices: torch.dtype, norms: torch.dtype) -> None:
    def make(folder: Path) -> int:
        tiny.save(folder, attention_bias=True, mlp_bias=True)
        tensors = load_file(folder / "model.safetensors")
        small = {name for name, tensor in tensors.items() if tensor.ndim == 1}
        save_file({name: t.to(norms if name in small else matrices) for name, t in tensors.items()}, folder / "model.safetensors")
        return 21

    folder, theirs = await kept(f"mixed {matrices} {norms}", make, matrices)
    for layers in (None, 0):
        async with Runtime.open(folder, backend="optimized-native", offload_cpu_layers=layers) as runtime:
            ours = await tiny.ours(runtime, tiny.prompt(21), 1)
        error = float((ours.logprobs[0] - theirs.logprobs[0]).abs().max())
        assert error <= {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}[matrices] * theirs.most


@ONE_LOOP
@pytest.mark.parametrize("shift", [1, 2, 5, 4095])
async def test_weights_may_begin_at_any_byte_of_a_file(kept: Any, tmp_path: Path, shift: int) -> None:
    """The format does not ask for aligned data; a header padded with blanks moves all of it."""
    folder, theirs = await kept("odd-sizes", plain(*MODELS["odd-sizes"]))
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + length] + b" " * shift, data[8 + length :]
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + rest)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    for layers in (None, 0):
        async with Runtime.open(tmp_path, offload_cpu_layers=layers) as runtime:
            same(await tiny.ours(runtime, tiny.prompt(21)), theirs)


LONG = 1100


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 16, None])
async def test_chunks_of_any_size_and_riders_change_nothing(kept: Any, rows: int | None, streamed: bool) -> None:
    folder, theirs = await kept("long", plain(*MODELS["long"]))
    length = LONG if rows != 1 else 60
    if rows == 1:
        _, theirs = await kept("long at 60", lambda f: tiny.save(f, **MODELS["long"][1]) and 60)
    others = {1: 7, 2: 40, 3: 130}
    found: dict[int, list[int]] = {}
    options: dict[str, Any] = {"max_context_tokens": length + 160, "offload_cpu_layers": 0 if streamed else None}
    async with Runtime.open(folder, backend="optimized-native", dense_projection_chunk_rows=rows, **options) as runtime:

        async def ride(seed: int, wait_s: float) -> None:
            await anyio.sleep(wait_s)
            found[seed] = [t.id async for t in runtime.stream(tiny.prompt(others[seed], seed), max_new_tokens=12)]

        async with anyio.create_task_group() as group:
            for seed in others:
                group.start_soon(ride, seed, 0.004 * seed)
            await anyio.sleep(0.008)
            same(await tiny.ours(runtime, tiny.prompt(length)), theirs)
    async with Runtime.open(folder, backend="optimized-native", **options) as runtime:
        for seed, ids in found.items():
            assert ids == [t.id async for t in runtime.stream(tiny.prompt(others[seed], seed), max_new_tokens=12)]


DISKS = ["threads", "uring", "portable", "memory"]


@ONE_LOOP
@pytest.mark.parametrize("layers", [0, 1, 2, None])
async def test_disk_and_depth_do_not_change_a_bit(kept: Any, layers: int | None) -> None:
    """Placement may: a matrix that begins at another address is summed in another order by some processors' kernels."""
    folder, theirs = await kept("tied", plain(*MODELS["tied"]))
    wanted: tiny.Answer | None = None
    for disk, depth in [*product(DISKS, [2]), ("threads", 1), ("memory", 5)]:
        options: dict[str, Any] = {"disk": MemoryDisk.of(folder)} if disk == "memory" else {"disk_backend": disk}
        async with Runtime.open(
            folder, backend="optimized-native", offload_cpu_layers=layers, prefetch_depth=depth, **options
        ) as runtime:  # fmt: skip
            assert bool(runtime.plan.streamed_nbytes_per_pass) == (layers is not None)
            for _ in range(2):
                found = await tiny.ours(runtime, tiny.prompt(21))
                same(found, theirs)
                wanted = wanted or found
                assert torch.equal(found.logprobs, wanted.logprobs)


@pytest.mark.parametrize("policy", ["auto", "prefix", "suffix", "middle-band"])
async def test_the_policy_says_which_layers_stay(kept: Any, policy: str) -> None:
    folder, theirs = await kept("llama", plain(*MODELS["llama"]))
    async with Runtime.open(folder, backend="optimized-native", offload_cpu_layers=1, offload_cpu_policy=policy) as runtime:
        stays = {"auto": 1, "prefix": 0, "suffix": 2, "middle-band": 1}[policy]
        places = dict(zip(runtime.plan.pieces, runtime.plan.placement, strict=True))
        assert {name for name, place in places.items() if place == "host"} == {f"layer {stays} attention", f"layer {stays} mlp"}
        same(await tiny.ours(runtime, tiny.prompt(21)), theirs)
