"""One pass over the layers for all live requests: a generator that runs in the compute thread.

It resumes the family's steps and performs their effects on the stores. Where it needs what is not in memory yet it
yields to the event loop, and is resumed with it. It refuses to know how requests come, go and are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .buffers import Lease
from .families.base import Angles, Attend, Family, Step
from .maths.attention import attend
from .maths.layers import linear
from .trace import Event, Trace
from .weights import Piece, Weights


@dataclass(frozen=True, slots=True)
class Load:
    """Wait for the next streamed piece; answered with its parameters and its lease."""

    piece: Piece


@dataclass(frozen=True, slots=True)
class Leave:
    """Requests of `batch` were cancelled; answered when those that are not in `stay` have been let go."""

    batch: Batch
    stay: Batch


Wait = Load | Leave


@dataclass(frozen=True)
class Model:
    """What every pass uses: the family, its weights, the last norm, and how many rows are computed at a time."""

    family: Family
    weights: Weights
    norm: Tensor
    chunk_rows: int
    trace: Trace
    release: Callable[[Lease], None]
    """Hands a lease back; callable from the compute thread."""


def sweep(model: Model, batch: Batch, x: Tensor) -> Generator[Wait, Any, tuple[Batch, Tensor]]:
    """Run rows x [T, hidden] through all pieces. Returns who stayed to the end and the logits [N, vocabulary] of those
    segments whose input ended, in order."""
    angles = batch.angles(model.family)
    logits = last = torch.empty(0)
    for index, piece in enumerate(model.weights.pieces):
        if batch.cancelled and (piece.step is not None or all(request.cancelled for request in batch.requests)):
            stay, keep = batch.without_cancelled()
            x, angles = x[keep], tuple(kind[keep] for kind in angles)
            yield Leave(batch, stay)
            batch = stay
        if not batch.segments:
            logits = logits[:0]
            break
        weights, lease = model.weights.pinned(index), None
        if weights is None:
            weights, lease = yield Load(piece)
        start = perf_counter()
        try:
            if piece.step is not None:
                x = _step(model, piece.step, weights, batch, x, angles)
            else:
                if piece.first_row == 0:
                    ends = [segment.first + segment.rows - 1 for segment in batch.segments if segment.ends_input]
                    last = model.family.finish(x[ends], model.norm)  # [N, hidden]
                    logits = x.new_empty(len(ends), model.family.vocabulary)
                if len(logits):
                    logits[:, piece.first_row : piece.first_row + len(weights["head"])] = linear(last, weights["head"])
        finally:
            if lease is not None:
                model.release(lease)
        model.trace.add(Event("compute", start, perf_counter(), piece.layer, rows=len(batch), label=piece.label))
        for request in batch.requests:
            request.progress = (index + 1) / len(model.weights.pieces)
    return batch, logits


def _step(model: Model, step: Step, weights: Mapping[str, Tensor], batch: Batch, x: Tensor, angles: Angles) -> Tensor:
    """One step for all rows, `chunk_rows` at a time: what the step needs besides x does not grow with the prompt."""
    rows = x.shape[0]
    if rows <= model.chunk_rows:
        return _chunk(step, weights, batch, x, angles, 0)
    for first in range(0, rows, model.chunk_rows):
        cut = slice(first, first + model.chunk_rows)
        x[cut] = _chunk(step, weights, batch, x[cut], tuple(kind[cut] for kind in angles), first)
    return x


def _chunk(step: Step, weights: Mapping[str, Tensor], batch: Batch, x: Tensor, angles: Angles, first: int) -> Tensor:
    work = step.run(weights, x, angles)
    answer: Tensor | None = None
    while True:
        try:
            effect = next(work) if answer is None else work.send(answer)
        except StopIteration as done:
            result: Tensor = done.value
            return result
        answer = _attend(effect, batch, first)


def _attend(effect: Attend, batch: Batch, first: int) -> Tensor:
    """Append each segment's keys and values to its store and fold its blocks."""
    parts = []
    for segment, low, high, position in batch.within(first, first + effect.queries.shape[0]):
        segment.store.append(effect.layer, effect.keys[low:high], effect.values[low:high])
        blocks = segment.store.blocks(effect.layer)
        parts.append(attend(effect.queries[low:high], blocks, position, effect.scale, effect.window))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
