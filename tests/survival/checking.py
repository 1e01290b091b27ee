"""What is found when a store is opened again: how much of each sequence, whether any byte is wrong, and what lies about.

It compares with what the names say, never with what was read before. It refuses to know what happened to the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from aollm.errors import StoreError
from aollm.maths.attention import BLOCK
from aollm.stores.cache import Cache

from .opening import Kind, session
from .promises import Promises
from .sequences import Name, ids, rows

FINE = 1e-6
COARSE = 8 / 127 / 2
"""Of int8: half a step, of values up to 1, for each time that a block was stored, continued and stored again."""


@dataclass(slots=True)
class Found:
    """Tokens by name, what is wrong in words, and what the volume gave up when it was opened."""

    tokens: dict[Name, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    gave_up: int = 0
    missed: int = 0
    rubbish: list[str] = field(default_factory=list)


async def look(cache: Cache, kind: Kind, name: Name, found: Found, tokens: int | None = None) -> int:
    """How many tokens of `name` the store has; damaged blocks are counted as missed, wrong rows in `found.wrong`."""
    assert cache.records is not None
    store = cache.open()
    whole, _ = await cache.adopt(store, ids(name, tokens))
    reached = whole
    for layer in range(cache.pool.layers):
        for cell in store.cells(layer):
            count = min(BLOCK, whole - cell.start)
            if cell.slot is not None:
                keys, values = cell.slot.keys, cell.slot.values
            else:
                try:
                    keys, values = (await cache.records.read_apart(cell)).decode()
                except StoreError as error:
                    found.missed += 1
                    reached = min(reached, cell.start)
                    await cache.missed(store, cell.start, error)
                    continue
            wanted_keys, wanted_values = rows(name, layer, cell.start, cell.start + count)
            most = COARSE if kind.row.codec.representation else FINE
            for got, wanted in ((keys[:count], wanted_keys), (values[:count], wanted_values)):
                if got.shape != wanted.shape or float((got - wanted).abs().max()) > most:
                    found.wrong.append(f"{name} layer {layer} block {cell.index}")
    await store.aclose()
    return reached


async def inspect(root: Path, kind: Kind, names: Iterable[Name], compare: bool = True) -> Found:
    """Open the store once and look at all of `names`; without `compare`, only at what it says that it has."""
    found = Found()

    async def body(cache: Cache) -> None:
        assert cache.records is not None
        volume = cache.records.volume
        named = {os.path.basename(place.extent.file) for node in volume.index.nodes() for place in (*node.places, *node.states)}
        found.rubbish = sorted(set(os.listdir(volume.path)) - named - {"LOCK", "manifest"})
        found.gave_up = volume.lost + volume.quarantined + volume.tail_truncated_bytes
        for name in sorted(names):
            if compare:
                found.tokens[name] = await look(cache, kind, name, found)
            else:
                found.tokens[name] = (await cache.lifecycle.find(cache.lifecycle.root(""), ids(name), kind.window)).tokens

    with anyio.fail_after(30):
        await session(root, kind, body)
    return found


async def check(root: Path, kind: Kind, promises: Promises, missing: bool = False, damaged: bool = False) -> list[str]:
    """What is not as promised: nothing wrong, nothing acknowledged lost, nothing left over, and a second opening finds no more
    to mend. `missing`: what was not acknowledged may have been named before it was there. `damaged`: anything may be lost."""
    descriptors = open_descriptors()
    once = await inspect(root, kind, promises.known)
    again = await inspect(root, kind, promises.known, compare=False)
    said = [f"wrong bytes: {text}" for text in once.wrong]
    if not damaged:
        lost = {name: (tokens, once.tokens.get(name, 0)) for name, tokens in promises.kept.items() if once.tokens.get(name, 0) < tokens}
        said += [f"acknowledged {tokens} tokens of {name}, found {there}" for name, (tokens, there) in lost.items()]
        said += [f"left over: {name}" for name in once.rubbish if not (missing and name.startswith("manifest.damaged-"))]
    if once.missed and not (missing or damaged):
        said.append(f"{once.missed} records cannot be read")
    if again.gave_up and not (once.missed and (missing or damaged)):  # what followed a damaged block goes with the next opening
        said.append(f"the second opening gave up {again.gave_up}")
    if any(again.tokens[name] < tokens for name, tokens in once.tokens.items()):
        said.append(f"the second opening found less: {once.tokens} then {again.tokens}")
    said += [f"a temporary is left: {name}" for name in again.rubbish if not name.startswith("manifest.damaged-")]
    if left := open_descriptors() - descriptors:
        said.append(f"descriptors are left open: {left}")
    return said


def open_descriptors() -> set[str]:
    """Of this process, but for the one that lists them."""
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
