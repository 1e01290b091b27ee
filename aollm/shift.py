"""Context shift: when a sequence has filled its context, the older half of what follows its first tokens is left out.

Where the family can turn its keys to earlier positions, what is kept is turned, layer by layer; where it cannot, or a block
cannot be read, what is kept is prefilled again. The logical history stays whole either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from torch import Tensor

from .compute import Compute
from .errors import StoreError
from .maths.attention import BLOCK
from .request import Answer
from .stores.cache import Cache
from .stores.cell import Cell
from .stores.store import Store
from .sweep import Model

PART = 256
"""Rows that are turned at a time."""


async def shift(answer: Answer, model: Model, compute: Compute) -> None:
    """Make room in the context of `answer`. Between passes."""
    store, kv, cache = answer.store, model.family.kv, model.cache
    assert store is not None
    keep, dropped, end = answer.drop_half()
    if answer.request.shift == "rotate" and kv.shift is not None and not store.states and cache.window is None:
        private, store.private = store.private, True  # turned blocks are not to be found by tokens
        try:
            for layer in range(kv.layers):
                await _turn(store, layer, keep, dropped, end, model, compute)
        except StoreError:
            store.private = private
        else:
            store.replaced(answer.visible)
            return
    position = store.truncate(keep)
    try:
        await cache.ready(store)
    except StoreError:
        position = store.truncate(position // BLOCK * BLOCK)
    answer.resume(position)


async def _turn(store: Store, layer: int, keep: int, dropped: int, end: int, model: Model, compute: Compute) -> None:
    """Turn a layer's rows from `keep` + `dropped` on by `dropped` positions, block by block: no more is in memory than fits."""
    cache, first, turn = model.cache, keep + dropped, model.family.kv.shift
    assert turn is not None
    cells = deque(store.cells(layer, first))
    cache.memory.own(cells)
    try:
        await cache.relieve(2 * BLOCK)  # once they are cut off they are not written any more
        cache.memory.disown(store.cut(layer, keep))
        await cache.ready(store)
        while cells:
            low, high = max(first - cells[0].start, 0), min(end - cells[0].start, BLOCK)
            keys, values = await _rows(cells[0], low, max(low, high), cache, compute)
            for at in range(0, max(0, high - low), PART):
                part = slice(at, at + PART)
                await cache.relieve(PART)
                await compute.run(partial(_append, store, layer, turn, keys[part], values[part], dropped))
                cache.settle(layer, [store])
                cache.memory.pass_by(model.family.kv.layers - 1)
            cache.memory.disown([cells.popleft()])
    finally:
        cache.memory.disown(cells)


def _append(
    store: Store, layer: int, turn: Callable[[Tensor, int], Tensor], keys: Tensor, values: Tensor, dropped: int
) -> None:  # fmt: skip
    store.append(layer, turn(keys, dropped), values)


async def _rows(cell: Cell, low: int, high: int, cache: Cache, compute: Compute) -> tuple[Tensor, Tensor]:
    """Copies of a cell's rows [low, high), wherever they are."""
    if cell.slot is not None:
        keys, values = cell.slot.keys, cell.slot.values
    else:
        assert cache.records is not None
        keys, values = await compute.run((await cache.records.read_apart(cell)).decode)
    return keys[low:high].clone(), values[low:high].clone()
