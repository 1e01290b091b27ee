"""Stores keep the contract: every strategy, on every disk, for a while and for good; and whatever order things happen in."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aollm import RuntimeConfig
from aollm.disk.base import Disk
from aollm.disk.memory import MemoryDisk
from aollm.disk.portable import PortableDisk
from aollm.disk.threads import ThreadsDisk
from aollm.disk.uring import UringDisk, probe
from aollm.errors import DiskError
from aollm.kv import cache_state
from aollm.maths.attention import BLOCK
from aollm.port import Port
from aollm.stores.cache import Cache
from aollm.stores.contract import LEAST, Case, Subject, cases
from aollm.stores.identity import Identity
from aollm.stores.lifecycle import Lifecycle, RuntimeScoped
from aollm.stores.persistent import Persistent
from aollm.stores.pool import BlockPool
from aollm.stores.presets import PRESETS
from aollm.stores.record import record_nbytes
from aollm.stores.records import Records
from aollm.stores.residency import SpillPolicy
from aollm.stores.scratch import Scratch
from aollm.stores.shape import Shape
from aollm.stores.trial import Trial, tokens_of
from aollm.stores.volume import Volume
from aollm.trace import Trace

pytestmark = pytest.mark.anyio

LAYERS, HEADS, DIM, WINDOW, SEQUENCES = 2, 1, 2, 1500, 8
DISKS: dict[str, Callable[[Port], Disk]] = {
    "threads": ThreadsDisk,
    "uring": UringDisk,
    "portable": lambda port: PortableDisk(),
    "memory": lambda port: MemoryDisk(),
}
ON_DISK = [name for name, preset in PRESETS.items() if preset.layout is not None]
NO_URING = pytest.mark.skipif(probe() is not None, reason=f"{probe()}")
on_disks = pytest.mark.parametrize(
    ("anyio_backend", "disk"),
    [
        *(pytest.param("asyncio", name, marks=NO_URING if name == "uring" else ()) for name in DISKS),
        ("trio", "threads"),
        ("trio", "memory"),  # the other disks are tried on trio by their own tests
    ],
    scope="module",
)


def open_cache(path: Path, name: str, persistent: bool, disk: Disk, tokens: int, dtype: torch.dtype = torch.float32) -> Cache:
    """A cache as a runtime makes it; `tokens` tokens of memory."""
    preset, window = PRESETS[name], WINDOW if PRESETS[name].windowed else None
    shape = Shape(LAYERS, HEADS, DIM, dtype)
    pool = BlockPool(tokens, SEQUENCES, 1 << 17, shape)
    if preset.layout is None:
        return Cache(pool, None, preset.residency, RuntimeScoped(), SpillPolicy("none", 1, 1, 1.0, 32, 0))
    record = record_nbytes(preset.codec.payload_nbytes(BLOCK, shape.row_nbytes, dtype.itemsize))
    layout, lifecycle = preset.layout(record, window), RuntimeScoped()
    where: Volume | Scratch
    if persistent:
        identity = Identity({"codec": preset.codec.representation or "raw", "window": str(window)})
        where = Volume.open(path, identity, preset.persistence_format, BLOCK, LAYERS)
        for node in where.index.nodes():
            for place in node.places:
                layout.restore(type(place.extent)(Path(place.extent.file).name, place.extent.offset, place.extent.nbytes))
    else:
        where = Scratch.open(path)
    records = Records(disk, where, layout, preset.codec, shape, Trace())
    kept: Lifecycle = Persistent(where, records) if isinstance(where, Volume) else lifecycle
    return Cache(pool, records, preset.residency, kept, SpillPolicy("test", 2, 4 * record, 1.0, 32, 0), window, 6 * record, 2 * record)


def contents(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file()}


async def keep_contract(path: Path, name: str, persistent: bool, disk: str, case: Case) -> None:
    async with Port() as port:
        made = DISKS[disk](port)

        async def open(tokens: int) -> Cache:
            memory = tokens if PRESETS[name].layout is None else LEAST
            return await anyio.to_thread.run_sync(open_cache, path, name, persistent, made, memory)

        try:
            await case(Subject(open, durable=persistent and disk != "memory"))
        finally:
            with anyio.CancelScope(shield=True):
                await made.aclose()
        if isinstance(made, MemoryDisk) and not persistent:
            assert not made.files, "files that nobody let go of"
    if not persistent:
        assert contents(path) == set()


def of_kind(name: str, persistent: bool) -> list[Case]:
    return cases(PRESETS[name].layout is not None, PRESETS[name].windowed, persistent)


@pytest.mark.parametrize("case", of_kind("resident", False), ids=lambda case: str(case.__name__))
async def test_resident_stores_keep_the_contract(case: Case, tmp_path: Path) -> None:
    await keep_contract(tmp_path, "resident", False, "memory", case)


@pytest.mark.parametrize("name", ON_DISK)
@pytest.mark.parametrize("persistent", [False, True], ids=["scoped", "persistent"])
@on_disks
async def test_stores_on_disk_keep_the_contract(name: str, persistent: bool, disk: str, tmp_path: Path) -> None:
    for case in of_kind(name, persistent):
        await keep_contract(tmp_path / case.__name__, name, persistent, disk, case)


@pytest.mark.parametrize("cut", [2048, 1500, 1024, 300])
async def test_what_is_cut_off_while_it_is_written_is_not_stored_under_other_names(cut: int, tmp_path: Path) -> None:
    """A block that waits to be written is cut into; the store goes on with other tokens, and others look for both."""
    disk = MemoryDisk(delay_s=0.02)
    async with Trial(open_cache(tmp_path, "paged", True, disk, 4 * LEAST)) as trial:
        first, ids = await trial.begin(6000), tokens_of(3500, 0)
        await trial.extend((first, ids))
        twin = await trial.fork(first, 6000)
        for layer in range(LAYERS):
            assert trial.cache.writer is not None
            trial.cache.writer.settle(first.store, layer, everything=True)
        await trial.truncate(first, cut)
        other = tokens_of(3500 - cut, 1)
        await trial.extend((first, other))
        await trial.close(first)
        await trial.cache.flush()
        for asked in (ids, [*ids[:cut], *other]):
            await trial.find(asked, 4000)
            await trial.check()
        await trial.close(twin)


async def test_a_persistent_store_ends_whole_when_the_runtime_closes_meanwhile(tmp_path: Path) -> None:
    """Whenever the writer is stopped, what it had in hand is stored or given back."""
    ids = tokens_of(2100, 0)
    for number in range(12):
        path, disk = tmp_path / str(number), MemoryDisk(delay_s=0.002)
        async with Trial(open_cache(path, "paged", True, disk, 2 * LEAST)) as trial:
            pair = await trial.begin(3000)
            await trial.extend((pair, ids))
            await trial.close(pair)
            await anyio.sleep(0.001 * number)
            assert isinstance(where := trial.cache.records and trial.cache.records.volume, Volume)
        assert where.index.tokens == 2100


@pytest.mark.parametrize(("name", "leaves"), [("paged", False), ("paged", True), ("quantized-cold-tier", True)])
async def test_a_last_block_is_copied_by_the_compute_thread_wherever_it_is_by_then(name: str, leaves: bool, tmp_path: Path) -> None:
    """A store is cut off in a block that is on disk too; its copy in memory may go just before the rows are copied."""
    async with Trial(open_cache(tmp_path, name, False, MemoryDisk(), 4 * LEAST)) as trial:
        pair, cache, calls = await trial.begin(LEAST), trial.cache, 0

        async def compute(function: Callable[..., Any], *args: Any) -> Any:
            nonlocal calls
            calls += 1
            while leaves and cache.memory.evict_one():
                pass
            return await anyio.to_thread.run_sync(function, *args)

        cache.compute = compute
        await trial.extend((pair, tokens_of(2500, 0)))
        await trial.cache.flush()
        await trial.truncate(pair, 1500)
        assert calls == LAYERS + leaves  # all layers lost their blocks at once
        await trial.check()


def counts(cache: Cache, name: str) -> tuple[int, int, int]:
    """Layers, tokens and records that are on disk, as users are told."""
    fields = {"kv_cache_strategy": name, "kv_cache_window_tokens": WINDOW if PRESETS[name].windowed else None}
    state = cache_state(RuntimeConfig.of("demo", fields), cache)
    assert state["persisted_bytes"] == (cache.records.layout.nbytes if cache.records is not None else 0)
    return state["persisted_layer_count"], state["persisted_tokens"], state["persisted_artifact_count"]


@pytest.mark.parametrize("name", ON_DISK)
async def test_what_is_stored_for_good_is_counted_by_the_next_who_opens_it(name: str, tmp_path: Path) -> None:
    async with Port() as port:
        disk, ids = ThreadsDisk(port), tokens_of(2100, 0)
        async with Trial(open_cache(tmp_path, name, True, disk, 2 * LEAST)) as trial:
            assert counts(trial.cache, name) == (0, 0, 0)
            pair = await trial.begin(3000)
            await trial.extend((pair, ids))
            await trial.cache.flush()
            assert counts(trial.cache, name) == (LAYERS, 2048, 2 * LAYERS)
            await trial.close(pair)
        for _ in range(2):
            async with Trial(open_cache(tmp_path, name, True, disk, 2 * LEAST)) as trial:
                assert counts(trial.cache, name) == (LAYERS, 2100, 3 * LAYERS)
                await trial.find(ids, 3000)  # what a sequence shares is not counted twice
                assert counts(trial.cache, name) == (LAYERS, 2100, 3 * LAYERS)
        await disk.aclose()


@pytest.mark.parametrize("name", ON_DISK)
async def test_what_is_stored_for_a_while_is_counted_while_it_is(name: str, tmp_path: Path) -> None:
    async with Trial(open_cache(tmp_path, name, False, MemoryDisk(), 2 * LEAST)) as trial:
        pair = await trial.begin(3000)
        await trial.extend((pair, tokens_of(2100, 0)))
        await trial.cache.flush()
        assert counts(trial.cache, name) == (LAYERS, 2048, 2 * LAYERS)
        await trial.close(pair)
        assert counts(trial.cache, name) == (0, 0, 0)


async def test_a_last_block_that_could_not_be_stored_is_told_of(tmp_path: Path) -> None:
    """Nobody waits for it, so nobody is told by an error."""
    disk, config = (
        MemoryDisk(fail_write=lambda extent: DiskError("the drive is gone")),
        RuntimeConfig.of("demo", {"kv_cache_strategy": "paged"}),
    )
    async with Trial(open_cache(tmp_path, "paged", True, disk, LEAST)) as trial:
        pair = await trial.begin(1000)
        await trial.extend((pair, tokens_of(100, 0)))
        assert cache_state(config, trial.cache)["trouble"] is None
        await trial.close(pair)
        assert trial.cache.writer is not None
        while not trial.cache.writer.idle:
            await trial.cache.writer.progress()
        assert cache_state(config, trial.cache)["trouble"] == "the drive is gone"
    async with Trial(open_cache(tmp_path, "resident", False, disk, LEAST)) as trial:
        assert cache_state(config, trial.cache)["trouble"] is None


which = st.integers(0, 9)
seeds = st.integers(0, 2)
operations = st.one_of(
    st.tuples(st.just("append"), which, st.sampled_from([1, 31, 200, 1023, 1024, 1500]), seeds),
    st.tuples(st.just("cut"), which, st.sampled_from([0, 1, 1023, 1024, 1025, 2000, 2048, 4000])),
    st.tuples(st.sampled_from(["fork", "close", "settle"]), which),
    st.tuples(st.sampled_from(["find", "begin"]), seeds),
    st.tuples(st.sampled_from(["flush", "check", "reopen"])),
)


@pytest.mark.parametrize("persistent", [False, True], ids=["scoped", "persistent"])
@settings(deadline=None, max_examples=25)
@given(name=st.sampled_from(list(PRESETS)), story=st.lists(operations, min_size=4, max_size=16))
async def test_stores_do_what_tensors_would_whatever_happens(persistent: bool, name: str, story: list[tuple[Any, ...]]) -> None:
    """Several stores in memory for four blocks, written slowly; parts end where the story opens the cache again."""
    persistent = persistent and PRESETS[name].layout is not None
    texts = [tokens_of(1 << 14, seed) for seed in range(3)]
    memory = LEAST if PRESETS[name].layout is not None else 16 * LEAST
    async with Port() as port:
        with TemporaryDirectory() as folder:
            disk = ThreadsDisk(port) if persistent else MemoryDisk(delay_s=0.001)
            parts = [*story, ("reopen",)]
            while parts:
                end = parts.index(("reopen",))
                async with Trial(await anyio.to_thread.run_sync(open_cache, Path(folder), name, persistent, disk, memory)) as trial:
                    for verb, *words in parts[:end]:
                        await do(trial, texts, verb, *words)
                    await trial.check()
                parts = parts[end + 1 :]
            await disk.aclose()


async def do(trial: Trial, texts: list[list[int]], verb: str, number: int = 0, count: int = 0, seed: int = 0) -> None:
    """One operation on the store that `number` picks; nothing if there are too many stores already, or none."""
    pair = trial.pairs[number % len(trial.pairs)] if trial.pairs else None
    if verb in ("begin", "find", "fork") and len(trial.pairs) == 3:
        return
    if verb == "flush":
        await trial.cache.flush()
    elif verb == "check":
        await trial.check()
    elif verb == "begin":
        await trial.begin(LEAST)
    elif verb == "find":
        await trial.find(texts[number][:3000], LEAST)
    elif pair is None:
        return
    elif verb == "append":
        at = len(pair.ids)
        if at + count <= LEAST:
            await trial.extend((pair, texts[seed][at : at + count]))
    elif verb == "cut":
        await trial.truncate(pair, count)
    elif verb == "fork":
        await trial.fork(pair, LEAST)
    elif verb == "close":
        await trial.close(pair)
    elif verb == "settle" and trial.cache.writer is not None:
        for layer in range(LAYERS):
            trial.cache.writer.settle(pair.store, layer, everything=True)
