"""A cache moves to another home between passes, with the histories that it has.

Cells in memory stay where they are; those on disk are read, and go into memory or to the new disk. What cannot come along is cut
off and computed again by whoever needs it. Until the last step the old home is whole. It refuses to know why a cache moves.
"""

from __future__ import annotations

import anyio

from ..buffers import PAGE, Ring
from ..errors import AollmError, StoreError
from ..maths.attention import BLOCK
from .cache import Cache
from .cell import Cell, copied
from .home import Home
from .record import Place
from .records import Item, Records
from .store import Store


async def move(cache: Cache, home: Home) -> tuple[int, str | None]:
    """Have `cache`, whose histories are all idle, go on in `home`; returns how many tokens were cut off, and why what it has left
    could not be removed. Until this returns nobody may begin a pass; who cancels it, or whom it fails, has the old home.

    Only for what is gone with its runtime.
    """
    places, ring_nbytes = dict[Cell, Place](), cache.ring.arena.nbytes
    before = sum(store.tokens for store in cache.idle.values())
    try:
        await cache.writing.pause()
        if cache.writer is not None:
            await cache.writer.drain()
        cache.memory.pass_by(cache.pool.layers - 1)
        if home.records is None:
            cache.ring = Ring(PAGE)  # its memory is for what comes back
        while await _prepared(cache, home, places):
            pass
        left = cache.rehouse(home, places)
    except BaseException:
        if cache.ring.arena.nbytes != ring_nbytes:
            cache.ring = Ring(ring_nbytes)
        raise
    finally:
        cache.writing.resume()
    after = sum(store.tokens for store in cache.idle.values())
    return max(before - after, 0), await _closed(left)


async def _prepared(cache: Cache, home: Home, places: dict[Cell, Place]) -> bool:
    """Deal with what stands in the way; whether there was anything. The histories that were used last come first."""
    lossy = cache.records is not None and bool(cache.records.codec.representation)
    room, cold = home.tokens, list[tuple[Store, Cell]]()
    for store in reversed(cache.idle.values()):
        for layer in range(cache.pool.layers) if lossy else ():  # what was rounded once is neither rounded again nor taken for exact
            for cell in [cell for cell in store.cells(layer) if cell.place is not None][:1]:
                store.truncate(cell.start)
        if home.reservation(store.tokens) > room:
            store.truncate(room // BLOCK * BLOCK)
        room -= home.reservation(store.tokens)
        cold += [(store, cell) for layer in range(cache.pool.layers) for cell in store.cells(layer) if cell.slot is None]
    cold = [(store, cell) for store, cell in cold if cell not in places]
    for store, cell in cold:
        if store.closed or cell.slot is not None or cell in places or not cell.owners:
            continue  # meanwhile
        try:
            await _brought(cache, home, store, cell, places)
        except StoreError:
            store.truncate(cell.start)
    return bool(cold)


async def _brought(cache: Cache, home: Home, store: Store, cell: Cell, places: dict[Cell, Place]) -> None:
    """Read a cell, and keep it in memory or write it to its new disk. Raises `StoreError`."""
    assert cache.records is not None
    while home.records is not None and not cache.memory.fits(BLOCK):
        if not cache.memory.evict_one():
            raise StoreError("there is no room in memory for a block on its way")
    if cache.pool.spare <= 2 * cache.pool.layers:  # the next pass begins blocks, too
        raise StoreError("there are too many blocks that are not whole")
    loaded = await cache.records.read_apart(cell)
    with anyio.CancelScope(shield=True):  # a slot that was taken and not told of would be lost
        copy = await cache.compute(lambda: copied(cache.pool, cell, *loaded.decode()))
    if home.records is None:
        cache.memory.promote(cell, copy)
        return
    try:
        with anyio.CancelScope(shield=True):
            await home.records.write([Item(copy, copy.rows, store.number)])
        assert copy.place is not None
        places[cell] = copy.place
    except AollmError as error:
        raise StoreError(f"it could not be written: {error}") from error
    finally:
        cache.pool.give([(copy.slot, copy.layer, copy.rows)] if copy.slot is not None else [])


async def _closed(left: Records | None) -> str | None:
    if left is not None:
        try:
            with anyio.CancelScope(shield=True):
                await left.aclose()
        except AollmError as error:
            return str(error)
    return None
