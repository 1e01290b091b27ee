"""Bytes that are not what was stored: logs cut short, bits flipped, records exchanged. All of it is found, none of it is used."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from functools import partial
from pathlib import Path

import anyio

from aollm.maths.attention import BLOCK
from aollm.stores.cache import Cache
from aollm.stores.cell import Cell
from aollm.stores.manifest import parse
from aollm.stores.node import Node
from aollm.stores.record import HEADER, HEADER_NBYTES, PAGE, DamageError, Place
from aollm.stores.volume import Volume

from .checking import check
from .load import first, second
from .opening import Kind, session
from .promises import Promises
from .sequences import SHAPE

SECTOR = 512
LENGTH_AT = 12
"""Which of a header's fields is the payload's length."""


def build(root: Path, kind: Kind) -> tuple[Path, Promises]:
    """A store with a dozen blocks; returns its volume's folder."""
    promises = Promises(kind.row.windowed)
    for what in (first, second):
        anyio.run(partial(session, root, kind, partial(what, emit=promises.tell)))
    (volume,) = (entry for entry in (root / kind.identity.hex).iterdir() if entry.is_dir())
    return volume, promises


def boundaries(log: bytes) -> list[int]:
    """Where the records of a manifest begin, and its end."""
    at = [0]
    while at[-1] < len(log):
        at.append(at[-1] + HEADER_NBYTES + HEADER.unpack_from(log, at[-1])[LENGTH_AT])
    return at


def tails(folder: Path, kind: Kind, begin: int = 0, step: int = 1) -> dict[str, object]:
    """The manifest cut at every byte of every header, and every 512 bytes between: what is before the cut is there. Of these
    cuts, every `step`th from number `begin` on."""
    root = folder / "cut"
    volume, _ = build(root, kind)
    log = (volume / "manifest").read_bytes()
    starts, said, trials = boundaries(log), list[str](), 0
    expected: dict[int, set[bytes]] = {}
    cuts = {at for start in starts[:-1] for at in range(start, start + HEADER_NBYTES + 1)} | set(range(0, len(log), SECTOR))
    for at in sorted(cut for cut in cuts if cut < len(log))[begin::step]:
        whole = max(start for start in starts if start <= at)
        if whole not in expected:
            expected[whole] = set(parse(log[:whole], str(volume)).nodes)
        with _copied(root, folder / "trial") as copy:
            manifest = copy / volume.relative_to(root) / "manifest"
            os.truncate(manifest, at)
            opened = _open(copy, kind)
            found, gone = {node.digest for node in opened.index.nodes()}, opened.tail_truncated_bytes + opened.lost
            opened.close()
            if whole:
                again = _open(copy, kind)
                if {node.digest for node in again.index.nodes()} != found or again.tail_truncated_bytes or again.quarantined or again.lost:
                    said.append(f"{kind.preset}, cut at {at}: the second opening is another one")
                again.close()
        trials += 1
        if not found <= expected[whole] or (not opened.lost and found != expected[whole]):
            said.append(f"{kind.preset}, cut at {at}: {len(found)} blocks, not {len(expected[whole])}")
        if whole and at > whole and not gone:
            said.append(f"{kind.preset}, cut at {at}: not counted")
    shutil.rmtree(root)
    return {"trials": trials, "failures": said}


def log_flips(folder: Path, kind: Kind, seed: int, payload: int = 4, begin: int = 0, step: int = 1) -> dict[str, object]:
    """A bit of the manifest flipped: in every byte of every header, and in `payload` random bytes of every record. Of the
    records, every `step`th from number `begin` on."""
    root, draw = folder / f"flipped-{seed}", random.Random(seed * step + begin)
    volume, _ = build(root, kind)
    log = (volume / "manifest").read_bytes()
    opened = _open(root, kind)
    original = {node.digest: _told(node) for node in opened.index.nodes()}
    opened.close()
    ever = _ever(log, str(volume))
    starts, said, trials = boundaries(log), list[str](), 0
    for start, end in itertools.islice(itertools.pairwise(starts), begin, None, step):
        body = range(start + HEADER_NBYTES, end)
        for at in (*range(start, start + HEADER_NBYTES), *(draw.choice(body) for _ in range(payload if body else 0))):
            with _copied(root, folder / f"trial-{seed}") as copy:
                manifest = copy / volume.relative_to(root) / "manifest"
                flip(manifest, at, 1 << draw.randrange(8))
                trials += 1
                opened = _open(copy, kind)
                found = {node.digest: _told(node) for node in opened.index.nodes()}
                counted = opened.tail_truncated_bytes or opened.quarantined
                opened.close()
            if any(told not in ever.get(name, ()) for name, told in found.items()):
                said.append(f"{kind.preset}, manifest flipped at {at}: a block that was never stored so")
            if not counted:
                said.append(f"{kind.preset}, manifest flipped at {at}: not found out, {len(found)} of {len(original)} blocks")
    shutil.rmtree(root)
    return {"trials": trials, "failures": said}


def record_flips(folder: Path, kind: Kind, seed: int, payload: int = 16) -> dict[str, object]:
    """A bit of a stored block flipped: in every byte of each header and in `payload` random bytes of each, and all pairs of
    neighbours exchanged. Every one is found out when the block is read, and its bytes are right again when they are put back."""
    root, draw, said, trials = folder / f"records-{seed}", random.Random(seed), list[str](), 0
    _, promises = build(root, kind)

    async def body(cache: Cache) -> None:
        nonlocal trials
        assert cache.records is not None

        async def refused(place: Place, layer: int, what: str) -> None:
            nonlocal trials
            trials += 1
            assert cache.records is not None
            await cache.records._disk.forget(place.extent.file)  # or it would say that the file changed, whatever changed
            try:
                await cache.records.read_apart(Cell(layer, place.header.index, place=place, owners=0))
                said.append(f"{kind.preset}, {what}: not found out")
            except DamageError:
                pass

        places = [(place, layer) for node in cache.records.volume.index.nodes() for layer, place in enumerate(node.places)]
        for place, layer in places:
            payloads = [PAGE + draw.randrange(place.header.nbytes) for _ in range(payload)]
            for at in (*range(HEADER_NBYTES), *payloads):
                bit = 1 << draw.randrange(8)
                flip(Path(place.extent.file), place.extent.offset + at, bit)
                await refused(place, layer, f"byte {at} of a record")
                flip(Path(place.extent.file), place.extent.offset + at, bit)
        for (one, layer), (other, below) in itertools.pairwise(places):
            if one.extent.nbytes == other.extent.nbytes:
                _exchange(one, other)
                await refused(one, layer, "a record exchanged")
                await refused(other, below, "a record exchanged")
                _exchange(one, other)

    anyio.run(partial(session, root, kind, body))
    said += anyio.run(partial(check, root, kind, promises))  # all is as it was
    _, data = max((entry.stat().st_size, entry) for entry in root.rglob("*") if entry.is_file() and entry.name != "manifest")
    os.truncate(data, data.stat().st_size // 2 // SECTOR * SECTOR)
    said += anyio.run(partial(check, root, kind, promises, missing=True, damaged=True))
    shutil.rmtree(root)
    return {"trials": trials + 1, "failures": said}


def flip(path: Path, at: int, bit: int) -> None:
    """Turn a bit of a file's byte."""
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def _exchange(one: Place, other: Place) -> None:
    parts = []
    for place in (one, other):
        with open(place.extent.file, "rb") as file:
            file.seek(place.extent.offset)
            parts.append(file.read(place.extent.nbytes))
    for place, part in zip((other, one), parts, strict=True):
        with open(place.extent.file, "r+b") as file:
            file.seek(place.extent.offset)
            file.write(part)


class _copied:
    """A copy of a folder, for one trial."""

    def __init__(self, source: Path, target: Path) -> None:
        self._source, self._target = source, target

    def __enter__(self) -> Path:
        shutil.copytree(self._source, self._target, copy_function=_link)
        self._target.chmod(0o700)
        return self._target

    def __exit__(self, *raised: object) -> None:
        shutil.rmtree(self._target)


def _link(source: str, target: str) -> str:
    """Copy what is small; of what is large only the size is looked at here."""
    if os.path.basename(source) in ("manifest", "LOCK", "identity.json"):
        return shutil.copy2(source, target)
    with open(target, "xb") as file:
        os.truncate(file.fileno(), os.path.getsize(source))
    os.chmod(target, 0o600)
    return target


def _open(root: Path, kind: Kind) -> Volume:
    return Volume.open(root, kind.identity, kind.row.persistence_format, BLOCK, SHAPE.layers)


def _told(node: Node) -> tuple[object, ...]:
    """What a node says, but for its folder."""
    places = tuple((os.path.basename(place.extent.file), place.extent.offset, place.header.sequence) for place in node.places)
    return node.parent, node.index, node.ids, places


def _ever(log: bytes, folder: str) -> dict[bytes, set[tuple[object, ...]]]:
    """All that was ever said of each block, as of the end of each record."""
    found: dict[bytes, set[tuple[object, ...]]] = {}
    for end in boundaries(log)[1:]:
        for node in parse(log[:end], folder).nodes.values():
            found.setdefault(node.digest, set()).add(_told(node))
    return found
