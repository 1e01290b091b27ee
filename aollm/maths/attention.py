"""Attention folded over blocks of keys and values, in any order, with an online softmax.

Each fold is a flash kernel that returns its log-sum-exp; folds are merged exactly (Milakov and Gimelshein, 2018; Dao et
al., 2022). Nothing here holds a full score matrix or a full history. Blocks are cut at fixed positions, so that a result
does not depend on where they were stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1024
"""Positions at which a history is cut are multiples of this many tokens."""

Span = tuple[int, int]
"""Positions [a, b) that all see each other."""


@dataclass(frozen=True, slots=True)
class Block:
    """Keys and values [S, K, D] of positions from `start` on."""

    start: int
    keys: Tensor
    values: Tensor

    @property
    def end(self) -> int:
        """The position just past the last key."""
        return self.start + self.keys.shape[0]


class Fold:
    """The running result of queries [T, H, D] at positions from `start` on, over the blocks folded so far.

    Blocks may come in any order: one that comes before its turn waits as what it adds, so that the sum does not depend on it.
    `sinks` and `spans` as in `Attention`.
    """

    def __init__(
        self, queries: Tensor, start: int, scale: float, window: int | None = None, sinks: Tensor | None = None, spans: Sequence[Span] = ()
    ) -> None:  # fmt: skip
        self._queries = queries
        self._start, self._end = start, start + queries.shape[0]
        self._scale, self._window = scale, window
        self._sinks = sinks
        self._spans = [(low, high) for low, high in spans if low < self._end and high > start]
        self._low = first_seen(start, window)  # the keys that any query sees
        self._high = max([self._end, *(high for _, high in self._spans)])
        self._out: Tensor | None = None  # [T, H, D] in the queries' type after one fold, float32 after more
        self._weight: Tensor | None = None  # log-sum-exp [T, H, 1]
        self._turn = self._low // BLOCK * BLOCK
        self._early: dict[int, tuple[int, list[tuple[Tensor, Tensor]]]] = {}

    def wants(self, start: int, end: int) -> bool:
        """Whether any query sees any position of [start, end): blocks that none sees need not be read."""
        return start < self._high and end > self._low

    def add(self, block: Block) -> None:
        """Fold one block in."""
        self._early[block.start] = block.end, [_flash(self._queries, *part, self._scale) for part in self._parts(block)]
        while self._turn in self._early:
            self._turn, parts = self._early.pop(self._turn)
            self._merge(parts)

    def result(self) -> Tensor:
        """[T, H, D] in the queries' dtype."""
        for start in sorted(self._early):
            self._merge(self._early.pop(start)[1])
        assert self._out is not None and self._weight is not None
        out = self._out
        if self._sinks is not None:
            out = out * torch.sigmoid(self._weight - self._sinks.float()[:, None])
        return out.to(self._queries.dtype)

    def _merge(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        for out, weight in parts:
            if self._out is None or self._weight is None:
                self._out, self._weight = out, weight
                continue
            total = torch.logaddexp(self._weight, weight)
            base = total.clamp_min(torch.finfo(total.dtype).min)  # a query that has seen nothing yet weighs nothing, not NaN
            self._out = self._out * (self._weight - base).exp() + out * (weight - base).exp()  # float32: the weights are
            self._weight = total

    def _parts(self, block: Block) -> Iterator[tuple[Block, bool, Tensor | None]]:
        """Cut a block so that each part is seen whole, causally, or through a mask."""
        low, high = max(block.start, self._low), min(block.end, self._high)
        if self._end - self._start == 1:
            yield _cut(block, low, high), False, None
            return
        for start, end in ((low, min(high, self._start)), (max(low, self._start), high)):
            if start >= end:
                continue
            own = start >= self._start
            if (self._window is not None and start <= self._end - 1 - self._window) or (own and (start > self._start or self._spans)):
                yield _cut(block, start, end), False, self._mask(start, end)
            else:
                yield _cut(block, start, end), own, None

    def _mask(self, start: int, end: int) -> Tensor:
        queries = torch.arange(self._start, self._end)[:, None]
        keys = torch.arange(start, end)[None]
        seen = keys <= queries
        for low, high in self._spans:
            seen[max(low - self._start, 0) : high - self._start, max(low - start, 0) : max(high - start, 0)] = True
        if self._window is not None:
            seen &= keys > queries - self._window
        return torch.zeros(seen.shape, dtype=self._queries.dtype).masked_fill_(~seen, -torch.inf)


class Attention:
    """Causal attention of queries [T, H, D] at positions `start`…, folded block by block.

    Queries are taken in tiles that end where blocks do. `window`: a query sees only the last `window` positions, its own included.
    `sinks` [H]: one more logit for each head, whose share of the softmax is dropped (Xiao et al., 2023; as gpt-oss has it).
    `spans`: disjoint ranges of positions; queries in one see its keys in both directions, within the window. `queries` has
    all of a span's positions or none.
    """

    def __init__(
        self, queries: Tensor, start: int, scale: float, window: int | None = None, sinks: Tensor | None = None, spans: Sequence[Span] = ()
    ) -> None:  # fmt: skip
        self._folds: list[Fold] = []
        row = 0
        while row < queries.shape[0]:
            rows = min(BLOCK - (start + row) % BLOCK, queries.shape[0] - row)
            self._folds.append(Fold(queries[row : row + rows], start + row, scale, window, sinks, spans))
            row += rows

    def add(self, block: Block) -> None:
        """Fold one block into the tiles that see it."""
        for fold in self._folds:
            if fold.wants(block.start, block.end):
                fold.add(block)

    def result(self) -> Tensor:
        """[T, H, D] in the queries' dtype."""
        results = [fold.result() for fold in self._folds]
        return results[0] if len(results) == 1 else torch.cat(results)


def first_seen(position: int, window: int | None) -> int:
    """The first position that a query at `position` sees."""
    return 0 if window is None else max(0, position - window + 1)


def attend(
    queries: Tensor, blocks: Sequence[Block], start: int, scale: float, window: int | None = None, sinks: Tensor | None = None,
    spans: Sequence[Span] = (),
) -> Tensor:  # fmt: skip
    """Attention of queries [T, H, D] at positions `start`… over blocks in memory, as `Attention` has it; returns [T, H, D]."""
    attention = Attention(queries, start, scale, window, sinks, spans)
    for block in blocks:
        attention.add(block)
    return attention.result()


def _cut(block: Block, start: int, end: int) -> Block:
    if (start, end) == (block.start, block.end):
        return block
    return Block(start, block.keys[start - block.start : end - block.start], block.values[start - block.start : end - block.start])


def _flash(queries: Tensor, block: Block, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp [T, H, 1] (float32, -inf where a query sees nothing)."""
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries.transpose(0, 1)[None], block.keys.transpose(0, 1)[None], block.values.transpose(0, 1)[None],
        0.0, causal, attn_mask=mask, scale=scale,
    )  # fmt: skip
    weight = weight[0].transpose(0, 1)[..., None]
    if mask is not None:
        weight = weight.masked_fill((mask == -torch.inf).all(-1)[:, None, None], -torch.inf)
    return out[0].transpose(0, 1), weight
