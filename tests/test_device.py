"""Devices with memory of their own: the same bits wherever layers are, the bytes that were foretold, and nothing left behind."""

import gc
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
import torch
from fake_device import FakeDevice
from safetensors.torch import save_file

from aollm import ConfigError, MemoryBudgetError, MemoryDisk, Runtime
from aollm.checkpoint import open_checkpoint
from aollm.device import Host, choose_device
from aollm.disk.auto import open_disk
from aollm.export.writer import write_export
from aollm.port import Port
from aollm.trace import Trace
from aollm.weights import Weights

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

COMMON: dict[str, Any] = {"max_context_tokens": 200, "dense_projection_chunk_rows": 8, "max_concurrent_requests": 2}
PROMPT = tiny.prompt(20)
MIXES: dict[str, dict[str, Any]] = {
    "on the device": {},
    "in memory": {"offload_cpu_layers": 9, "offload_cpu_policy": "suffix"},
    "streamed": {"offload_gpu_layers": 0, "offload_cpu_layers": 0},
    "some of each": {"offload_gpu_layers": 1, "offload_cpu_layers": 1},
}
CASES = [
    *[("llama", mix) for mix in MIXES],
    *[(kind, mix) for kind in ("gemma3_text", "qwen3_next", "gpt_oss") for mix in ("on the device", "some of each")],
]
Model = Callable[[str], Awaitable[tuple[Path, tiny.Answer]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A folder by kind, exported, so that weights begin with cache lines wherever they are; and what it says on the host."""
    made: dict[str, tuple[Path, tiny.Answer]] = {}

    async def get(kind: str) -> tuple[Path, tiny.Answer]:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            dtype = torch.bfloat16 if kind == "gpt_oss" else torch.float32
            await anyio.to_thread.run_sync(tiny.save, folder, kind, dtype)
            async with Port() as port:
                disk, _ = open_disk("threads", port, folder)
                await write_export(await open_checkpoint(folder, disk, "published"), folder / "gds_export", disk)
                await disk.aclose()
            (folder / "model.safetensors").unlink()
            async with Runtime.open(folder, **COMMON) as runtime:
                made[kind] = folder, await tiny.ours(runtime, PROMPT)
        return made[kind]

    return get


@pytest.fixture
async def device(anyio_backend: str) -> AsyncIterator[FakeDevice]:
    """A device on which nothing must be left."""
    device = FakeDevice()
    yield device
    gc.collect()
    assert (device.nbytes, device.registered) == (0, 0)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers take megabytes."""
    return tiny.save(tmp_path_factory.mktemp("large"), hidden_size=256, intermediate_size=1024)


def same(found: tiny.Answer, wanted: tiny.Answer) -> bool:
    return found.ids == wanted.ids and torch.equal(found.logprobs, wanted.logprobs)


@pytest.mark.parametrize(("kind", "mix"), CASES)
async def test_layers_give_the_same_bits_wherever_they_are(model: Model, device: FakeDevice, kind: str, mix: str) -> None:
    folder, wanted = await model(kind)
    async with Runtime.open(folder, on=device, **COMMON, **MIXES[mix]) as runtime:
        plan = runtime.plan
        assert same(await tiny.ours(runtime, PROMPT), wanted)
        places = [place for place, label in zip(plan.placement, plan.pieces, strict=True) if label.startswith("layer")]
        assert set(places) == {"on the device": {"device"}, "in memory": {"host"}, "streamed": {"disk"}}.get(
            mix, {"device", "host", "disk"}
        )
        assert device.peak <= sum(plan.device_ledger.values()) <= plan.device_memory == device.limit
        assert (plan.device, plan.device_reason, plan.specialization_state) == ("fake:0", "as given", "applied")
        observed = {one.id: one.observed for one in plan.passes}
        for id, place, where in (("gpu-offload", "device", "on fake:0"), ("cpu-offload", "host", "in memory")):
            count = plan.placement.count(place)
            assert observed.get(id) == (f"{count} of {len(plan.pieces)} pieces are {where}" if count else None)


async def test_a_pass_moves_what_is_not_on_the_device_and_nothing_else(model: Model, device: FakeDevice) -> None:
    folder, _ = await model("llama")
    async with Runtime.open(folder, on=device, **COMMON, **MIXES["some of each"]) as runtime:
        plan, opened = runtime.plan, len(device.filled)
        kept = [label for label, place in zip(plan.pieces, plan.placement, strict=True) if place == "device"]
        first = [event.label for event in runtime.trace.between(0, float("inf")) if event.name == "offloaded_cpu_to_cuda"]
        assert sorted(first[: len(kept)]) == sorted(kept) and len(kept) == 2
        await tiny.ours(runtime, PROMPT, 10)
        passes = runtime.engine.passes
        profile = runtime.profile(0)
    events = [event for event in runtime.trace.between(0, float("inf")) if event.name == "offloaded_cpu_to_cuda"]
    moved = {label: [event.nbytes for event in events if event.label == label] for label in plan.pieces}
    for label, place in zip(plan.pieces, plan.placement, strict=True):
        assert len(moved[label]) == 1 if place == "device" else passes <= len(moved[label]) <= passes + 1  # ahead of the next pass
    assert sum(moved[label][-1] for label in plan.pieces if label not in kept) == plan.moved_nbytes_per_pass > 0
    assert sum(event.nbytes for event in events) == sum(device.filled) and opened >= len(kept)
    assert {event.path for event in events} == {"cpu-offloaded-artifacts"}
    assert profile is not None and {"cpu-offloaded-artifacts", "safetensor-io"} == set(profile["storage_paths"])


async def test_routed_experts_are_moved_and_no_others(model: Model, device: FakeDevice) -> None:
    folder, _ = await model("qwen3_next")
    async with Runtime.open(folder, on=device, **COMMON) as runtime:
        before = len(device.filled)
        await tiny.ours(runtime, PROMPT[:1], 3)
        layers, routed = len({key[0] for key in runtime.engine._model.experts._pieces}), 2
        moved = [event for event in runtime.trace.between(0, float("inf")) if event.label.endswith("expert") and event.nbytes]
        assert len(moved) == runtime.engine.passes * layers * routed
        assert sum(event.nbytes for event in moved) == sum(device.filled[before:])


async def test_little_memory_there_is_kept_to(model: Model) -> None:
    folder, wanted = await model("llama")
    fields = COMMON | {"max_concurrent_requests": 1, "max_context_tokens": 64}
    async with Runtime.open(folder, on=FakeDevice(), **fields, offload_gpu_layers=0, offload_cpu_layers=0) as runtime:
        least = sum(runtime.plan.device_ledger.values())
        one = max(runtime.plan.weights_nbytes // len(runtime.plan.pieces), 4096)
    device = FakeDevice(least + 3 * one)
    async with Runtime.open(folder, on=device, **fields) as runtime:
        plan = runtime.plan
        assert set(plan.placement) == {"device", "host"}
        assert same(await tiny.ours(runtime, PROMPT), wanted)
    assert device.peak <= sum(plan.device_ledger.values()) <= device.limit
    async with Runtime.open(folder, on=FakeDevice(), device_memory=device.limit, **fields) as runtime:
        assert (runtime.plan.placement, runtime.plan.device_memory) == (plan.placement, device.limit)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"device_memory": 4096},
            r"device_memory=4.0 KiB is too small.*activations.*raise device_memory.*it would fit with device_memory=",
        ),
        ({"memory": "1MiB"}, r"(?<!device_)memory=1.0 MiB is too small.*raise memory.*it would fit with memory="),
        (
            {"offload_gpu_layers": 3, "device_memory": "10MiB"},
            r"device_memory=10.0 MiB .* weights 9\.\d MiB.*, or lower offload_gpu_layers",
        ),
    ],
)
async def test_what_does_not_fit_is_named_with_the_least_that_does(large: Path, device: FakeDevice, fields: Any, words: str) -> None:
    folder = large
    with pytest.raises(MemoryBudgetError, match=words) as raised:
        async with Runtime.open(folder, on=device, **COMMON, **fields):
            pass
    name = "memory" if "memory" in fields else "device_memory"
    least = raised.value.changes[name]
    async with Runtime.open(folder, on=device, **COMMON, **(fields | {name: least + (16 << 20)})) as runtime:
        assert sum(runtime.plan.device_ledger.values()) <= runtime.plan.device_memory


async def test_a_device_that_has_no_room_for_what_comes_keeps_nothing_of_the_host(device: FakeDevice) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Weights([], ["disk"], 1 << 20, device.limit + 1, device, MemoryDisk({}), Trace())
    assert device.registered == 0


@pytest.mark.parametrize("mix", ["streamed", "some of each"])
async def test_leaving_in_the_middle_leaves_nothing_behind(model: Model, device: FakeDevice, mix: str) -> None:
    folder, wanted = await model("llama")
    async with Runtime.open(folder, on=device, **COMMON, **MIXES[mix]) as runtime:
        for after in range(3):
            async with runtime.stream(tiny.prompt(30), max_new_tokens=100) as stream:
                for _ in range(after):
                    await anext(stream)
        assert same(await tiny.ours(runtime, PROMPT), wanted)
        with anyio.move_on_after(0.01):
            await runtime.generate(tiny.prompt(100), max_new_tokens=90)
        assert same(await tiny.ours(runtime, PROMPT), wanted)


async def test_company_and_stored_histories_do_not_change_answers(model: Model, device: FakeDevice, tmp_path: Path) -> None:
    folder, wanted = await model("qwen3_next")
    found: list[tiny.Answer] = []
    fields = COMMON | {"kv_cache_strategy": "paged", "cache_dir": tmp_path, "max_concurrent_requests": 4}

    async def ask() -> None:
        found.append(await tiny.ours(runtime, PROMPT))

    async with Runtime.open(folder, on=device, **fields, **MIXES["some of each"]) as runtime, anyio.create_task_group() as group:
        for seed in range(3):
            group.start_soon(tiny.ours, runtime, tiny.prompt(9 + 20 * seed, seed))
        group.start_soon(ask)
    assert found[0].ids == wanted.ids  # rows of others change the shapes of products, and so their last bits
    assert float((found[0].logprobs - wanted.logprobs).abs().max()) < 1e-4


async def test_adapters_are_on_the_device(model: Model, device: FakeDevice, tmp_path: Path) -> None:
    folder, without = await model("llama")
    generator = torch.Generator().manual_seed(1)
    at = "base_model.model.model.layers.1.self_attn.q_proj"
    save_file(
        {f"{at}.lora_A.weight": torch.randn(4, 64, generator=generator), f"{at}.lora_B.weight": torch.randn(64, 4, generator=generator)},
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layers.1.self_attn.q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    fields = {"max_new_tokens": 6, "adapter": tmp_path.name, "logprobs": 5}
    async with Runtime.open(folder, adapter_dir=tmp_path, **COMMON) as runtime:
        wanted = [token async for token in runtime.stream(PROMPT, **fields)]
    async with Runtime.open(folder, adapter_dir=tmp_path, on=device, **COMMON, **MIXES["some of each"]) as runtime:
        assert [token async for token in runtime.stream(PROMPT, **fields)] == wanted
        assert same(await tiny.ours(runtime, PROMPT), without)
        assert runtime.plan.device_ledger["adapters"] > 0
    assert [token.logprob for token in wanted] != [float(row.max()) for row in without.logprobs]


async def test_a_tied_head_is_the_embedding_table_where_it_is(model: Model, device: FakeDevice) -> None:
    """Nothing is read once all layers and the head are kept, though rows of the table are asked for in each pass."""
    folder, wanted = await model("gemma3_text")
    disk = MemoryDisk.of(folder)
    async with Runtime.open(folder, disk=disk, on=device, **COMMON) as runtime:
        assert set(runtime.plan.placement) == {"device"} and runtime.plan.moved_nbytes_per_pass == 0
        read, filled = len(disk.reads), len(device.filled)
        assert same(await tiny.ours(runtime, PROMPT), wanted)
        assert (len(disk.reads), len(device.filled)) == (read, filled)


async def test_a_copy_that_fails_fails_its_riders_and_no_others(model: Model, device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, wanted = await model("llama")
    async with Runtime.open(folder, on=device, **COMMON, **MIXES["streamed"]) as runtime:
        with monkeypatch.context() as broken:
            broken.setattr(device, "fills", lambda *of: (_ for _ in ()).throw(RuntimeError("an illegal address")))
            with pytest.raises(Exception, match="could not be moved to the device: an illegal address"):
                for _ in range(3):  # pieces that are there already serve a pass
                    await tiny.ours(runtime, PROMPT)
        assert same(await tiny.ours(runtime, PROMPT), wanted)


# Choosing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize("setting", ["cuda", "cuda:3"])
async def test_a_device_that_is_not_there_is_refused(model: Model, setting: str) -> None:
    folder, _ = await model("llama")
    with pytest.raises(ConfigError, match=rf"device: there is no {setting}: torch {torch.__version__[0]}.*; .*compute on the processor"):
        async with Runtime.open(folder, device=setting, **COMMON):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, r"no CUDA device \(torch .*\)"),
        ({"device": "cpu"}, "as asked for"),
        ({"offload_gpu_layers": 1}, r"no CUDA device \(torch .*\): what was to be on a device is in host memory"),
        ({"device_memory": 1 << 30}, r"no CUDA device \(torch .*\): device_memory limits nothing"),
    ],
)
async def test_where_there_is_none_the_plan_says_so(model: Model, fields: dict[str, Any], reason: str) -> None:
    folder, wanted = await model("llama")
    async with Runtime.open(folder, **COMMON, **fields, offload_cpu_layers=1, offload_cpu_policy="prefix") as runtime:
        plan = runtime.plan
        assert same(await tiny.ours(runtime, PROMPT), wanted)
    assert plan.device == "cpu" and re.fullmatch(reason, plan.device_reason)
    kept = {0, 2} if "offload_gpu_layers" in fields else {0}
    assert plan.placement == tuple("host" if layer in kept else "disk" for layer in (0, 0, 1, 1, 2, 2, -1))
    assert (plan.device_memory, plan.device_ledger, plan.landing_nbytes, plan.moved_nbytes_per_pass) == (0, {}, 0, 0)


async def test_the_other_tier_says_that_it_has_no_device(model: Model) -> None:
    folder, _ = await model("llama")
    for fields in ({"device": "cuda"}, {"device_memory": 1 << 30}, {"offload_gpu_layers": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))}: only the native tier can do that"):
            async with Runtime.open(folder, backend="transformers-generic", **fields):
                pass


def test_a_given_device_is_taken() -> None:
    device = FakeDevice(7)
    chosen = choose_device("cpu", device)
    assert (chosen.device, chosen.reason, chosen.free_nbytes) == (device, "as given", 7)
    assert isinstance(choose_device("cpu").device, Host)
