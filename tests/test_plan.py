"""What is told before a run: sizes, speeds, what would make it fit; with and without weights; and what came of it."""

import json
import random
import resource
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import psutil
import pytest
import tiny
import torch

from aollm import MemoryBudgetError, ModelError, Runtime, RuntimeConfig
from aollm.buffers import PAGE, Ring
from aollm.checkpoint import INDEX
from aollm.disk.base import Extent, Priority, Span
from aollm.disk.threads import ThreadsDisk
from aollm.forecast import ENTRY_S, HOPS_S, Forecast
from aollm.outlook import Outlook, choose
from aollm.pace import Pace, at, rising
from aollm.planning import look, plan
from aollm.port import Port
from aollm.probe import drive_speed, folder_speed

pytestmark = [pytest.mark.anyio]

KINDS = sorted(tiny.CONFIGS)
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
WHOLE: dict[str, Any] = {"max_context_tokens": 128, "memory": "2GiB"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sharded tiny model of each kind."""
    return {kind: tiny.save(tmp_path_factory.mktemp(kind), kind, shard="200KB") for kind in KINDS}


@pytest.fixture
def folder(folders: dict[str, Path]) -> Path:
    return folders["llama"]


def described(folder: Path, tmp_path: Path, index: bool) -> Path:
    """A folder with what is fetched of a model before its weights."""
    (copy := tmp_path / f"{folder.name}-described").mkdir()
    shutil.copy(folder / "config.json", copy)
    if index:
        shutil.copy(folder / INDEX, copy)
    return copy


SAME = ("weights_nbytes", "pinned_nbytes", "placement", "pieces", "experts", "kv_nbytes_per_token", "passes", "dtype")


@ONE_LOOP
@pytest.mark.parametrize("index", [True, False], ids=["index", "config alone"])
@pytest.mark.parametrize("kind", KINDS)
async def test_a_model_that_is_not_here_is_planned_like_one_that_is(
    folders: dict[str, Path], tmp_path: Path, kind: str, index: bool
) -> None:  # fmt: skip
    real = (await look(RuntimeConfig.of(folders[kind], WHOLE))).plan
    copy = described(folders[kind], tmp_path, index)
    plan = (await look(RuntimeConfig.of(copy, WHOLE))).plan
    for name in SAME:
        assert getattr(plan, name) == getattr(real, name), name
    assert plan.predicted is not None and plan.predicted.speeds[0].tokens_per_second > 0
    assert sorted(path.name for path in copy.iterdir()) == sorted(["config.json", *([INDEX] if index else [])])  # no probe left
    with pytest.raises(ModelError):
        async with Runtime.open(copy, **WHOLE):
            pass


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dtype": "float8"}, "float8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"model_type": "nothing"}, "nothing"),
    ],
)  # fmt: skip
async def test_a_description_that_describes_nothing(folder: Path, tmp_path: Path, change: Mapping[str, Any], says: str) -> None:
    copy = described(folder, tmp_path, index=True)
    tiny.edit(copy, lambda config: config.update(change))
    with pytest.raises(ModelError, match=says):
        await plan(copy)


async def test_an_index_that_names_nothing(folder: Path, tmp_path: Path) -> None:
    copy = described(folder, tmp_path, index=True)
    (copy / INDEX).write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        await plan(copy)


@ONE_LOOP
async def test_a_model_for_transformers_that_is_not_here(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64}))
    found = await plan(tmp_path)
    assert (found.backend, found.predicted) == ("transformers-generic", None)
    assert found.weights_nbytes > 0


@pytest.mark.parametrize("nbytes", [4, 40], ids=["some", "all of it"])
async def test_the_drive_is_measured_by_reading_what_it_says(tmp_path: Path, nbytes: int) -> None:
    """Odd extents, small and larger than a chunk of the ring: the first two chunks and then as much as was asked for, each byte
    once and where it does not overwrite others of its read."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 256)
    spans = [(0, 9), (9, 5000), (5009, 20_000), (25_009, 1), (25_010, 40_526)]
    async with Port() as port:
        disk = Noting(port)
        try:
            speed = await drive_speed(disk, [Extent(str(file), at, length) for at, length in spans], Ring(8 * PAGE), nbytes * PAGE)
        finally:
            await disk.aclose()
    ends = sorted((extent.offset, extent.end) for extent in disk.extents)
    assert speed > 0 and all(before[1] <= after[0] for before, after in pairwise(ends))
    total = sum(last - first for first, last in ends)
    assert total == 65_536 if nbytes == 40 else nbytes * PAGE <= total < 65_536
    assert disk.right


@ONE_LOOP
async def test_headers_of_126_layers_are_enough(tmp_path: Path) -> None:
    """810 GB of weights, of which there is nothing but the headers: the files have holes in their place."""
    nbytes = big(tmp_path)
    outlook = await look(RuntimeConfig.of(tmp_path, {"memory": "16GiB", "max_context_tokens": 4096}))
    plan = outlook.plan
    assert plan.weights_nbytes == pytest.approx(nbytes, rel=0.01)
    assert len(plan.placement) == 252 + sum(label.startswith("head") for label in plan.pieces)
    assert plan.predicted is not None and plan.predicted.drive_bytes_per_second is not None
    one = plan.predicted.speeds[0]
    assert one.bytes_per_pass == plan.streamed_nbytes_per_pass
    assert one.seconds_per_pass >= one.bytes_per_pass / plan.predicted.drive_bytes_per_second


def big(folder: Path) -> int:
    """Shards with the headers of Llama-3.1-405B and holes for its weights; returns their bytes."""
    hidden, wide, layers, vocabulary = 16_384, 53_248, 126, 128_256
    sizes = dict(
        model_type="llama", hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=vocabulary, max_position_embeddings=131_072, dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    shapes = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (1024, hidden), "self_attn.v_proj": (1024, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (vocabulary, hidden)}]
    shards += [{f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()} for layer in range(layers)]
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)})
    picks, total = {}, 0
    for number, tensors in enumerate(shards):
        header, end = {}, 0
        for name, shape in tensors.items():
            begin, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
            picks[name] = f"part-{number}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"part-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + end)
        total += end
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": picks}))
    return total


class Noting(ThreadsDisk):
    """A disk that remembers what was read."""

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self.extents: list[Extent] = []
        self.right = True
        """Whether each read found what the files have."""

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        self.extents += extents
        span = await super().read_into(extents, buffers, priority)
        for extent, buffer in zip(extents, buffers, strict=True):
            self.right &= Path(extent.file).read_bytes()[extent.offset : extent.end] == bytes(buffer)
        return span


async def test_choosing_reads_headers_and_nothing_else(folder: Path) -> None:
    async with Port() as port:
        disk = Noting(port)
        outlook = await choose(RuntimeConfig.of(folder, WHOLE), folder, disk, "as given")
        await disk.aclose()
    assert outlook.found is not None
    data = {entry.extent.file: entry.extent.offset for entry in outlook.found.checkpoint.tensors.values()}
    for entry in outlook.found.checkpoint.tensors.values():
        data[entry.extent.file] = min(data[entry.extent.file], entry.extent.offset)
    assert {extent.file for extent in disk.extents} >= set(data)
    assert all(extent.end <= data.get(extent.file, extent.end) for extent in disk.extents)


@ONE_LOOP
@pytest.mark.parametrize(
    ("room", "fields", "named"),
    [
        (0, {}, {"memory"}),
        (300, {"max_context_tokens": 1 << 21}, {"memory", "max_context_tokens", "kv_cache_strategy"}),
        (300, {"kv_cache_memory": 500 << 20, "max_context_tokens": 4096, "max_concurrent_requests": 4096}, {"memory", "kv_cache_memory"}),
        (120, {"max_context_tokens": 64, "max_concurrent_requests": 4096}, {"memory", "max_concurrent_requests"}),
    ],
)
async def test_what_does_not_fit_says_the_smallest_changes_that_do(
    folder: Path, room: int, fields: dict[str, Any], named: set[str]
) -> None:  # fmt: skip
    """`room`: MiB beyond what this process has already."""
    fields = {"kv_cache_strategy": "resident", **fields}
    before, grown = own_memory(), 16 << 20  # by which the process may grow or shrink between two looks at it
    with pytest.raises(MemoryBudgetError, match="it would fit with memory=") as raised:
        await plan(folder, **fields, memory=before + (room << 20))
    changes = raised.value.changes
    assert named <= changes.keys()
    least = changes.pop("memory") - before
    for each in ({"memory": own_memory() + least + grown}, *({name: value} for name, value in changes.items())):
        await plan(folder, **{**fields, "memory": own_memory() + (room << 20) + grown, **each})
    with pytest.raises(MemoryBudgetError):
        await plan(folder, **fields, memory=own_memory() + least - grown)


def own_memory() -> int:
    return int(psutil.Process().memory_info().rss)


async def test_opening_says_it_too(folder: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="it would fit with memory="):
        async with Runtime.open(folder, memory="200MiB"):
            pass


EVEN = {1: 1.0, 8: 2.0, 128: 32.0}


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (4, 1 + 3 / 7), (8, 2.0), (68, 17.0), (128, 32.0), (256, 64.0), (512, 128.0)])
def test_between_and_beyond_the_rows_that_were_tried(rows: int, seconds: float) -> None:
    assert at(EVEN, rows) == pytest.approx(seconds)


def test_fewer_rows_never_take_longer() -> None:
    assert rising({1: 3.0, 8: 2.0, 32: 5.0, 128: 4.0}) == {1: 2.0, 8: 2.0, 32: 4.0, 128: 4.0}
    assert rising(EVEN) == EVEN


NOTHING = dict.fromkeys(EVEN, 0.0)


def forecast(outlook: Outlook, drive: float | None, mixed: bool = False, **changes: Any) -> Forecast:
    """Of a model whose rows take a second for one and two for eight, in its mixtures or else its other layers, and nothing else."""
    pace = Pace(*((NOTHING, EVEN) if mixed else (EVEN, NOTHING)), NOTHING, NOTHING, ())
    assert outlook.found is not None
    return Forecast(replace(outlook.plan, **changes), outlook.found.family, pace, drive, 100.0)


@ONE_LOOP
async def test_a_pass_takes_the_longer_of_reading_and_computing(folder: Path) -> None:
    outlook = await look(RuntimeConfig.of(folder, WHOLE))
    sizes = {"streamed_nbytes_per_pass": 6_000, "kv_tokens": 100, "kv_nbytes_per_token": 10, "max_rows": 64, "chunk_rows": 64}
    slow, fast = forecast(outlook, 2_000.0, **sizes), forecast(outlook, 60_000.0, **sizes)
    assert slow.decode(1, 50).seconds_per_pass == pytest.approx(3 + HOPS_S)
    assert (slow.decode(1, 50).limiter, slow.decode(1, 50).bytes_per_pass) == ("disk", 6_000)
    assert slow.decode(8, 50).tokens_per_second == pytest.approx(8 / (3 + HOPS_S))
    assert fast.decode(8, 50).seconds_per_pass == pytest.approx(2 + HOPS_S)
    assert fast.decode(8, 50).limiter == "memory"
    assert forecast(outlook, None, **sizes).decode(1, 50).seconds_per_pass == pytest.approx(1 + HOPS_S)
    on_disk = forecast(outlook, 2_000.0, **sizes, kv_cache_strategy="paged")
    assert on_disk.decode(2, 150).bytes_per_pass == 6_000 + (300 - 100) * 10
    assert fast.first_token(128) == pytest.approx(2 * at(EVEN, 64) + 2 * HOPS_S + ENTRY_S)
    assert slow.first_token(64) == pytest.approx(at(EVEN, 64) + HOPS_S + ENTRY_S)
    assert slow.first_token(1) == pytest.approx(3 + HOPS_S + ENTRY_S)
    first, last = slow.answer(10, 5, 2)
    assert last - first == pytest.approx(4 * slow.decode(2, 12).seconds_per_pass)


@ONE_LOOP
async def test_experts_take_turns_with_computing(folders: dict[str, Path]) -> None:
    outlook = await look(RuntimeConfig.of(folders["mixtral"], WHOLE))  # three layers of eight experts, two of which a row takes
    sizes = {"streamed_nbytes_per_pass": 0, "expert_slots": 6}
    found = forecast(outlook, 150.0, **sizes)
    assert found.decode(1, 10).bytes_per_pass == 3 * 2 * 100 * 3 // 4  # a quarter of them are in memory
    assert found.decode(1, 10).seconds_per_pass == pytest.approx(1 + 450 / 150 + 4 * HOPS_S)  # a pass, and three layers of experts
    assert found.decode(8, 10).bytes_per_pass == pytest.approx(3 * 8 * (1 - 0.75**8) * 75, abs=1)
    mixed = forecast(outlook, 150.0, mixed=True, **sizes)  # one and a half a layer, so two thirds of a second are not hidden
    assert mixed.decode(1, 10).seconds_per_pass == pytest.approx(3 + 1 / 1.5 + 4 * HOPS_S)
    assert forecast(outlook, 1e9, mixed=True, **sizes).decode(1, 10).seconds_per_pass == pytest.approx(1 + 4 * HOPS_S, abs=1e-4)


@ONE_LOOP
async def test_layers_read_no_more_of_a_history_than_they_see(folders: dict[str, Path]) -> None:
    sizes = {"streamed_nbytes_per_pass": 0, "kv_tokens": 100, "kv_nbytes_per_token": 10, "kv_cache_strategy": "paged"}
    whole = await look(RuntimeConfig.of(folders["llama"], WHOLE))
    for strategy, coded in (("paged", 1.0), ("quantized-cold-tier", 0.5)):
        found = forecast(whole, 2_000.0, **sizes | {"kv_cache_strategy": strategy})
        assert found.decode(2, 150).bytes_per_pass == int(coded * (300 - 100) * 10)
    ring = sizes | {"kv_cache_strategy": "sliding-window-ring-buffer", "kv_window_tokens": 60}
    assert forecast(whole, 2_000.0, **ring).decode(2, 150).bytes_per_pass == (2 * 60 - 100) * 10
    ring |= {"max_context_tokens": 100_000, "max_concurrent_requests": 1}
    assert forecast(whole, 2_000.0, **ring).prediction().disk_nbytes == 4 * 1024 * 10
    some = await look(RuntimeConfig.of(folders["gemma3_text"], WHOLE))
    found = forecast(some, 2_000.0, **sizes)
    seen = [found.family.kv.window(layer) or 1000 for layer in range(found.family.kv.layers)]
    assert min(seen) < 1000 == max(seen)
    assert found.decode(1, 1000).bytes_per_pass == int(sum(max(tokens - 100, 0) for tokens in seen) / len(seen) * 10)


@ONE_LOOP
async def test_what_is_foretold_takes_no_random_number_of_the_caller(folder: Path) -> None:
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    await plan(folder, **WHOLE, offload_cpu_layers=0)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


async def test_a_drive_that_cannot_be_measured_is_left_as_it_was(tmp_path: Path) -> None:
    """Files may not be larger than a mebibyte: writing the one that is to be read fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with Port() as port:
        disk = ThreadsDisk(port)
        try:
            assert await folder_speed(disk, tmp_path, Ring(8 * PAGE), 2 << 20)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
            assert await folder_speed(disk, tmp_path, Ring(8 * PAGE), 8 << 20) is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            await disk.aclose()
    assert not list(tmp_path.iterdir())


@ONE_LOOP
async def test_memory_grows_with_what_rides(folder: Path) -> None:
    found = forecast(await look(RuntimeConfig.of(folder, WHOLE)), None)
    plan, little, much = found.plan, found.peak_nbytes(1, 16), found.peak_nbytes(16, 128)
    assert little < much <= sum(plan.ledger.values())
    assert little > sum(plan.ledger.values()) - plan.ledger["kv"]


async def test_an_answer_says_what_was_foretold_of_it(folder: Path) -> None:
    async with Runtime.open(folder, **WHOLE) as runtime:
        done = await runtime.generate(tiny.prompt(20), max_new_tokens=8)
    assert runtime.plan.predicted is not None
    assert done.profile is not None
    for told in ("predicted", "achieved"):
        found = done.profile[told]
        assert 0 < found["first_token_seconds"] < found["seconds"]
        assert found["tokens_per_second"] == pytest.approx(7 / (found["seconds"] - found["first_token_seconds"]))


async def test_one_token_has_no_rate(folder: Path) -> None:
    async with Runtime.open(folder, **WHOLE) as runtime:
        done = await runtime.generate(tiny.prompt(20), max_new_tokens=1)
    assert done.profile is not None and done.profile["predicted"]["tokens_per_second"] is None


def test_a_plan_is_json(folder: Path) -> None:
    planned = anyio.run(lambda: plan(folder, **WHOLE))
    found = json.loads(json.dumps(planned.as_dict()))
    assert found["predicted"]["peak_nbytes"] <= sum(planned.ledger.values()) <= planned.memory
    assert {speed["requests"] for speed in found["predicted"]["speeds"]} == {1, 16}
    assert [first["prompt_tokens"] for first in found["predicted"]["first_tokens"]] == [32, 127]
