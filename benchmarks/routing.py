"""Made routing traces, and how many of their questions a cache of experts answers without a read.

Routers are not run: whom rows are sent to is drawn. It refuses to know models and drives; experts are a few bytes in memory.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter, OrderedDict
from itertools import accumulate

from aollm import MemoryDisk
from aollm.buffers import PAGE
from aollm.disk.base import Extent
from aollm.experts import ExpertCache, Key
from aollm.trace import Trace
from aollm.weights import Piece

LAYERS, EXPERTS, TOP = 6, 32, 4
PASSES, COLD, TOPIC = 1600, 400, 200
"""Tokens of a routing trace, those before anything counts, and those after which a topic changes."""
Routing = list[list[list[int]]]
"""Which experts are asked for, by pass and layer."""


def drawn(skewed: bool, topic: int | None) -> Routing:
    """Who would be asked: anybody alike, or by Zipf's law in an order that is each layer's own, and drawn anew after each topic."""
    chance = random.Random(7)
    weights = list(accumulate(1 / (rank + 1) if skewed else 1.0 for rank in range(EXPERTS)))
    orders = [chance.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]

    def chosen(order: list[int]) -> list[int]:
        found: set[int] = set()
        while len(found) < TOP:
            found.add(order[bisect(weights, chance.random() * weights[-1])])
        return sorted(found)

    passes: Routing = []
    for number in range(PASSES):
        if topic is not None and number and number % topic == 0:
            orders = [chance.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
        passes.append([chosen(order) for order in orders])
    return passes


async def own_hits(passes: Routing, slots: int) -> float:
    """The share of questions that `ExpertCache` answers without a read. All pieces are the same few bytes."""
    disk = MemoryDisk({"experts": bytes(8)})
    pieces: dict[Key, Piece] = {
        (layer, number): Piece(f"layer {layer} expert {number}", layer, PAGE, ((Extent("experts", 0, 8), 0),), {}, None)
        for layer in range(LAYERS)
        for number in range(EXPERTS)
    }
    cold = 0
    async with ExpertCache(pieces, slots, PAGE, disk, Trace()) as cache:
        for number, layers in enumerate(passes):
            if number == COLD:
                cold = len(disk.reads)
            for layer, chosen in enumerate(layers):
                left = len(cache.fetch(layer, chosen, 1))
                while left:
                    arrived = len(await cache.next())
                    cache.release(arrived)
                    left -= arrived
            cache.stop()
    return 1 - (len(disk.reads) - cold) / ((PASSES - COLD) * LAYERS * TOP)


def simple_hits(passes: Routing, slots: int, newest: bool) -> float:
    """The same of a cache that keeps whom it used last, or most often since it began."""
    kept: OrderedDict[Key, None] = OrderedDict()
    used: Counter[Key] = Counter()
    hits = 0
    for number, layers in enumerate(passes):
        for layer, chosen in enumerate(layers):
            keys = [(layer, expert) for expert in chosen]
            hits += sum(key in kept for key in keys) if number >= COLD else 0
            for key in keys:
                used[key] += 1
                if key in kept:
                    kept.move_to_end(key)
                    continue
                if len(kept) == slots:
                    del kept[next(iter(kept)) if newest else min((each for each in kept if each not in keys), key=used.__getitem__)]
                kept[key] = None
    return hits / ((PASSES - COLD) * LAYERS * TOP)
