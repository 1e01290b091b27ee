"""What is done to a store: sequences that share prefixes are written, flushed, continued, dropped and pushed out by a quota.

`emit` tells of it, in the words of `Promises`. It refuses to know what is broken meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from aollm.errors import AollmError, first_of
from aollm.maths.attention import BLOCK
from aollm.stores.cache import Cache
from aollm.stores.persistent import Persistent
from aollm.stores.store import Store

from .opening import Kind, session
from .sequences import SHAPE, Name, ids, rows

Emit = Callable[[list[Any]], None]
MANY = 24
"""Blocks of a store at which a random load begins to drop some."""


async def feed(cache: Cache, store: Store, name: Name, tokens: int, step: int = 700) -> None:
    """Have `store` go on with `name` up to `tokens`, a few hundred at a time."""
    store.accept(ids(name, tokens)[len(store.ids) :])
    while (at := store.tokens) < tokens:
        end = min(at + step, tokens)
        await cache.turn(end - at, min(end - at, BLOCK))
        for layer in range(SHAPE.layers):
            store.append(layer, *rows(name, layer, at, end))
            cache.settle(layer, [store])


async def write(cache: Cache, name: Name, emit: Emit, tokens: int | None = None) -> Store:
    """A store with `name`, its stored prefix adopted and the rest written and flushed."""
    tokens = len(name) * BLOCK if tokens is None else tokens
    emit(["begun", name, 0])
    store = cache.open()
    await cache.adopt(store, ids(name, tokens))
    await feed(cache, store, name, tokens)
    await flush(cache, name, tokens // BLOCK * BLOCK, emit)
    return store


async def flush(cache: Cache, name: Name, tokens: int, emit: Emit) -> None:
    """Flush, a second time if it fails; then it is acknowledged."""
    try:
        await cache.flush()
    except AollmError:
        await cache.flush()
    emit(["kept", name, tokens])


async def drop(cache: Cache, name: Name, keep: int, emit: Emit) -> None:
    """Have the store forget what follows the first `keep` blocks of `name`."""
    assert isinstance(cache.lifecycle, Persistent) and cache.records is not None
    emit(["released", name[: keep + 1], keep * BLOCK])
    index = cache.records.volume.index
    going = [node for node in index.nodes() if _path(index, node)[: keep + 1] == name[: keep + 1]]
    await cache.lifecycle.drop(sorted(going, key=lambda node: -node.index))


async def first(cache: Cache, emit: Emit) -> None:
    """Two sequences that share two blocks; the second leaves an incomplete one."""
    one = await write(cache, (1, 2, 3), emit)
    two = await write(cache, (1, 2, 4), emit)
    emit(["begun", (1, 2, 4, 5), 0])
    await feed(cache, two, (1, 2, 4, 5), 3 * BLOCK + 100)
    await one.aclose()
    await two.aclose()


async def second(cache: Cache, emit: Emit) -> None:
    """Both go on, a branch is dropped, and others take its room."""
    one = await write(cache, (1, 2, 3, 6), emit)
    await one.aclose()
    two = await write(cache, (1, 2, 4, 5), emit)
    await two.aclose()
    three = await write(cache, (7, 8), emit)
    await flush(cache, (7, 8), 2 * BLOCK, emit)
    await drop(cache, (1, 2, 3), 2, emit)
    for label in (9, 10, 12):
        await (await write(cache, (label,), emit)).aclose()
    await drop(cache, (9,), 0, emit)
    await drop(cache, (10,), 0, emit)
    await (await write(cache, (13, 14), emit)).aclose()
    await three.aclose()


async def third(cache: Cache, emit: Emit) -> None:
    """A quota that leaves little more than what is in use."""
    for name in ((1,), (9,), (10,), (12,), (13,)):
        emit(["released", name, 0])
    seven = await write(cache, (7, 8), emit)
    await (await write(cache, (11, 12), emit)).aclose()
    await flush(cache, (7, 8), 2 * BLOCK, emit)
    await seven.aclose()


async def script(root: Path, kind: Kind, emit: Emit, certain: bool = True) -> None:
    """Three runs, one after the other. `certain`: nothing fails, so that a clean end keeps the last block of each sequence;
    else what is in our words ends a run, and the next one begins."""
    limited = replace(kind, max_bytes=5 * SHAPE.layers * kind.record_nbytes)
    for run, what in ((kind, first), (kind, second), (limited, third)):
        emit(["run", (), 0])
        try:
            with anyio.fail_after(30):
                await session(root, run, partial(what, emit=emit))
        except (AollmError, ExceptionGroup) as error:
            if certain or not isinstance(first_of(error), AollmError):
                raise
            emit(["typed", type(first_of(error)).__name__, 0])
            continue
        if certain and what is first:
            emit(["kept", (1, 2, 4, 5), 3 * BLOCK + 100])


async def wander(cache: Cache, emit: Emit, seed: int, most: int | None = MANY) -> None:
    """A random load without end: short trees of sequences, each step another path; branches go when there are `most` blocks."""
    assert cache.records is not None
    draw = random.Random(seed)
    while True:
        name = tuple(10 * depth + draw.randrange(1, 4) for depth in range(draw.randrange(1, 5)))
        if cache.window is not None:  # nothing shared: a window that moves on takes blocks from others
            name = (draw.randrange(100, 1 << 20), *name[1:])
        index = cache.records.volume.index
        if most is not None and len(index) > most:
            gone = _path(index, draw.choice(index.nodes()))
            await drop(cache, gone, draw.randrange(len(gone)), emit)
        store = await write(cache, name, emit, len(name) * BLOCK - draw.choice([0, 0, 300, 900]))
        await store.aclose()


def _path(index: Any, node: Any) -> Name:
    """The labels of the blocks up to a node."""
    labels: list[int] = []
    while node is not None:
        labels.insert(0, int.from_bytes(node.ids[:4], "big") // BLOCK)
        node = index.get(node.parent)
    return tuple(labels)
