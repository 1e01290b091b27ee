"""What is tried, how often, in a run for every change and in a long one: a table, and the two lanes that work through it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from aollm.stores.presets import PRESETS

from . import nursery
from .crashes import crashes
from .damage import log_flips, record_flips, tails
from .failures import failures, shorts
from .full import full
from .kills import kills, together
from .mutants import caught
from .opening import Kind
from .power import broken_flushes, cuts

Job = Callable[[], dict[str, Any]]
LANES = max(1, min(8, len(os.sched_getaffinity(0))))
KINDS = [Kind(name) for name, preset in PRESETS.items() if preset.layout is not None]
CHUNKED, JOURNAL = Kind("chunked"), Kind("log-structured-journal")
PORTABLE = [Kind(kind.preset, "portable") for kind in KINDS]


def _crashes(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    return [partial(crashes, _own(folder, lane), kind, first=1 + lane, step=LANES, real=1 if soak else 12) for kind in KINDS]


def _kills(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    kinds = [*KINDS, PORTABLE[0]]
    count = -(-(100_000 if soak else 2_000) // (len(kinds) * LANES))
    return [partial(kills, _own(folder, lane), kind, count, seed * LANES + lane) for kind in kinds]


def _together(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    return [partial(together, folder, kind, 400 if soak else 20, seed) for kind in KINDS[lane::LANES]]


def _failures(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    own = _own(folder, lane)
    step = LANES if soak else 3 * LANES
    every = [partial(failures, own, kind, soak, 1 + lane * step // LANES, step) for kind in KINDS]
    return [*every, *(partial(shorts, own, kind) for kind in KINDS[lane::LANES])]


def _power(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    own = _own(folder, lane)
    step, fates = (LANES, 4) if soak else (3 * LANES, 1)
    every = [partial(cuts, own, kind, 1 + lane * step // LANES, step, fates) for kind in KINDS]
    return [*every, *(partial(broken_flushes, own, kind, 1 + lane, LANES) for kind in (KINDS if soak else [CHUNKED, JOURNAL]))]


def _tails(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    return [partial(tails, _own(folder, lane), kind) for kind in (KINDS if soak else [CHUNKED])[lane::LANES]]


def _flips(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    own = _own(folder, lane)
    more = 20 if soak else 1
    logs = [partial(log_flips, own, kind, seed + turn) for kind in (KINDS if soak else [JOURNAL]) for turn in range(more)]
    records = [partial(record_flips, own, kind, seed + turn) for kind in KINDS for turn in range(more)]
    return [*logs[lane::LANES], *records[lane::LANES]]


def _full(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    sizes = list(range(16, 1040, 16)) if soak else list(range(48, 560, 64))
    return [partial(full, _own(folder, lane), kind, sizes[lane::LANES]) for kind in (KINDS if soak else [CHUNKED, JOURNAL])]


def _mutants(folder: Path, lane: int, seed: int, soak: bool) -> list[Job]:
    return [partial(caught, folder, lane, LANES)]


PROGRAMMES: dict[str, Callable[[Path, int, int, bool], list[Job]]] = {
    "crashes": _crashes,
    "kills": _kills,
    "together": _together,
    "failures": _failures,
    "power": _power,
    "tails": _tails,
    "flips": _flips,
    "full": _full,
    "mutants": _mutants,
}


def run(name: str, folder: Path, seed: int, soak: bool) -> dict[str, Any]:
    """Trials and failures of one programme, its jobs dealt out to as many lanes as there are processors."""
    start = monotonic()

    def lane(number: int) -> list[dict[str, Any]]:
        return [job() for job in PROGRAMMES[name](folder, number, seed, soak)]

    results = [result for results in nursery.beside([partial(lane, number) for number in range(LANES)]) for result in results]
    failed = [text for result in results for text in result["failures"]]
    noticed = {name: by for result in results for name, by in result.get("noticed", {}).items()}
    trials = sum(result["trials"] for result in results)
    return {"trials": trials, "failures": failed, "seconds": round(monotonic() - start, 1), **({"noticed": noticed} if noticed else {})}


def _own(folder: Path, lane: int) -> Path:
    own = folder / f"lane-{lane}"
    own.mkdir(exist_ok=True)
    return own
