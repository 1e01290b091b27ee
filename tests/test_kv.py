"""Keys and values on disk: the answers of a resident cache, in any layout, through any disk, with whatever memory there is."""

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import tiny
import torch
from anyio.from_thread import start_blocking_portal
from tokenizers import Tokenizer

from aollm import AollmError, DiskError, MemoryDisk, Runtime, StoreError, Token
from aollm.demo import MODEL
from aollm.disk.base import Extent
from aollm.maths.attention import BLOCK
from aollm.sampling import Draw, Sampler
from aollm.stores.cell import Run

pytestmark = [pytest.mark.anyio]
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")

LAYERS = 2
TOKEN = LAYERS * 2 * 2 * 16 * 4  # bytes of keys and values: 2 heads of 16 float32
CHUNK = 64
LONG = 3300
LEAST = 1600
"""Tokens of memory that a last block and a pass of one chunk need."""
WINDOWED = "sliding-window-ring-buffer"
EXACT = ["chunked", "paged", "streamed-segmented", "log-structured-journal", WINDOWED, "tiered-write-back"]
SHARES = {"all": 8192, "half": 2000, "least": LEAST}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, max_position_embeddings=8192)


def opened(folder: Path, cache: Path, strategy: str = "paged", tokens: int = LEAST, **fields: Any) -> Runtime:
    """A runtime whose keys and values may have `tokens` tokens of memory; all compute in chunks of one size."""
    window = {"kv_cache_window_tokens": 8192} if strategy == WINDOWED else {}
    fields = {"dense_projection_chunk_rows": CHUNK, "max_concurrent_requests": 4, **window, **fields}
    return Runtime.open(folder, kv_cache_strategy=strategy, kv_cache_memory=tokens * TOKEN, cache_dir=cache, **fields)


@pytest.fixture(scope="session")
def wanted(folder: Path) -> dict[int, tiny.Answer]:
    """What a resident cache says of the prompt with each seed."""

    async def ask() -> dict[int, tiny.Answer]:
        async with opened(folder, folder, "resident", 8192, max_concurrent_requests=1) as runtime:
            return {seed: await tiny.ours(runtime, tiny.prompt(LONG + 300 * seed, seed)) for seed in range(4)}

    with start_blocking_portal() as portal:
        return portal.call(ask)


async def ids_of(runtime: Runtime, prompt: Any, count: int = tiny.COUNT, **fields: Any) -> list[int]:
    return [token.id async for token in runtime.stream(prompt, max_new_tokens=count, **fields)]


async def until(holds: Callable[[], bool]) -> None:
    with anyio.fail_after(30):
        while not holds():  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)


async def settled(runtime: Runtime) -> None:
    """Wait until nobody rides, and check that then nothing is held."""
    pool = runtime.cache.pool
    await until(lambda: not (runtime.engine.riders or runtime.engine.waiting or pool.reserved or pool.all_rows))


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@dataclass
class Watch:
    """The most rows that were ever in memory, and the blocks that were read, as (layer, index) in order."""

    runtime: Runtime
    most: int = 0
    read: list[tuple[int, int]] = field(default_factory=list)

    def __enter__(self) -> "Watch":
        pool, records = self.runtime.cache.pool, self.runtime.cache.records
        assert records is not None
        fill, read = pool.fill, records.read

        def filled(layer: int, rows: int) -> None:
            fill(layer, rows)
            self.most = max(self.most, pool.all_rows)

        async def noted(run: Run, buffer: memoryview) -> Any:
            self.read += [(cell.layer, cell.index) for cell in run.cells]
            return await read(run, buffer)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(pool, "fill", filled)
        self._patch.setattr(records, "read", noted)
        return self

    def __exit__(self, *raised: object) -> None:
        self._patch.undo()
        assert 0 < self.most <= self.runtime.cache.pool.tokens * self.runtime.cache.pool.layers


def same(found: tiny.Answer, wanted: tiny.Answer) -> None:
    assert found.ids == wanted.ids
    assert torch.equal(found.logprobs, wanted.logprobs)


def near(found: tiny.Answer, wanted: tiny.Answer) -> None:
    """In company rows are multiplied with others beside them, which may change their last bits."""
    assert found.ids == wanted.ids
    assert torch.allclose(found.logprobs, wanted.logprobs, atol=1e-4)


# The matrix


@ONE_LOOP
@pytest.mark.parametrize("backend", ["threads", "uring", "portable", "memory"])
@pytest.mark.parametrize("strategy", EXACT)
async def test_every_logit_is_that_of_a_resident_cache(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], strategy: str, backend: str
) -> None:
    depths = [1, 2, 8]
    for number, (share, tokens) in enumerate(SHARES.items()):
        depth = depths[(number + len(strategy) + len(backend)) % 3]
        how: dict[str, Any] = {"disk": MemoryDisk.of(folder)} if backend == "memory" else {"disk_backend": backend}
        async with opened(folder, tmp_path, strategy, tokens, prefetch_depth=depth, **how) as runtime:
            with Watch(runtime) as watch:
                same(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])
            assert bool(watch.read) == (share != "all")
            await settled(runtime)
    assert not files_in(tmp_path)


@ONE_LOOP
@pytest.mark.parametrize("depth", [1, 2, 8])
@pytest.mark.parametrize("share", ["half", "least"])
async def test_every_depth_with_every_share(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], share: str, depth: int
) -> None:  # fmt: skip
    async with opened(folder, tmp_path, "paged", SHARES[share], prefetch_depth=depth, offload_cpu_layers=0) as runtime:
        with Watch(runtime):
            same(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])
    assert not files_in(tmp_path)


async def test_what_is_read_for_a_token_is_what_is_not_in_memory(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path, "paged", LEAST, max_concurrent_requests=1) as runtime:
        with Watch(runtime) as watch:
            async with runtime.stream(tiny.prompt(5 * BLOCK + 20), max_new_tokens=12) as stream:
                await anext(stream)
                assert stream.request is not None
                for _ in range(3):
                    await anext(stream)
                store = stream.request.answers[0].store
                assert store is not None
                cells = [cell for layer in range(LAYERS) for cell in store.cells(layer)]
                cold = [cell for cell in cells if cell.slot is None]
                passes, read = runtime.engine.passes, len(watch.read)
                async for _ in stream:
                    pass
                passes = runtime.engine.passes - passes
        assert passes >= 6 and len(cold) >= 4 * LAYERS
        assert len(watch.read) - read <= 1.05 * len(cold) * (passes + 2)
        loads = [event for event in runtime.trace.between(0, float("inf")) if event.name == "kvload"]
        payload = BLOCK * TOKEN // LAYERS
        assert payload * len(watch.read) <= sum(event.nbytes for event in loads) <= 1.05 * payload * len(watch.read)


async def test_an_answer_tells_where_its_keys_and_values_were_when_it_ended(folder: Path, tmp_path: Path) -> None:
    async with opened(folder, tmp_path, "paged", LEAST, max_concurrent_requests=1) as runtime:
        state = (await runtime.generate(tiny.prompt(5 * BLOCK + 20), max_new_tokens=12)).cache_state
        assert state["persisted_tokens"] >= 4 * BLOCK and state["resident_tokens"] and state["persisted_layer_count"] == LAYERS
        assert (state["kv_cache_strategy"], state["cache_mode"]) == ("paged", "disk-kv")
        assert state["prefix_hit_tokens"] == 0 and "runtime-scoped" in state["prefix_miss_reason"]
        assert runtime.cache_state()["resident_tokens"] == 0  # and now it is over


# Company


@ONE_LOOP
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back"])
async def test_many_at_once_get_what_each_gets_alone(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], strategy: str
) -> None:  # fmt: skip
    async with opened(folder, tmp_path, strategy, 4400) as runtime:

        async def ride(seed: int) -> None:
            near(await tiny.ours(runtime, tiny.prompt(LONG + 300 * seed, seed)), wanted[seed])

        async def leave(seed: int) -> None:
            async with runtime.stream(tiny.prompt(3000, 20 + seed), max_new_tokens=50):
                await anyio.sleep(0.2 * seed)

        with Watch(runtime):
            async with anyio.create_task_group() as group:
                for seed in range(4):
                    group.start_soon(ride, seed)
                    group.start_soon(leave, seed)
        await settled(runtime)
    assert not files_in(tmp_path)


@ONE_LOOP
async def test_who_joins_in_the_middle_changes_nothing(folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer]) -> None:
    async with opened(folder, tmp_path, "log-structured-journal", 3000) as runtime:
        alone = await ids_of(runtime, tiny.prompt(LONG), 30)
        assert alone[: tiny.COUNT] == wanted[0].ids
        found: list[int] = []
        async with anyio.create_task_group() as group:
            async for token in runtime.stream(tiny.prompt(LONG), max_new_tokens=30):
                found.append(token.id)
                if token.index == 5:
                    group.start_soon(ids_of, runtime, tiny.prompt(2500, 9))
        assert found == alone
        await settled(runtime)


async def test_answers_to_one_prompt_share_what_is_cold(folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer]) -> None:
    sampling: dict[str, Any] = {"n": 3, "temperature": 1.0, "seed": 4, "max_new_tokens": 8}
    async with opened(folder, tmp_path, "resident", 16_384) as runtime:
        expected = (await runtime.generate(tiny.prompt(LONG), **sampling)).choices
    async with opened(folder, tmp_path, "paged", 3300) as runtime:
        with Watch(runtime):
            answer = await runtime.generate(tiny.prompt(LONG), n=3, max_new_tokens=tiny.COUNT)
            assert [list(choice.token_ids) for choice in answer.choices] == [wanted[0].ids] * 3
            start = runtime.engine.passes
            with Watch(runtime) as watch:
                drawn = (await runtime.generate(tiny.prompt(LONG), **sampling)).choices
        assert [choice.token_ids for choice in drawn] == [choice.token_ids for choice in expected]
        assert len(watch.read) <= LAYERS * (LONG // BLOCK) * (runtime.engine.passes - start)  # once for all of them
        await settled(runtime)


@ONE_LOOP
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back"])
async def test_leaving_at_any_moment_leaves_nothing_behind(folder: Path, tmp_path: Path, strategy: str) -> None:
    async with opened(folder, tmp_path, strategy, LEAST) as runtime:
        wanted = await ids_of(runtime, tiny.prompt(2200), 4)
        for step in range(14):
            with anyio.move_on_after(0.05 * step):
                await ids_of(runtime, tiny.prompt(2200 + 7 * step, step), 40)
            await settled(runtime)
        assert await ids_of(runtime, tiny.prompt(2200), 4) == wanted
        async with runtime.stream(tiny.prompt(2200), max_new_tokens=400) as stream:
            await anext(stream)
    assert not files_in(tmp_path)


# Windows


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Path]:
    made: dict[int | None, Path] = {}

    def get(window: int | None) -> Path:
        """The same weights, whatever the window."""
        if window not in made:
            options: dict[str, Any] = {"num_hidden_layers": LAYERS, "max_position_embeddings": 32_768, "sliding_window": window}
            made[window] = tiny.save(tmp_path_factory.mktemp("mistral"), "mistral", **options)
        return made[window]

    return get


@ONE_LOOP
@pytest.mark.parametrize("window", [100, 1500, 2048])
async def test_a_ring_answers_as_transformers_does_with_that_window(
    mistral: Callable[[int | None], Path], tmp_path: Path, window: int
) -> None:  # fmt: skip
    ids = tiny.prompt(2600)
    theirs = await anyio.to_thread.run_sync(lambda: tiny.answer(tiny.load(mistral(window)), ids))
    for tokens in (4000, LEAST):
        async with opened(mistral(None), tmp_path, WINDOWED, tokens, kv_cache_window_tokens=window) as runtime:
            ours = await tiny.ours(runtime, ids)
            assert float((ours.logprobs[0] - theirs.logprobs[0]).abs().max()) <= 1e-4 * theirs.most
            assert ours.ids == theirs.ids
            await settled(runtime)


@ONE_LOOP
async def test_a_window_of_any_length_takes_the_same_room(mistral: Callable[[int | None], Path], tmp_path: Path) -> None:
    window, most = 1000, 0
    async with opened(mistral(None), tmp_path, WINDOWED, 2000, kv_cache_window_tokens=window, max_concurrent_requests=1) as runtime:
        records = runtime.cache.records
        assert records is not None

        async def look() -> None:
            nonlocal most
            while True:
                most = max(most, sum(path.stat().st_size for path in files_in(tmp_path)))
                await anyio.sleep(0.02)

        with Watch(runtime):
            async with anyio.create_task_group() as group:
                group.start_soon(look)
                await ids_of(runtime, tiny.prompt(20 * window), 3)
                group.cancel_scope.cancel()
        assert 0 < most <= (-(-window // BLOCK) + 3) * LAYERS * records.record_nbytes + 4096
        assert runtime.cache_state()["evicted_tokens"] >= 18 * window
        await settled(runtime)


@ONE_LOOP
async def test_what_a_models_own_window_has_passed_is_never_read(mistral: Callable[[int | None], Path], tmp_path: Path) -> None:
    window, prompt = 1500, tiny.prompt(4 * BLOCK)
    async with opened(mistral(window), tmp_path, "resident", 8192) as runtime:
        expected = await tiny.ours(runtime, prompt)
    async with opened(mistral(window), tmp_path, "paged", LEAST, max_concurrent_requests=1) as runtime:
        with Watch(runtime) as watch:
            async with runtime.stream(prompt, max_new_tokens=8) as stream:
                await anext(stream)
                read = len(watch.read)
                async for _ in stream:
                    pass
            assert {2} <= {index for _, index in watch.read[read:]} <= {2, 3}
            same(await tiny.ours(runtime, prompt), expected)


# What fails


def kv_only(cache: Path, error: Callable[[Extent], Exception | None]) -> Callable[[Extent], Exception | None]:
    return lambda extent: error(extent) if extent.file.startswith(str(cache)) else None


@pytest.mark.parametrize("when", [0, 3, 40])
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back", WINDOWED])
async def test_a_read_that_fails_once_is_computed_again(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], strategy: str, when: int
) -> None:
    disk, reads = MemoryDisk.of(folder), 0

    def fails(extent: Extent) -> Exception | None:
        nonlocal reads
        reads += 1
        return DiskError("a bad sector") if reads == when + 1 else None

    async with opened(folder, tmp_path, strategy, LEAST, disk=disk) as runtime:
        disk.fail = kv_only(tmp_path, fails)
        near(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])
        assert reads > when and runtime.cache_state()["misses_unreadable"] >= 1
        await settled(runtime)


@pytest.mark.parametrize("lap", [1, 2])
async def test_a_block_that_was_altered_is_computed_again(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], lap: int
) -> None:  # fmt: skip
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", LEAST, disk=disk, max_concurrent_requests=1) as runtime:
        found: list[int] = []
        async with runtime.stream(tiny.prompt(LONG), max_new_tokens=tiny.COUNT) as stream:
            async for token in stream:
                found.append(token.id)
                if token.index == lap:
                    for name in [name for name in disk.files if name.startswith(str(tmp_path))]:
                        disk.files[name][6000] ^= 1
        assert found == wanted[0].ids
        assert runtime.cache_state()["misses_corrupt"] >= 1
        await settled(runtime)


async def test_a_drive_that_never_reads_is_an_error(folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer]) -> None:
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", LEAST, disk=disk) as runtime:
        disk.fail = kv_only(tmp_path, lambda extent: DiskError("a bad sector"))
        with pytest.raises(StoreError, match="bad sector"), anyio.fail_after(60):
            await ids_of(runtime, tiny.prompt(LONG))
        await settled(runtime)
        assert await ids_of(runtime, tiny.prompt(200), 2)
        disk.fail = None
        near(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])


@ONE_LOOP
@pytest.mark.parametrize("strategy", ["paged", "tiered-write-back"])
async def test_a_full_drive_ends_who_needs_it_and_nobody_later(
    folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer], strategy: str
) -> None:  # fmt: skip
    disk = MemoryDisk.of(folder)
    full = DiskError(os.strerror(errno.ENOSPC))
    async with opened(folder, tmp_path, strategy, LEAST, disk=disk) as runtime:
        for _ in range(2):
            disk.fail_write = kv_only(tmp_path, lambda extent: full)
            with pytest.raises(AollmError, match=os.strerror(errno.ENOSPC)), anyio.fail_after(30):
                await ids_of(runtime, tiny.prompt(LONG))
            await settled(runtime)
            assert await ids_of(runtime, tiny.prompt(200), 2)  # it fits into memory
            disk.fail_write = None
            near(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])
            await settled(runtime)


async def test_a_full_drive_is_no_matter_while_memory_is_enough(folder: Path, tmp_path: Path, wanted: dict[int, tiny.Answer]) -> None:
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", 8192, disk=disk) as runtime:
        disk.fail_write = kv_only(tmp_path, lambda extent: DiskError(os.strerror(errno.ENOSPC)))
        same(await tiny.ours(runtime, tiny.prompt(LONG)), wanted[0])
        await settled(runtime)


# Quantized


class Given(Sampler):
    """Draws the tokens that it was given, and says how likely each was."""

    text: list[int] = []

    def draw(self, logits: torch.Tensor, history: Any) -> Draw:
        token = self.text[len(history)]
        return Draw(token, float(logits.float().log_softmax(-1)[token]), ())


@ONE_LOOP
async def test_int8_takes_half_the_room_and_hardly_a_worse_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    prompt, count, layers = 3 * BLOCK + 20, 300, 6
    text = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode((MODEL / "heldout.txt").read_text()).ids
    assert len(text) > prompt + count
    monkeypatch.setattr(Given, "text", text)
    monkeypatch.setattr("aollm.runtime.Sampler", Given)
    loss: dict[str, float] = {}
    nbytes: dict[str, int] = {}
    for strategy in ("resident", "quantized-cold-tier"):
        memory = 5000 if strategy == "resident" else 1400
        async with Runtime.open(
            "demo", max_context_tokens=5000, kv_cache_strategy=strategy, kv_cache_memory=memory * 1536, cache_dir=tmp_path,
            max_concurrent_requests=1,
        ) as runtime:  # fmt: skip
            monkeypatch.setattr(runtime.text, "stop_ids", frozenset())
            tokens: list[Token] = [token async for token in runtime.stream(text[:prompt], max_new_tokens=count)]
            asked = text[prompt : prompt + len(tokens)]
            assert len(tokens) == count and [token.id for token in tokens] == asked
            loss[strategy] = -sum(token.logprob for token in tokens) / len(tokens)
            saves = [event for event in runtime.trace.between(0, float("inf")) if event.name == "kvsave"]
            nbytes[strategy] = sum(event.nbytes for event in saves)
            if strategy != "resident":
                assert runtime.cache.records is not None
                blocks = layers * ((prompt + len(tokens)) // BLOCK)
                assert layers * (prompt // BLOCK) * runtime.cache.records.record_nbytes <= nbytes[strategy]
                assert nbytes[strategy] <= blocks * runtime.cache.records.record_nbytes  # each is written once
    assert loss["quantized-cold-tier"] != loss["resident"]  # codes were read
    assert abs(loss["quantized-cold-tier"] - loss["resident"]) <= 0.01  # of the logarithm: a percent
    assert nbytes["quantized-cold-tier"] <= 0.55 * 3 * BLOCK * 1536


async def test_threads_end_with_the_runtime(folder: Path, tmp_path: Path) -> None:
    before = {thread.name for thread in threading.enumerate() if "aollm" in thread.name}
    async with opened(folder, tmp_path, "paged", LEAST) as runtime:
        await ids_of(runtime, tiny.prompt(2200), 2)
    assert {thread.name for thread in threading.enumerate() if "aollm" in thread.name} <= before
