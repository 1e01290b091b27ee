"""Pace: how long this machine computes on a model's layers, measured before a weight is read.

The family's own code runs on rows and weights of random numbers that have the shapes of the model's. A weight that is larger
than the sample of memory takes part with as many of its rows as fit, and its time is scaled. It refuses to know of drives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .buffers import Arena
from .experts import Key
from .families.base import Angles, Attend, Family, Params, Recall, Step, Work
from .maths.attention import BLOCK, Block, attend
from .maths.layers import linear
from .mixing import Fetch, mix
from .piece import LINE, Param, Piece

SAMPLE_NBYTES = 96 << 20
"""Memory for weights that are tried: more than caches hold, so that they come from memory as a pass's do. One weight has half
of it with one row, and less with more, which take longer and read less."""
TILE = 1 << 19
"""Random numbers that are made; the sample repeats them."""
TIMES = {1: 3, 8: 1, 32: 1, 128: 1}
"""Rows that are tried, and how often. What lies between is interpolated, what lies above goes on as steeply as from 0."""
MOST, SHORT_S = 5, 0.01
"""How often, instead, what takes so few seconds is tried."""

Curve = dict[int, float]
"""Seconds by rows, ascending."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds by rows: of all `steps` of a pass that have no experts, but without attention; of those with experts, `mixtures`; of
    the `head`; and of folding one `block` of 1,024 positions into attention in one layer. `windows` are how many positions each
    of those layers sees."""

    steps: Curve
    mixtures: Curve
    head: Curve
    block: Curve
    windows: tuple[int | None, ...]

    def pass_s(self, rows: int, ends: int, context: int) -> float:
        """Seconds that a pass computes on `rows` rows, each at the end of `context` positions, of which `ends` are drawn from; without
        mixtures."""
        seen = sum(context if window is None else min(context, window) for window in self.windows)
        return at(self.steps, rows) + at(self.head, ends) + rows * at(self.block, 1) * seen / BLOCK

    def prefill_s(self, tokens: int, chunk_rows: int) -> float:
        """Seconds that a prompt of `tokens` computes, `chunk_rows` at a time, without mixtures."""
        seconds = in_chunks(self.steps, tokens, chunk_rows) + at(self.head, 1)
        each = at(self.block, min(tokens, chunk_rows)) / min(tokens, chunk_rows)  # of a row and a block
        for window in self.windows:
            most = tokens if window is None else min(tokens, window)
            seconds += each * most * (tokens - most / 2) / BLOCK
        return seconds

    def mixed_s(self, rows: int, chunk_rows: int) -> float:
        """Seconds that mixtures compute on `rows` rows."""
        return in_chunks(self.mixtures, rows, chunk_rows)


def in_chunks(curve: Curve, rows: int, chunk_rows: int) -> float:
    """The seconds of `rows` rows, `chunk_rows` at a time."""
    whole, rest = divmod(rows, chunk_rows)
    return whole * at(curve, chunk_rows) + (at(curve, rest) if rest else 0.0)


def at(curve: Curve, rows: int) -> float:
    """The seconds of `rows` rows."""
    for (low, before), (high, after) in pairwise(curve.items()):
        if rows <= high:
            return before + (after - before) * max(rows - low, 0) / (high - low)
    last, seconds = list(curve.items())[-1]
    return seconds * rows / last if rows > last else seconds


def measure(family: Family, pieces: Sequence[Piece], experts: Mapping[Key, Piece], window: int | None, most_nbytes: int) -> Pace:
    """Try each kind of piece, and count how often it comes; for the compute thread, within a second.

    No layer sees more than `window` positions. At most `most_nbytes` of memory are used, and given back.
    """
    whole = sum(piece.nbytes for piece in (*pieces, *experts.values()))
    trial = Trial(family, experts, Sample(min(most_nbytes, 2 * whole)))
    kinds = _kinds(pieces)
    steps, mixtures, head, block = (dict[int, float]() for _ in range(4))
    trial.warm_up([piece for piece, _ in kinds])
    for rows in TIMES:
        ran = [(piece.step, count * trial.step_s(piece, rows)) for piece, count in kinds if piece.step is not None]
        steps[rows] = sum(seconds for step, seconds in ran if step.experts is None)
        mixtures[rows] = sum(seconds for step, seconds in ran if step.experts is not None)
        head[rows] = sum(count * trial.head_s(piece, rows) for piece, count in kinds if piece.step is None)
        block[rows] = trial.block_s(rows)
    return Pace(
        rising(steps),
        rising(mixtures),
        rising(head),
        rising(block),
        tuple(family.kv.window(layer, window) for layer in range(family.kv.layers)),
    )


def rising(curve: Curve) -> Curve:
    """The same where fewer rows never take longer than more: then others kept the processor busy."""
    return dict(zip(curve, [*accumulate(reversed(curve.values()), min)][::-1], strict=True))


class Sample:
    """Memory full of random bfloat16 numbers, of which each weight takes the part that comes next."""

    def __init__(self, nbytes: int) -> None:
        self.arena = Arena(max(nbytes, 1 << 20), huge=False)
        self.most = self.arena.nbytes
        """Bytes of one weight that a product reads at most."""
        self._at = 0
        values = self.arena.tensor(0, torch.bfloat16, (self.arena.nbytes // 2,))
        tile = torch.randn(min(TILE, len(values)), generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
        for first in range(0, len(values), len(tile)):
            part = values[first : first + len(tile)]
            part.copy_(tile[: len(part)])

    def take(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A weight, or as many of its rows as there is memory for."""
        row = math.prod(shape[1:]) * dtype.itemsize
        rows = min(shape[0], self.arena.nbytes // row)
        nbytes = rows * row
        if self._at + nbytes > self.arena.nbytes:
            self._at = 0
        found = self.arena.tensor(self._at, dtype, (rows, *shape[1:]))
        self._at = -(-(self._at + nbytes) // LINE) * LINE
        return found


class Stand(Params):
    """Weights that stand in for a step's; `beyond_s` is what their products would have taken besides, in seconds."""

    def __init__(self, params: Mapping[str, Param], sample: Sample) -> None:
        self._wanted, self._sample = params, sample
        self.beyond_s = 0.0
        super().__init__({name: _filled(param, sample) for name, param in params.items()})

    def linear(self, name: str, x: Tensor) -> Tensor:
        """As of the whole weight; those of its rows that the sample leaves out come out as zeros."""
        weight, outs = self[name], self._wanted[name].shape[0]
        found = min(len(weight), max(self._sample.most // (weight.shape[1] * weight.itemsize), 1))
        if found == outs:
            return super().linear(name, x)
        start = perf_counter()
        y = linear(x, weight[:found])
        spent_s = perf_counter() - start
        y = torch.cat((y, y.new_zeros(len(y), outs - found)), dim=1)
        self.beyond_s += spent_s * outs / found - (perf_counter() - start)
        return y


def _filled(param: Param, sample: Sample) -> Tensor:
    if param.stored != torch.uint8 and (len(param.shape) < 2 or param.stored != param.dtype):
        return torch.full(param.shape, 0.5, dtype=param.dtype)
    return sample.take(param.stored, param.shape)


class Trial:
    """Runs a family's steps on stand-ins, and says how long they take."""

    def __init__(self, family: Family, experts: Mapping[Key, Piece], sample: Sample) -> None:
        self._family, self._experts, self._sample = family, experts, sample
        self._stands: list[Stand] = []
        self._heads = 1

    def warm_up(self, pieces: Sequence[Piece]) -> None:
        """The first time takes longer: it is not counted."""
        rows = max(TIMES)
        x, angles = self._rows(rows), self._family.angles(torch.arange(rows), rows)
        for piece in pieces:
            if piece.step is not None:
                self._run(piece.step, self._stand(piece), x, angles)

    def step_s(self, piece: Piece, rows: int) -> float:
        """Seconds of one step on `rows` rows, attention left out."""
        step = piece.step
        assert step is not None
        x, angles = self._rows(rows), self._family.angles(torch.arange(rows), rows)
        return self._median(rows, lambda: self._run(step, self._stand(piece), x, angles))

    def head_s(self, piece: Piece, rows: int) -> float:
        """Seconds of one block of the head."""
        x = self._rows(rows)
        return self._median(rows, lambda: self._stand(piece).linear("head", x))

    def block_s(self, rows: int) -> float:
        """Seconds of attention of `rows` queries to one block of history."""
        kv = self._family.kv
        noise = torch.Generator().manual_seed(rows)
        keys = torch.randn(BLOCK, kv.heads, kv.head_dim, generator=noise).to(kv.dtype)
        queries = torch.randn(rows, self._heads, kv.head_dim, generator=noise).to(kv.dtype)
        return self._median(rows, lambda: attend(queries, [Block(0, keys, keys)], BLOCK, kv.head_dim**-0.5)) if kv.layers else 0.0

    def _median(self, rows: int, work: Callable[[], object]) -> float:
        seconds: list[float] = []
        while len(seconds) < TIMES[rows] or (len(seconds) < MOST and sum(seconds) < SHORT_S):
            self._stands = []
            start = perf_counter()
            work()
            seconds.append(perf_counter() - start + sum(stand.beyond_s for stand in self._stands))
        return median(seconds)

    def _rows(self, rows: int) -> Tensor:
        self._sample.most = int(self._sample.arena.nbytes / 2 / rows**0.25)
        return torch.randn(rows, self._family.hidden, generator=torch.Generator().manual_seed(rows)).to(self._family.dtype)

    def _stand(self, piece: Piece) -> Stand:
        self._stands.append(Stand(piece.params, self._sample))
        return self._stands[-1]

    def _run(self, step: Step, weights: Params, x: Tensor, angles: Angles) -> None:
        """One step on rows x, its effects answered."""
        work = step.run(weights, x, angles)
        answer = None if step.experts is None else self._mix(step, weights, work)
        while True:
            try:
                effect = next(work) if answer is None else work.send(answer)
            except StopIteration:
                return
            if isinstance(effect, Recall):
                answer = effect.scan(effect.rows, None)[0]
            elif isinstance(effect, Attend):
                answer, self._heads = effect.queries, effect.queries.shape[1]

    def _mix(self, step: Step, weights: Params, work: Work) -> Tensor:
        """What the mixture comes to, by the code that a pass runs, with one stand-in after the other for the experts asked for."""
        mixing = mix(step, weights, [work], lambda: None, lambda call: None, lambda count: None)
        reply: Any = None
        while True:
            try:
                asked = mixing.send(reply)
            except StopIteration as done:
                mixed: Tensor = done.value[0]
                return mixed
            reply = asked.experts if isinstance(asked, Fetch) else [self._stand(self._experts[step.layer, 0])]


def _kinds(pieces: Sequence[Piece]) -> list[tuple[Piece, int]]:
    """One piece of each kind, and how many there are of it."""
    kinds: dict[Any, list[Piece]] = {}
    for piece in pieces:
        shapes = tuple((name, param.shape) for name, param in piece.params.items())
        kinds.setdefault((piece.step.name if piece.step is not None else "", shapes), []).append(piece)
    return [(alike[0], len(alike)) for alike in kinds.values()]
