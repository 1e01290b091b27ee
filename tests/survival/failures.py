"""Operations fail: each of a script's, with errors that the system may give there, once and from then on; and come back short.

Nothing ends: what is acknowledged in spite of it is there afterwards, and every error is one of ours.
"""

from __future__ import annotations

import errno
import itertools
import random
import shutil
from functools import partial
from pathlib import Path

import anyio

from .checking import check
from .interposer import Fail, Interposer, Plan, Short
from .load import script
from .opening import Kind
from .promises import Promises

ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EINTR, errno.EDQUOT)


def failures(folder: Path, kind: Kind, everything: bool = False, first: int = 1, step: int = 1) -> dict[str, object]:
    """Trials at operations `first`, `first + step`, ...; a random error at each, or all of them."""
    trials, said = 0, list[str]()
    for at in itertools.count(first, step):
        reached = False
        kinds = list(itertools.product(ERRORS, (False, True)))
        for number, sticky in kinds if everything else [random.Random(at).choice(kinds)]:
            plan = Fail(at, number, sticky)
            name = f"{at}-{errno.errorcode[number]}{'-sticky' if sticky else ''}"
            found, count = run(folder / name, kind, plan)
            reached = reached or count >= at
            if plan.failed:
                trials += 1
                said += [f"{kind.preset}, {name}: {text}" for text in found]
        if not reached:
            return {"trials": trials, "failures": said}
    raise AssertionError


def shorts(folder: Path, kind: Kind) -> dict[str, object]:
    """Every read and write moves half of what it could."""
    plan = Short()
    found, _ = run(folder / "short", kind, plan, certain=True)
    return {"trials": plan.shortened, "failures": [f"{kind.preset}, short: {text}" for text in found]}


def run(root: Path, kind: Kind, plan: Plan, certain: bool = False) -> tuple[list[str], int]:
    """What is wrong after a script under `plan`, and how many operations it had."""
    promises, found = Promises(kind.row.windowed), list[str]()
    with Interposer(root, plan) as interposer:
        try:
            anyio.run(partial(script, root, kind, promises.tell, certain=certain))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found.append(f"not one of our errors: {error!r} {getattr(error, 'exceptions', '')}")
    if root.exists():
        found += anyio.run(partial(check, root, kind, promises, missing=True))
        shutil.rmtree(root)
    return found, interposer.count
