"""Adaptation: what is recommended, and a cache that moves between requests while its conversations go on with the same tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
from anyio.from_thread import start_blocking_portal

from aollm import DiskError, MemoryDisk, RequestError, Runtime
from aollm.adaptation import QUIET, STALLED, WAITS, Adaptation, Rule, Signals, recommend
from aollm.maths.attention import BLOCK
from aollm.session import Session
from aollm.stores.presets import PRESETS

LAYERS = 2
TOKEN = LAYERS * 2 * 2 * 16 * 4  # bytes of keys and values: 2 heads of 16 float32
FIRST, MORE = 2060, 20
"""Tokens of a conversation's first turn, and of each further one."""
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
anyio_test = pytest.mark.anyio

MEMORY = Signals("resident", "balanced", False, kv_tokens=1000)
DISK = replace(MEMORY, strategy="paged")


@pytest.mark.parametrize(
    ("signals", "rule", "strategy"),
    [
        (MEMORY, None, None),
        (replace(MEMORY, served=1000, most_tokens=5000), None, None),
        (replace(MEMORY, waited=WAITS - 1), None, None),
        (replace(MEMORY, waited=WAITS), "memory.crowded", "paged"),
        (replace(MEMORY, refused=1), "memory.crowded", "paged"),
        (replace(MEMORY, displaced=1), "memory.crowded", "paged"),
        (replace(MEMORY, refused=1, profile="latency"), "memory.crowded", "paged"),
        (replace(MEMORY, refused=1, profile="capacity"), "memory.crowded.capacity", "quantized-cold-tier"),
        (DISK, None, None),
        (replace(DISK, waited=10, refused=10, displaced=10), None, None),
        (replace(DISK, trouble="full"), "disk.trouble", "resident"),
        (replace(DISK, trouble="full", most_tokens=1000), "disk.trouble", "resident"),
        (replace(DISK, trouble="full", most_tokens=1001), None, None),
        (replace(DISK, trouble="full", persistent=True), None, None),
        (replace(DISK, misses=2), None, None),
        (replace(DISK, misses=3), "disk.lost", "resident"),
        (replace(DISK, misses=3, most_tokens=1001), None, None),
        (replace(DISK, served=QUIET - 1), None, None),
        (replace(DISK, served=QUIET, most_tokens=500), "disk.unused", "resident"),
        (replace(DISK, served=QUIET, most_tokens=501), None, None),
        (replace(DISK, served=QUIET, dropped_blocks=1), None, None),
        (replace(DISK, served=QUIET, persistent=True), None, None),
        (replace(DISK, served=QUIET, strategy="tiered-write-back"), "disk.unused", "resident"),
        (replace(DISK, served=QUIET, strategy="quantized-cold-tier", profile="capacity"), "disk.unused", "resident"),
        (replace(DISK, stall_share=STALLED + 0.01), None, None),
        (replace(DISK, stall_share=STALLED + 0.01, profile="capacity"), "disk.stalled", "quantized-cold-tier"),
        (replace(DISK, stall_share=STALLED, profile="capacity"), None, None),
        (replace(DISK, stall_share=0.9, profile="capacity", strategy="quantized-cold-tier"), None, None),
        (replace(DISK, trouble="full", served=QUIET, strategy="sliding-window-ring-buffer"), None, None),
        (replace(MEMORY, refused=1, strategy="sliding-window-ring-buffer"), None, None),
    ],
)
def test_signals_speak_for_a_strategy(signals: Signals, rule: str | None, strategy: str | None) -> None:
    found = recommend(signals)
    assert (found and found.rule, found and found.strategy) == (rule, strategy)
    assert found == recommend(replace(signals)) and (found is None or (found.signals == signals and found.reason))


# ---- in a runtime


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, max_position_embeddings=8192)


def opened(folder: Path, cache: Path, strategy: str, tokens: int, mode: str = "automatic", **fields: Any) -> Runtime:
    how = {"dense_projection_chunk_rows": 256, "max_concurrent_requests": 4, "prefetch_depth": 1, **fields}
    memory = {"kv_cache_memory": tokens * TOKEN, "cache_dir": cache, "max_context_tokens": 8192}
    return Runtime.open(folder, kv_cache_strategy=strategy, kv_cache_adaptation_mode=mode, **{**memory, **how})


@dataclass
class Talk:
    """A conversation in token ids: each turn's prompt is all that was said."""

    runtime: Runtime
    seed: int = 0
    session: Session = field(init=False)
    said: list[int] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = self.runtime.session()

    async def turn(self, count: int = 8) -> int:
        """Ask and hear; returns how many tokens of the prompt were computed."""
        self.said += tiny.prompt(MORE if self.said else FIRST, self.seed + 100 * len(self.answers))
        async with self.runtime.stream(self.said, session=self.session, max_new_tokens=count) as stream:
            ids = [token.id async for token in stream]
            assert stream.request is not None
            await stream.ended()
        computed = len(self.said) - stream.request.prefix_hit_tokens
        self.said += ids
        self.answers.append(ids)
        return computed

    def branch(self, seed: int) -> "Talk":
        twin = Talk(self.runtime, seed)
        twin.session, twin.said, twin.answers = self.session.branch(), list(self.said), list(self.answers)
        return twin


@pytest.fixture(scope="session")
def wanted(folder: Path) -> dict[int, list[list[int]]]:
    """What a cache that never moves answers to the conversation of each seed."""

    async def ask() -> dict[int, list[list[int]]]:
        async with opened(folder, folder, "resident", 16_384, "disabled") as runtime:
            talks = {seed: Talk(runtime, seed) for seed in range(2)}
            for talk in talks.values():
                for _ in range(3):
                    await talk.turn()
            return {seed: talk.answers for seed, talk in talks.items()}

    with start_blocking_portal() as portal:
        return portal.call(ask)


def told(runtime: Runtime) -> dict[str, Any]:
    state: dict[str, Any] = runtime.cache_state()["adaptation"]
    return state


async def ask(runtime: Runtime, tokens: int, count: int = 2, seed: int = 7) -> list[int]:
    return [token.id async for token in runtime.stream(tiny.prompt(tokens, seed), max_new_tokens=count)]


async def moved(runtime: Runtime, count: int = 1) -> dict[str, Any]:
    """The latest of `count` moves, once it was made."""
    with anyio.fail_after(20):
        while len(told(runtime)["applied"]) < count:  # noqa: ASYNC110  nothing tells of it
            await anyio.sleep(0.005)
    applied: dict[str, Any] = told(runtime)["applied"][-1]
    return applied


async def push_out(runtime: Runtime, but: int = 0) -> None:
    """Have all whole blocks on disk, and but some of them not in memory."""
    cache = runtime.cache
    assert cache is not None
    await cache.flush()
    cache.memory.pass_by(LAYERS - 1)
    for _ in range(2 * LAYERS - but if cache.records is not None else 0):
        assert cache.memory.evict_one()


def within_the_plan(runtime: Runtime) -> None:
    cache, plan = runtime.cache, runtime.plan
    assert cache is not None and cache.pool.all_rows <= cache.pool.tokens * LAYERS
    ring = cache.ring.arena.nbytes if cache.records is not None else 0
    assert cache.pool.tokens * TOKEN + ring <= plan.kv_tokens * TOKEN + plan.kv_ring_nbytes


def files_in(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


@anyio_test
async def test_memory_that_was_too_little_is_made_more_by_a_disk(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]]) -> None:
    async with opened(folder, tmp_path, "resident", 3600) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        assert told(runtime)["applied"] == [] and not files_in(tmp_path)
        with pytest.raises(RequestError, match="has room for 3600"):
            await ask(runtime, 4000)
        applied = await moved(runtime)
        assert (applied["rule"], applied["source"], applied["strategy"]) == ("memory.crowded", "resident", "paged")
        assert applied["failed"] is None and applied["cut_off_tokens"] == 0
        assert str(tmp_path / "kv_cache_paged") in applied["observed"]
        state = runtime.cache_state()
        assert (state["strategy_id"], state["cache_mode"], state["residency_mode"]) == ("paged", "disk-kv", "buffered-tail")
        plan = runtime.plan
        assert (plan.kv_cache_strategy, plan.cache_mode, plan.passes[-1].id) == ("paged", "disk-kv", "disk-cache")
        assert plan.passes[-1].observed == applied["observed"] and (await runtime.generate([1, 2, 3], max_new_tokens=1)).plan == plan
        assert len(await ask(runtime, 4000)) == 2  # now it fits
        assert await talk.turn() < MORE + 4 and await talk.turn() < MORE + 4  # nothing is computed again
        assert talk.answers == wanted[0]
        assert runtime.cache_state()["spilled_tokens"] >= 2 * BLOCK and files_in(tmp_path)
        within_the_plan(runtime)
        await talk.session.aclose()
        assert not runtime.cache.pool.reserved and not runtime.cache.pool.all_rows
    assert not files_in(tmp_path)


@anyio_test
async def test_a_disk_that_nobody_needs_is_left(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]]) -> None:
    async with opened(folder, tmp_path, "paged", 4500) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        assert runtime.cache is not None
        await runtime.cache.flush()
        assert runtime.cache_state()["persisted_tokens"] == 2 * BLOCK
        for seed in range(QUIET - 1):
            assert told(runtime)["applied"] == []
            await ask(runtime, 20, 1, seed)
        applied = await moved(runtime)
        assert (applied["rule"], applied["strategy"], applied["cut_off_tokens"]) == ("disk.unused", "resident", 0)
        state = runtime.cache_state()
        assert (state["strategy_id"], state["cache_mode"], state["persisted_bytes"]) == ("resident", "resident-kv", 0)
        assert runtime.plan.cache_mode == "resident-kv" and "disk-cache" not in {each.id for each in runtime.plan.passes}
        assert state["spilled_tokens"] == 2 * BLOCK and not files_in(tmp_path)  # what was done is not forgotten
        assert await talk.turn() < MORE + 4 and await talk.turn() < MORE + 4
        assert talk.answers == wanted[0]
        within_the_plan(runtime)
        await talk.session.aclose()
        assert not runtime.cache.pool.reserved and not runtime.cache.pool.all_rows


@anyio_test
@ONE_LOOP
@pytest.mark.parametrize("mode", ["observe-only", "disabled"])
async def test_who_may_not_changes_nothing(folder: Path, tmp_path: Path, mode: str) -> None:
    async with opened(folder, tmp_path, "resident", 2000, mode) as runtime:
        with pytest.raises(RequestError, match="has room for 2000"):
            await ask(runtime, 3000)
        answer = await runtime.generate(tiny.prompt(20), max_new_tokens=2)
        state = answer.cache_state["adaptation"]
        if mode == "disabled":
            assert state is None
        else:
            assert (state["mode"], state["recommendation"], state["rule"]) == (mode, "paged", "memory.crowded")
            assert state["signals"]["refused"] == 1 and state["signals"]["served"] == 1 and state["applied"] == []
        assert runtime.cache_state()["strategy_id"] == "resident" and not files_in(tmp_path)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Has a rule in the place of all others: from one strategy to another, once so many requests were served."""

    def force(source: str, target: str, served: int = 1) -> None:
        rule = Rule("forced", lambda seen: seen.strategy == source and seen.served >= served, target, "for a test")
        monkeypatch.setattr("aollm.adaptation.RULES", (rule,))

    yield force


EXACT = [("resident", "tiered-write-back"), ("tiered-write-back", "resident"), ("paged", "resident"), ("paged", "log-structured-journal")]


@anyio_test
@ONE_LOOP
@pytest.mark.parametrize(("source", "target"), EXACT)
async def test_a_history_comes_along_wherever_it_is(
    folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any, source: str, target: str
) -> None:
    """A conversation and its branch, partly pushed out of memory before the move."""
    forced(source, target, 2)
    async with opened(folder, tmp_path, source, 6500) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        twin = talk.branch(0)
        await push_out(runtime, 1)
        assert runtime.cache is not None
        assert talk.session.store is not None and runtime.cache_state()["strategy_id"] == source
        cold = [cell for layer in range(LAYERS) for cell in talk.session.store.cells(layer) if cell.slot is None]
        assert bool(cold) == (source != "resident")
        await ask(runtime, 20)
        applied = await moved(runtime)
        assert applied["failed"] is None and applied["cut_off_tokens"] == 0 and runtime.cache_state()["strategy_id"] == target
        assert not files_in(tmp_path / PRESETS[source].root) if PRESETS[source].root else files_in(tmp_path)
        for _ in range(2):
            assert await talk.turn() < MORE + 4
        for _ in range(2):
            assert await twin.turn() < MORE + 4
        assert talk.answers == twin.answers == wanted[0]
        within_the_plan(runtime)
        await talk.session.aclose()
        await twin.session.aclose()
        assert not runtime.cache.pool.reserved and not runtime.cache.pool.all_rows
    assert not files_in(tmp_path)


@anyio_test
@ONE_LOOP
@pytest.mark.parametrize(("source", "target"), [("quantized-cold-tier", "resident"), ("paged", "quantized-cold-tier")])
async def test_what_was_rounded_is_not_taken_for_exact(
    folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any, source: str, target: str
) -> None:
    forced(source, target, 2)
    async with opened(folder, tmp_path, source, 4200) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        await push_out(runtime)
        await ask(runtime, 20)
        applied = await moved(runtime)
        assert applied["failed"] is None and runtime.cache_state()["strategy_id"] == target
        if target == "resident":
            assert applied["cut_off_tokens"] == FIRST + 7 and await talk.turn() > FIRST  # it is computed again
            await talk.turn()
            assert talk.answers == wanted[0]
        else:
            assert applied["cut_off_tokens"] == 0 and await talk.turn() < MORE + 4
            assert runtime.cache_state()["cold_tier_representation"] == "int8-symmetric-per-tensor"


@anyio_test
@ONE_LOOP
async def test_what_does_not_fit_is_computed_again(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any) -> None:
    forced("paged", "resident", 2)
    async with opened(folder, tmp_path, "paged", 3500) as runtime:
        talks = [Talk(runtime, seed) for seed in range(2)]
        for talk in talks:
            await talk.turn()
        applied = await moved(runtime)
        assert applied["failed"] is None and applied["cut_off_tokens"] == FIRST + 7 - BLOCK
        assert [talk.session.store and talk.session.store.tokens for talk in talks] == [BLOCK, FIRST + 7]
        within_the_plan(runtime)
        assert await talks[1].turn() < MORE + 4
        await talks[1].turn()
        assert await talks[0].turn() > FIRST - BLOCK
        await talks[0].turn()
        assert [talk.answers for talk in talks] == [wanted[0], wanted[1]]


def of_the_cache(cache: Path, error: DiskError | None) -> Any:
    return lambda extent: error if extent.file.startswith(str(cache)) else None


@anyio_test
@ONE_LOOP
async def test_what_cannot_be_read_is_computed_again(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any) -> None:
    forced("paged", "resident", 2)
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", 4200, disk=disk) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        await push_out(runtime, 1)
        disk.fail = of_the_cache(tmp_path, DiskError("a bad sector"))
        await ask(runtime, 20)
        applied = await moved(runtime)
        disk.fail = None
        assert applied["failed"] is None and applied["cut_off_tokens"] >= FIRST - 2 * BLOCK
        assert runtime.cache_state()["misses_unreadable"] >= 1
        assert await talk.turn() > FIRST - 2 * BLOCK
        await talk.turn()
        assert talk.answers == wanted[0]


@anyio_test
@ONE_LOOP
@pytest.mark.parametrize("how", ["folder", "block", "small"])
async def test_a_move_that_fails_leaves_everything_as_it_was(
    folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any, how: str
) -> None:
    forced("resident", "paged")
    disk = MemoryDisk.of(folder)
    if how == "folder":
        tmp_path.joinpath("kv_cache_paged").write_bytes(b"")
    if how == "block":
        disk.fail_write = of_the_cache(tmp_path, DiskError("No space left on device"))
    words = {"folder": "not a folder", "block": "No space left", "small": "too small"}
    async with opened(folder, tmp_path, "resident", 2200 if how == "small" else 4200, disk=disk, prefetch_depth=3) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        applied = await moved(runtime)
        assert words[how] in applied["failed"] and runtime.cache_state()["strategy_id"] == "resident"
        assert runtime.cache_state()["cache_mode"] == "resident-kv" and told(runtime)["signals"]["served"] == 0
        if how != "small":
            assert await talk.turn() < MORE + 4
            assert talk.answers == wanted[0][:2]
        assert [name for name in files_in(tmp_path) if name.name != "kv_cache_paged"] == []


@anyio_test
async def test_a_drive_that_is_full_is_left(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]]) -> None:
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", 6000, disk=disk) as runtime:
        disk.fail_write = of_the_cache(tmp_path, DiskError("No space left on device"))
        talk = Talk(runtime)
        await talk.turn()
        await talk.turn()  # by now it is known
        applied = await moved(runtime)
        assert (applied["rule"], applied["strategy"], applied["failed"]) == ("disk.trouble", "resident", None)
        assert runtime.cache_state()["trouble"] is None
        await talk.turn()
        assert talk.answers == wanted[0]


@anyio_test
@ONE_LOOP
async def test_nobody_who_rides_is_disturbed(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any) -> None:
    forced("resident", "paged")
    found: dict[int, list[int]] = {}
    async with opened(folder, tmp_path, "resident", 16_000) as runtime:
        talk = Talk(runtime)

        async def ride(count: int) -> None:
            found[count] = await ask(runtime, 700, count, count)
            if count == 2:  # others still ride, and whoever comes now rides along
                assert runtime.engine.riders == 2 and told(runtime)["applied"] == [] and told(runtime)["recommendation"] == "paged"
                await talk.turn()
                assert told(runtime)["applied"] == []

        async with anyio.create_task_group() as group:
            for count in (2, 40, 60):
                group.start_soon(ride, count)
        await moved(runtime)
        assert runtime.cache_state()["strategy_id"] == "paged"
        for _ in range(2):
            assert await talk.turn() < MORE + 4
        assert talk.answers == wanted[0] and [len(ids) for _, ids in sorted(found.items())] == [2, 40, 60]


@anyio_test
@ONE_LOOP
async def test_who_comes_during_a_move_waits_for_it(folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], forced: Any) -> None:
    forced("paged", "resident", 2)
    disk = MemoryDisk.of(folder)
    async with opened(folder, tmp_path, "paged", 4200, disk=disk) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        await push_out(runtime)
        disk.delay_s = lambda extent: 0.05 if extent.file.startswith(str(tmp_path)) else 0.0
        await ask(runtime, 20)
        assert await talk.turn() < MORE + 4  # asked at once, answered after the move
        assert told(runtime)["applied"][0]["failed"] is None and runtime.cache_state()["strategy_id"] == "resident"
        await talk.turn()
        assert talk.answers == wanted[0]


@anyio_test
@pytest.mark.parametrize(
    ("source", "target", "after_s"),
    [("paged", "resident", 0.05), ("paged", "log-structured-journal", 0.0), ("paged", "log-structured-journal", 0.1)],
)
async def test_a_move_that_is_cut_short_leaves_nothing_behind(
    folder: Path, tmp_path: Path, forced: Any, monkeypatch: pytest.MonkeyPatch, source: str, target: str, after_s: float
) -> None:
    forced(source, target, 2)
    disk, begun = MemoryDisk.of(folder), anyio.Event()
    move = Adaptation._carry_out

    async def noted(self: Adaptation, found: Any) -> Any:
        begun.set()
        disk.delay_s = lambda extent: 0.03 if extent.file.startswith(str(tmp_path)) else 0.0
        return await move(self, found)

    monkeypatch.setattr(Adaptation, "_carry_out", noted)
    async with opened(folder, tmp_path, source, 4200, disk=disk) as runtime:
        talk = Talk(runtime)
        await talk.turn()
        await push_out(runtime)
        await ask(runtime, 20)
        with anyio.fail_after(20):
            await begun.wait()
        await anyio.sleep(after_s)
    assert not files_in(tmp_path) and not [name for name in disk.files if name.startswith(str(tmp_path))]
    assert runtime.cache is not None and not runtime.cache.pool.all_rows and not runtime.cache.pool.reserved


@anyio_test
@ONE_LOOP
async def test_what_outlives_the_runtime_stays_where_it_is(folder: Path, tmp_path: Path, forced: Any) -> None:
    forced("paged", "quantized-cold-tier")
    async with opened(folder, tmp_path, "paged", 5000, kv_cache_lifecycle="persistent") as runtime:
        await ask(runtime, 1100)
        applied = await moved(runtime)
        assert "kv_cache_strategy=quantized-cold-tier" in applied["failed"] and runtime.cache_state()["strategy_id"] == "paged"


@anyio_test
@ONE_LOOP
async def test_there_and_back_again(
    folder: Path, tmp_path: Path, wanted: dict[int, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = {"resident": "paged", "paged": "resident"}
    rules = [
        Rule(source, lambda seen, source=source: seen.strategy == source and seen.served > 0, target, "")
        for source, target in other.items()
    ]
    monkeypatch.setattr("aollm.adaptation.RULES", tuple(rules))
    async with opened(folder, tmp_path, "resident", 6000) as runtime:
        talks = [Talk(runtime, seed) for seed in range(2)]
        made = 0
        for _ in range(2):
            for talk in talks:
                await talk.turn()
                made += 1
                assert (await moved(runtime, made))["cut_off_tokens"] == 0
                within_the_plan(runtime)
        assert [talk.answers for talk in talks] == [wanted[0][:2], wanted[1][:2]] and made == 4
        for talk in talks:
            await talk.session.aclose()
        assert not runtime.cache.pool.reserved and not runtime.cache.pool.all_rows
    assert not files_in(tmp_path)
