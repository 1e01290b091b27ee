"""The contract of KV stores: whatever is appended, cut off, forked, written, let go and found again, the history is right.

Each case opens a real cache and plays passes on it. Every preset on every disk has to pass all `cases` of its kind. It
knows no test runner, and refuses to know models.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ..maths.attention import BLOCK
from .cache import Cache
from .trial import Trial, expect, tokens_of


@dataclass(frozen=True, slots=True)
class Subject:
    """What is tried. `open(tokens)` gives a cache for sequences of `tokens` tokens together, each time with the same folder;
    one that writes may have memory for fewer, but for `LEAST` at least. `durable`: what one has stored, the next one finds."""

    open: Callable[[int], Awaitable[Cache]]
    durable: bool


LEAST = 4 * BLOCK
"""Tokens of memory that are enough for all cases where there is a disk."""


async def grows(subject: Subject) -> None:
    """Rows may come in any numbers."""
    async with Trial(await subject.open(LEAST)) as trial:
        pair = await trial.begin(LEAST)
        for number, rows in enumerate((1, 30, 992, 1, 1024, 1, 1400)):
            await trial.extend((pair, tokens_of(rows, number)))
        await trial.check()


async def truncates(subject: Subject) -> None:
    """A store goes on wherever it was cut off, in a block that is in memory or not."""
    async with Trial(await subject.open(LEAST)) as trial:
        pair = await trial.begin(LEAST)
        await trial.extend((pair, tokens_of(3500, 0)))
        for number, tokens in enumerate((3499, 3072, 2500, 2048, 1)):
            await trial.cache.flush()
            await trial.truncate(pair, tokens)
            await trial.check()
            await trial.extend((pair, tokens_of(20, number)))


async def forks(subject: Subject) -> None:
    """Twins share what they have in common, and do not see what their kin add."""
    async with Trial(await subject.open(2 * LEAST)) as trial:
        first = await trial.begin(2500)
        await trial.extend((first, tokens_of(1500, 0)))
        second, third = await trial.fork(first, 2500), await trial.fork(first, 2500)
        await trial.truncate(third, 700)
        await trial.extend((first, tokens_of(600, 1)), (second, tokens_of(700, 2)), (third, tokens_of(500, 3)))
        await trial.check()
        await trial.close(first)
        await trial.extend((second, tokens_of(3, 4)), (third, tokens_of(3, 5)))
        await trial.close(third)
        await trial.check()


async def spills(subject: Subject) -> None:
    """What has no room in memory is read from the disk, and memory stays within its bound."""
    cache = await subject.open(LEAST)
    async with Trial(cache) as trial:
        pair = await trial.begin(4 * LEAST)
        for number in range(7):
            await trial.extend((pair, tokens_of(cache.pool.tokens // 4, number)))
            limit = cache.pool.tokens * cache.pool.layers
            expect(cache.pool.all_rows <= limit, True, f"{cache.pool.all_rows} rows are at most {limit}")
        expect(trial.cold > 0 and cache.writer is not None and cache.writer.spills > 0, True, "blocks were written and read")


async def flushes(subject: Subject) -> None:
    """After a flush all whole blocks are on disk."""
    cache = await subject.open(LEAST)
    async with Trial(cache) as trial:
        pair = await trial.begin(LEAST)
        await trial.extend((pair, tokens_of(2500, 0)))
        await pair.store.flush()
        if cache.window is None:
            held = [[cell.place is not None for cell in pair.store.cells(layer)] for layer in range(cache.pool.layers)]
            expect(held, [[True, True, False]] * cache.pool.layers, "which blocks are on disk")
        expect(any(pair.store.dirty), False, "whether whole blocks are in memory only")
        await trial.check()


async def slides(subject: Subject) -> None:
    """However long a history gets, no more than the window and what is written together is kept."""
    cache = await subject.open(LEAST)
    async with Trial(cache) as trial:
        assert cache.window is not None and cache.records is not None
        pair, most = await trial.begin(21 * cache.window), -(-cache.window // BLOCK) + 3
        for number in range(20):
            await trial.extend((pair, tokens_of(cache.window, number)))
            kept = [len(pair.store.cells(layer)) for layer in range(cache.pool.layers)]
            expect(max(kept) < most, True, f"{kept} blocks kept, fewer than {most}")
            stored = cache.records.layout.nbytes // cache.records.record_nbytes
            expect(stored <= most * cache.pool.layers, True, f"{stored} blocks on disk, at most {most} a layer")
        expect(cache.evicted_tokens >= 18 * cache.window, True, "tokens were let go")


async def finds(subject: Subject) -> None:
    """The longest stored prefix is found again, in the same cache and in the next one; and by nobody with another salt."""
    ids, other = tokens_of(2248, 0), tokens_of(400, 1)
    cuts = {"all": ids, "more": ids + other, "less": ids[:1500], "other": ids[:1300] + other, "last": ids[:2148] + other}
    lengths = {"all": 2248, "more": 2248, "less": 1500, "other": 1300, "last": 2148}
    async with Trial(await subject.open(2 * LEAST)) as trial:
        pair = await trial.begin(2700)
        await trial.extend((pair, ids))
        await trial.close(pair)
        await trial.cache.flush()
        await _found(trial, cuts, lengths)
    if not subject.durable:
        return
    async with Trial(await subject.open(2 * LEAST)) as trial:
        await _found(trial, cuts, lengths | {"more": 2648, "other": 1700, "last": 2548})
        for salt, asked in (("salted", ids), ("", other)):
            expect((await trial.find(asked, 500, salt)).ids, [], "what strangers find")
        short = await trial.find(ids[:1024], 1200)
        await trial.extend((short, other[:31]))  # too little to be kept
    async with Trial(await subject.open(2 * LEAST)) as trial:
        pair = await trial.find(ids[:1024] + other, 1500)
        expect(len(pair.ids), 1024, "tokens that are found when the rest was too little")
        await trial.extend((pair, other))
        await trial.close(pair)
        await trial.cache.flush()
        expect(len((await trial.find(ids[:1024] + other, 1500)).ids), 1424, "tokens that are found of what was added")


async def remembers(subject: Subject) -> None:
    """What a window has moved past is let go, and yet the end of a long history is found again."""
    ids, other = tokens_of(7000, 0), tokens_of(2000, 1)
    for number in range(2 if subject.durable else 1):
        async with Trial(await subject.open(2 * LEAST)) as trial:
            if not number:
                pair = await trial.begin(7000)
                await trial.extend((pair, ids))
                await trial.close(pair)
                await trial.cache.flush()
            expect((await trial.find(ids[:1000], 1000)).ids, [], "what is found of the beginning")
            pair = await trial.find(ids + other, 9000)
            expect(len(pair.ids), 7000, "tokens that are found of the whole")
            await trial.check()
            if number or not subject.durable:
                await trial.extend((pair, other))
                expect(await trial.truncate(pair, 8900), 8900, "tokens after a cut within the window")
                await trial.check()
                expect(await trial.truncate(pair, 4000), 0, "tokens after a cut to before the window")


async def _found(trial: Trial, cuts: dict[str, list[int]], lengths: dict[str, int]) -> None:
    for name, asked in cuts.items():
        pair = await trial.find(asked, 2700)
        expect(len(pair.ids), lengths[name], f"tokens that are found of {name}")
        await trial.check()
        await trial.extend((pair, asked[len(pair.ids) :]))
        await trial.check()
        await trial.close(pair)


Case = Callable[[Subject], Awaitable[None]]


def cases(on_disk: bool, windowed: bool, persistent: bool) -> list[Case]:
    """What a cache of a kind has to pass."""
    found: list[Case] = [grows, truncates, forks]
    found += [flushes] if on_disk else []
    found += [spills] if on_disk and not windowed else []
    found += [slides] if windowed else []
    return found + ([remembers if windowed else finds] if persistent else [])
