"""A filesystem that is really full, and has room again: a small tmpfs. Needs root.

What was acknowledged stays, the error is ours, and writing goes on when there is room.
"""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import anyio

from aollm.errors import AollmError, first_of

from .checking import check, open_descriptors
from .load import first, second
from .opening import Kind, session
from .promises import Promises

BALLAST = 256 << 10


def full(folder: Path, kind: Kind, sizes: list[int]) -> dict[str, object]:
    """Scripts on filesystems of `sizes` KiB beside the ballast, which goes between two runs."""
    said, trials = list[str](), 0
    for size in sizes:
        mount = folder / f"full-{kind.preset}-{size}"
        mount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={(BALLAST >> 10) + size}k,mode=700", "tmpfs", mount], check=True)
        try:
            (mount / "ballast").write_bytes(bytes(BALLAST))
            promises, errors = Promises(kind.row.windowed), list[BaseException]()
            before = open_descriptors()
            for what in (first, second, None, second):
                if what is None:
                    (mount / "ballast").unlink()
                    continue
                try:
                    anyio.run(partial(session, mount / "cache", kind, partial(what, emit=promises.tell)))
                except (AollmError, ExceptionGroup) as error:
                    errors.append(first_of(error))
            found = [f"not one of our errors: {error!r}" for error in errors if not isinstance(error, AollmError)]
            if left := open_descriptors() - before:
                found.append(f"descriptors are left open: {left}")
            subprocess.run(["mount", "-o", "remount,size=16m", mount], check=True)
            found += anyio.run(partial(check, mount / "cache", kind, promises, missing=True))
        finally:
            subprocess.run(["umount", mount], check=True)
        trials += 1
        said += [f"{kind.preset}, {size} KiB: {text}" for text in found]
    return {"trials": trials, "failures": said}
