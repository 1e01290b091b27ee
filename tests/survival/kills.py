"""Processes are killed at random moments while they write, one after the other on one store, and eight at a time on one root.

Stores live on from kill to kill, so damage would add up.
"""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path

import anyio

from . import nursery
from .checking import check, inspect
from .load import MANY, Emit, wander
from .opening import Kind, session
from .promises import Promises

AT_ONCE = 8
WHOLE_CHECK = 40
SAMPLE = 3


def load(root: Path, kind: Kind, seed: int, most: int | None, emit: Emit) -> None:
    """Write until killed."""
    anyio.run(session, root, kind, partial(wander, emit=emit, seed=seed, most=most))


def kills(folder: Path, kind: Kind, count: int, seed: int) -> dict[str, object]:
    """Kill `count` processes that write to one store, and look at it after each."""
    draw, root, promises, said = (
        random.Random(seed),
        folder / f"killed-{kind.preset}-{kind.disk}-{seed}",
        Promises(kind.row.windowed),
        list[str](),
    )
    for number in range(count):
        child = nursery.start(partial(load, root, kind, draw.randrange(1 << 30), MANY))
        code, events = child.end(draw.random() * 0.03)
        promises.hear(events)
        found = [] if code == -signal.SIGKILL and ["stuck", "", 0] not in events else [f"ended with {code}: {events[-1:]}"]
        some = draw.sample(sorted(promises.known), min(SAMPLE, len(promises.known)))
        if number % WHOLE_CHECK == WHOLE_CHECK - 1 or number == count - 1:
            found += anyio.run(check, root, kind, promises)
        elif number % 2:  # at times the next one is the first to open it
            seen = anyio.run(inspect, root, kind, some)
            found += [f"wrong bytes: {text}" for text in seen.wrong] + [f"left over: {name}" for name in seen.rubbish]
            found += [f"acknowledged {promises.kept[name]} tokens of {name}, found {seen.tokens[name]}"
                      for name in some if promises.kept.get(name, 0) > seen.tokens[name]]  # fmt: skip
        said += [f"{kind.preset}, kill {number} of seed {seed}: {text}" for text in found]
        if found:
            break  # what follows would only say so again
    return {"trials": number + 1, "failures": said}


def together(folder: Path, kind: Kind, count: int, seed: int) -> dict[str, object]:
    """Eight processes on one root, one of which is killed and replaced `count` times."""
    draw, root, promises, said = random.Random(seed), folder / f"shared-{kind.preset}-{seed}", Promises(kind.row.windowed), list[str]()

    def one() -> nursery.Child:
        return nursery.start(partial(load, root, kind, draw.randrange(1 << 30), None))

    children = [one() for _ in range(AT_ONCE)]
    for number in range(count + AT_ONCE):
        child = children.pop(draw.randrange(len(children)))
        code, events = child.end(draw.random() * 0.03)
        if code != -signal.SIGKILL or ["stuck", "", 0] in events:
            said.append(f"{kind.preset}, kill {number}: ended with {code}: {events[-1:]}")
        promises.hear(events)
        if number < count:
            children.append(one())
    if kind.row.windowed:
        promises.kept.clear()  # who moved a window past what others had written is not known here
    volumes = [entry for entry in (root / kind.identity.hex).iterdir() if entry.is_dir()]
    if len(volumes) > AT_ONCE:
        said.append(f"{len(volumes)} volumes are left of {AT_ONCE} processes")
    said += anyio.run(partial(check, root, kind, promises))
    for volume in volumes:
        if left := [name for name in os.listdir(volume) if name.startswith(".")]:
            said.append(f"temporaries are left: {left}")
    return {"trials": count + AT_ONCE, "failures": said}
