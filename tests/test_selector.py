"""The selector: a table of rules, and a chain that is really followed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from aollm import AollmError, MemoryBudgetError, MemoryDisk, Runtime, StoreError
from aollm.disk.auto import open_disk
from aollm.outlook import choose
from aollm.port import Port
from aollm.probe import free_disk, same_drive
from aollm.selector import FEW, RULES, SLOW, USUAL_TOKENS, Inputs, select
from aollm.settings import RuntimeConfig
from aollm.stores.presets import PRESETS

ASYNC = pytest.mark.anyio
ONE_LOOP = pytest.mark.parametrize("anyio_backend", ["asyncio"], scope="module")
TOKEN, CONTEXT, SHARE = 1 << 10, 4096, 64 << 20
FITS = Inputs(1 << 30, SHARE, TOKEN, CONTEXT, True, 16, disk_free_nbytes=1 << 40)
ONE = replace(FITS, context_tokens=SHARE // TOKEN)
LONG = replace(FITS, context_tokens=SHARE // TOKEN + 1)
USUAL = replace(LONG, context_asked=False)
MEMORY, DISK = ("paged",), ("resident",)


@pytest.mark.parametrize(
    ("profile", "inputs", "rule", "choice", "fallbacks"),
    [
        ("balanced", FITS, "fits", "resident", MEMORY),
        ("balanced", replace(FITS, context_tokens=SHARE // TOKEN // FEW), "fits", "resident", MEMORY),
        ("balanced", ONE, "long", "paged", DISK),
        ("balanced", replace(ONE, requests=1), "fits", "resident", MEMORY),
        ("balanced", LONG, "long", "paged", DISK),
        ("balanced", USUAL, "usual", "resident", MEMORY),
        ("balanced", replace(USUAL, kv_nbytes_per_token=SHARE // USUAL_TOKENS), "usual", "resident", MEMORY),
        ("balanced", replace(USUAL, kv_nbytes_per_token=SHARE // USUAL_TOKENS + 1), "long", "paged", DISK),
        ("balanced", replace(FITS, persistent=True), "persistent", "paged", ()),
        ("balanced", replace(USUAL, persistent=True), "persistent", "paged", ()),
        ("balanced", replace(LONG, persistent=True, disk_free_nbytes=0), "persistent", "paged", ()),
        ("balanced", replace(LONG, disk_free_nbytes=SHARE - 1), "tight-drive", "resident", MEMORY),
        ("balanced", replace(LONG, disk_free_nbytes=SHARE), "long", "paged", DISK),
        ("balanced", replace(LONG, disk_free_nbytes=None), "long", "paged", DISK),
        ("balanced", replace(LONG, drive_bytes_per_second=SLOW - 1), "slow-drive", "resident", MEMORY),
        ("balanced", replace(LONG, drive_bytes_per_second=SLOW), "long", "paged", DISK),
        ("balanced", replace(FITS, kv_nbytes_per_token=0), "fits", "resident", MEMORY),
        ("latency", ONE, "fits", "resident", MEMORY),
        ("latency", LONG, "long", "paged", DISK),
        ("latency", USUAL, "usual", "resident", MEMORY),
        ("latency", replace(ONE, persistent=True), "persistent", "paged", ()),
        ("capacity", replace(FITS, context_tokens=SHARE // TOKEN // 32), "fits", "resident", ("quantized-cold-tier", "paged")),
        ("capacity", FITS, "long", "quantized-cold-tier", ("paged", "resident")),
        ("capacity", replace(FITS, disk_free_nbytes=0), "tight-drive", "resident", ("quantized-cold-tier", "paged")),
        ("capacity", replace(FITS, context_tokens=1, persistent=True), "long", "quantized-cold-tier", ("paged",)),
        ("bounded-window", FITS, "window", "sliding-window-ring-buffer", ("paged", "resident")),
        ("bounded-window", replace(FITS, persistent=True), "window", "sliding-window-ring-buffer", ("paged",)),
    ],
)
def test_the_first_rule_that_holds_chooses(profile: str, inputs: Inputs, rule: str, choice: str, fallbacks: tuple[str, ...]) -> None:
    selection = select(profile, inputs)
    assert (selection.rule, selection.choice, selection.fallbacks) == (f"{profile}.{rule}", choice, fallbacks)
    assert selection == select(profile, replace(inputs)) and selection.inputs == inputs and selection.profile == profile
    assert selection.strategy == choice and selection.text in {rule.text for rule in RULES}


def test_every_rule_has_its_own_name_and_choices_of_the_default_candidates() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    candidates = {"resident", "paged", "quantized-cold-tier"}
    for profile in ("balanced", "latency", "capacity", "bounded-window"):
        rules = [rule for rule in RULES if rule.profile == profile]
        assert rules[-1].holds(replace(LONG, persistent=True, disk_free_nbytes=0, drive_bytes_per_second=0.0))  # there is always one
        for rule in rules:
            own = {"sliding-window-ring-buffer"} if profile == "bounded-window" else set()
            assert {rule.choice, *rule.fallbacks} <= candidates | own and rule.choice not in rule.fallbacks
            assert profile == "capacity" or not any(PRESETS[name].codec.representation for name in (rule.choice, *rule.fallbacks))


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"window_tokens": 700}, 700),
        ({}, CONTEXT),  # all of it
        ({"context_tokens": 1 << 20}, SHARE // TOKEN // FEW),
        ({"context_tokens": 1 << 20, "requests": 1}, SHARE // TOKEN),
        ({"context_tokens": 1 << 20, "share_nbytes": 2 * 1500 * TOKEN}, 1024),  # whole blocks
        ({"context_tokens": 1 << 20, "share_nbytes": 2 * 900 * TOKEN}, 900),
        ({"share_nbytes": 0}, 1),
    ],
)
def test_a_window_follows_from_the_share(changes: dict[str, Any], window: int) -> None:
    assert select("bounded-window", replace(FITS, **changes)).window_tokens == window


def test_the_chain_is_followed_to_its_end() -> None:
    selection = select("capacity", FITS)
    seen = []
    while True:
        seen.append(selection.strategy)
        if (following := selection.without(f"no {selection.strategy}")) is None:
            break
        assert following.choice == selection.choice and following.rule == selection.rule
        selection = following
    assert seen == ["quantized-cold-tier", "paged", "resident"]
    assert [(tried.strategy, tried.reason) for tried in selection.tried] == [(name, f"no {name}") for name in seen[:-1]]


# ---- in a runtime

LAYERS, KV = 2, 2 * 2 * 2 * 16 * 4  # bytes of keys and values of a token
ENOUGH = 1700 * KV
"""Memory for keys and values that is too little for a context of 8,192 tokens, and enough for a store on disk."""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, max_position_embeddings=8192)


def opened(folder: Path, cache: Path, memory: int = ENOUGH, **fields: Any) -> Runtime:
    how = {"max_context_tokens": 8192, "dense_projection_chunk_rows": 64, "max_concurrent_requests": 4}
    return Runtime.open(folder, kv_cache_memory=memory, cache_dir=cache, **{**how, **fields})


def left(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file() and not path.name.startswith("mine")]


async def answer(runtime: Runtime) -> list[int]:
    return [token.id async for token in runtime.stream(tiny.prompt(1100), max_new_tokens=tiny.COUNT)]


@ASYNC
async def test_the_bundled_model_makes_no_files(tmp_path: Path) -> None:
    async with Runtime.open("demo", cache_dir=tmp_path / "cache") as runtime:
        assert len([token async for token in runtime.stream("Once upon a time", max_new_tokens=4)]) == 4
        plan = runtime.plan
        assert plan.kv_cache_strategy == "resident" and plan.selection is not None and plan.selection.strategy == "resident"
        assert runtime.cache_state()["strategy_id"] == "resident" and runtime.cache_state()["cache_mode"] == "resident-kv"
    assert not (tmp_path / "cache").exists()


@ASYNC
@ONE_LOOP
@pytest.mark.parametrize(
    ("fields", "rule", "strategy"),
    [
        ({}, "balanced.long", "paged"),
        ({"memory": 2 * 8192 * KV}, "balanced.fits", "resident"),
        ({"memory": 8192 * KV}, "balanced.long", "paged"),
        ({"memory": 8192 * KV, "strategy_selector_profile": "latency"}, "latency.fits", "resident"),
        ({"memory": 2 * 8192 * KV, "kv_cache_lifecycle": "persistent"}, "balanced.persistent", "paged"),
        ({"strategy_selector_profile": "capacity"}, "capacity.long", "quantized-cold-tier"),
        ({"strategy_selector_profile": "bounded-window"}, "bounded-window.window", "sliding-window-ring-buffer"),
        ({"kv_cache_strategy": "paged"}, None, "paged"),
    ],
)
async def test_what_is_planned_is_what_is_opened(
    folder: Path, tmp_path: Path, fields: dict[str, Any], rule: str | None, strategy: str
) -> None:
    async with opened(folder, tmp_path, **fields) as runtime:
        plan = runtime.plan
        assert plan.kv_cache_strategy == strategy == runtime.cache_state()["strategy_id"]
        assert (plan.selection.rule if plan.selection is not None else None) == rule
        assert plan.as_dict()["selection"] == (None if rule is None else {**plan.as_dict()["selection"], "rule": rule, "tried": ()})
        assert ("disk-cache" in {seen.id for seen in plan.passes if seen.observed}) == (strategy != "resident")
        if strategy == "sliding-window-ring-buffer":
            assert plan.selection is not None
            assert runtime.cache_state()["window_max_tokens"] == plan.selection.window_tokens == 850
        if plan.selection is not None:
            inputs = plan.selection.inputs
            assert (inputs.kv_nbytes_per_token, inputs.context_tokens, inputs.requests) == (KV, 8192, 4)
            assert inputs.disk_free_nbytes and inputs.drive_bytes_per_second is None  # so small a model says nothing of the drive
        found = await answer(runtime)
    assert len(found) == tiny.COUNT
    config = RuntimeConfig.of(folder, {**runtime.config.model_dump(exclude_unset=True), "model_reference": str(folder)})
    async with Port() as port:  # `aollm plan` says the same, and makes nothing
        disk, why = open_disk("auto", port, folder)
        there = sorted(tmp_path.rglob("*"))
        choice = await choose(config, folder, disk, why)
        assert choice.plan.kv_cache_strategy == strategy and sorted(tmp_path.rglob("*")) == there
        assert (choice.plan.selection.rule if choice.plan.selection is not None else None) == rule
        await disk.aclose()


def blocked(cache: Path, *names: str) -> None:
    """Files where the folders of these strategies ought to be."""
    cache.mkdir(mode=0o700, exist_ok=True)
    for name in names:
        (cache / PRESETS[name].root).write_bytes(b"")


@ASYNC
@ONE_LOOP
@pytest.mark.parametrize(
    ("fields", "in_the_way", "tried", "strategy"),
    [
        ({}, ["paged"], ["paged"], "resident"),
        ({"strategy_selector_profile": "capacity"}, ["quantized-cold-tier"], ["quantized-cold-tier"], "paged"),
        ({"strategy_selector_profile": "capacity"}, ["quantized-cold-tier", "paged"], ["quantized-cold-tier", "paged"], "resident"),
        ({"strategy_selector_profile": "bounded-window"}, ["sliding-window-ring-buffer"], ["sliding-window-ring-buffer"], "paged"),
        (
            {"strategy_selector_profile": "capacity", "kv_cache_lifecycle": "persistent"},
            ["quantized-cold-tier"], ["quantized-cold-tier"], "paged",
        ),
    ],
)  # fmt: skip
async def test_what_cannot_be_opened_gives_way_to_the_next(
    folder: Path, tmp_path: Path, fields: dict[str, Any], in_the_way: list[str], tried: list[str], strategy: str
) -> None:
    blocked(tmp_path / "cache", *in_the_way)
    async with opened(folder, tmp_path / "cache", memory=3000 * KV, max_context_tokens=7000, **fields) as runtime:
        selection = runtime.plan.selection
        assert selection is not None and selection.strategy == strategy == runtime.plan.kv_cache_strategy
        assert [failed.strategy for failed in selection.tried] == tried and all(
            "not a folder" in failed.reason for failed in selection.tried
        )
        assert runtime.cache_state()["strategy_id"] == strategy and runtime.plan.specialization_state == "applied"
        assert ("disk-cache" in {seen.id for seen in runtime.plan.passes}) == (strategy != "resident")
        assert runtime.cache_state()["window_max_tokens"] is None
        assert await answer(runtime)


@ASYNC
@ONE_LOOP
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"kv_cache_strategy": "paged"}, StoreError),  # named: no fallback
        ({"kv_cache_lifecycle": "persistent"}, StoreError),  # nothing else outlives the runtime with every bit
    ],
)
async def test_without_another_the_error_is_that_of_the_choice(
    folder: Path, tmp_path: Path, fields: dict[str, Any], error: type[AollmError]
) -> None:
    blocked(tmp_path / "cache", "paged")
    with pytest.raises(error, match=r"kv_cache_paged is a symbolic link or not a folder"):
        async with opened(folder, tmp_path / "cache", **fields):
            pass


@ASYNC
async def test_a_store_that_takes_no_block_gives_way(folder: Path, tmp_path: Path) -> None:
    disk = MemoryDisk.of(folder)
    disk.fail_write = lambda extent: StoreError("No space left on device") if "PROBE" in extent.file else None
    async with opened(folder, tmp_path, disk=disk) as runtime:
        selection = runtime.plan.selection
        assert selection is not None and [tried.strategy for tried in selection.tried] == ["paged"]
        assert "No space left" in selection.tried[0].reason and runtime.plan.kv_cache_strategy == "resident"
        assert await answer(runtime)
    assert not left(tmp_path)


@ASYNC
@ONE_LOOP
@pytest.mark.parametrize(("delay_s", "rule"), [(0.05, "balanced.slow-drive"), (0.0, "balanced.long")])
async def test_a_slow_drive_is_seen_before_anything_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay_s: float, rule: str
) -> None:
    monkeypatch.setattr("aollm.survey.GLANCE", 32 << 10)
    disk = MemoryDisk.of(folder)
    disk.delay_s = delay_s
    async with opened(folder, folder / "cache", disk=disk) as runtime:
        selection = runtime.plan.selection
        assert selection is not None and selection.rule == rule
        drive = selection.inputs.drive_bytes_per_second
        assert drive is not None and (drive < SLOW) == (delay_s > 0)
    assert delay_s == 0 or not (folder / "cache").exists()


def test_a_drive_is_that_of_the_first_folder_that_is_there(folder: Path, tmp_path: Path) -> None:
    weights = [str(folder / "model.safetensors")]
    assert same_drive(tmp_path / "not" / "yet", weights) and not same_drive(Path("/proc"), weights)
    assert not same_drive(tmp_path, []) and not same_drive(tmp_path, [str(tmp_path / "gone")])
    assert free_disk(tmp_path / "not" / "yet") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A drive that has room for folders and not for blocks."""
    where = tmp_path / "full"
    where.mkdir(mode=0o700)
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k,mode=700", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with (where / "mine").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(4096))
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


@ASYNC
async def test_a_full_drive_gives_way(folder: Path, full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aollm.survey.free_disk", lambda path: None)  # as where it cannot be told beforehand
    async with opened(folder, full) as runtime:
        assert runtime.plan.selection is not None and [tried.strategy for tried in runtime.plan.selection.tried] == ["paged"]
        assert runtime.plan.kv_cache_strategy == "resident" and await answer(runtime)
    assert not left(full)


@ASYNC
async def test_what_does_not_fit_gives_way_too(folder: Path, tmp_path: Path) -> None:
    """A share that is too little for a last block on disk; in memory a shorter context does."""
    fields: dict[str, Any] = {"max_context_tokens": None, "max_concurrent_requests": 1}
    async with opened(folder, tmp_path, memory=600 * KV, **fields) as runtime:
        selection = runtime.plan.selection
        assert selection is not None and [tried.strategy for tried in selection.tried] == ["paged"]
        assert "kv_cache_memory" in selection.tried[0].reason and runtime.plan.max_context_tokens == 600
    with pytest.raises(MemoryBudgetError, match="is too small"):
        async with opened(folder, tmp_path, memory=600 * KV, kv_cache_strategy="paged", **fields):
            pass
    assert not left(tmp_path)
