"""What is tried, how often, in a run for every change and in a long one: a table, and the lanes that work through it."""

from __future__ import annotations

import os
import shutil
import tempfile
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
from .mutants import MUTANTS, caught
from .opening import Kind
from .power import broken_flushes, cuts

Job = Callable[[Path], dict[str, Any]]
"""What is done in a folder of its own."""
LANES = max(1, min(8, len(os.sched_getaffinity(0))))
PARTS = 4
"""Into how many jobs one is cut that would keep a lane busy when the others are done."""
KINDS = [Kind(name) for name, preset in PRESETS.items() if preset.layout is not None]
CHUNKED, JOURNAL = Kind("chunked"), Kind("log-structured-journal")
PORTABLE = [Kind(kind.preset, "portable") for kind in KINDS]


def _crashes(seed: int, soak: bool) -> list[Job]:
    real = 1 if soak else 12
    return [partial(crashes, kind=kind, first=1 + part, step=PARTS, real=real) for kind in KINDS for part in range(PARTS)]


def _kills(seed: int, soak: bool) -> list[Job]:
    kinds = [*KINDS, PORTABLE[0]]
    stores = PARTS if soak else 2  # few, for each lives on from kill to kill
    count = -(-(100_000 if soak else 1_000) // (len(kinds) * stores))
    return [partial(kills, kind=kind, count=count, seed=seed * stores + store) for kind in kinds for store in range(stores)]


def _together(seed: int, soak: bool) -> list[Job]:
    return [partial(together, kind=kind, count=400 if soak else 20, seed=seed) for kind in KINDS]


def _failures(seed: int, soak: bool) -> list[Job]:
    step = PARTS if soak else 3 * PARTS
    every: list[Job] = [
        partial(failures, kind=kind, everything=soak, first=1 + part * step // PARTS, step=step) for kind in KINDS for part in range(PARTS)
    ]
    return [*every, *(partial(shorts, kind=kind) for kind in KINDS)]


def _power(seed: int, soak: bool) -> list[Job]:
    step, fates = (PARTS, 4) if soak else (3 * PARTS, 1)
    every: list[Job] = [
        partial(cuts, kind=kind, first=1 + part * step // PARTS, step=step, fates=fates) for kind in KINDS for part in range(PARTS)
    ]
    broken = KINDS if soak else [CHUNKED, JOURNAL]
    return [*every, *(partial(broken_flushes, kind=kind, first=1 + part, step=PARTS) for kind in broken for part in range(PARTS))]


def _tails(seed: int, soak: bool) -> list[Job]:
    return [partial(tails, kind=kind, begin=part, step=PARTS) for kind in (KINDS if soak else [CHUNKED]) for part in range(PARTS)]


def _flips(seed: int, soak: bool) -> list[Job]:
    turns = range(20 if soak else 1)
    logs: list[Job] = [
        partial(log_flips, kind=kind, seed=seed + turn, begin=part, step=PARTS)
        for kind in (KINDS if soak else [JOURNAL])
        for turn in turns
        for part in range(PARTS)
    ]
    return [*logs, *(partial(record_flips, kind=kind, seed=seed + turn) for kind in KINDS for turn in turns)]


def _full(seed: int, soak: bool) -> list[Job]:
    sizes = range(16, 1040, 16) if soak else range(48, 560, 64)
    return [partial(full, kind=kind, sizes=[size]) for kind in (KINDS if soak else [CHUNKED, JOURNAL]) for size in sizes]


def _mutants(seed: int, soak: bool) -> list[Job]:
    return [partial(caught, mutant=mutant) for mutant in MUTANTS]


PROGRAMMES: dict[str, Callable[[int, bool], list[Job]]] = {
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
ON_A_DRIVE = {"kills", "together"}
"""Those in which it matters how long a drive takes, so that every other store is on one. To the others a drive would only add
time: what ends, fails or is lost is said by the trial."""
MEMORY, ROOM = Path("/dev/shm"), 1 << 30
"""A folder in memory, and the bytes that have to be free there."""


def run(name: str, folder: Path, seed: int, soak: bool) -> dict[str, Any]:
    """Trials and failures of one programme. There are as many lanes as processors, and each takes the next job when it has none."""
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM
    with tempfile.TemporaryDirectory(dir=MEMORY if roomy else folder) as memory:
        start, jobs = monotonic(), PROGRAMMES[name](seed, soak)
        places = (folder if name in ON_A_DRIVE else Path(memory), Path(memory))
        reads, writes = os.pipe()
        os.write(writes, b"".join(number.to_bytes(2, "big") for number in range(len(jobs))))
        os.close(writes)

        def lane() -> list[dict[str, Any]]:
            results = []
            while taken := os.read(reads, 2):
                number = int.from_bytes(taken, "big")
                own = places[number % 2] / f"{name}-{number}"
                own.mkdir()
                results.append(jobs[number](own))
            return results

        results = [result for results in nursery.beside([lane] * LANES) for result in results]
        os.close(reads)
    failed = [text for result in results for text in result["failures"]]
    noticed = {name: by for result in results for name, by in result.get("noticed", {}).items()}
    trials = sum(result["trials"] for result in results)
    return {"trials": trials, "failures": failed, "seconds": round(monotonic() - start, 1), **({"noticed": noticed} if noticed else {})}
