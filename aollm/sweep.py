"""One pass over the layers for all live requests: a generator that runs in the compute thread.

It resumes the family's steps and performs their effects on the stores. Where it needs what is not in memory yet it
yields to the event loop, and is resumed with it. It refuses to know how requests come, go and are sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from .adapters import Adapters
from .batch import Batch, Segment
from .berths import Berths
from .device import Device, Host
from .errors import StoreError
from .experts import ExpertCache
from .families.base import Angles, Attend, Family, Params, Recall, Step
from .itinerary import itinerary
from .maths.attention import BLOCK, Attention, Block
from .maths.layers import linear
from .mixing import Arrive, Fetch, mix
from .piece import Piece
from .stores.cache import Cache
from .stores.cell import Cell, copied
from .stores.records import Loaded
from .stores.store import Store
from .trace import Event, Trace
from .weights import Weights


@dataclass(frozen=True, slots=True)
class Load:
    """Wait for the next streamed piece; answered with its parameters and its lease."""

    piece: Piece


@dataclass(frozen=True, slots=True)
class Leave:
    """Some of `batch` were cancelled, or lost a part of their history; answered when those that are not in `stay` have been let go."""

    batch: Batch
    stay: Batch
    piece: int
    """The piece at which the rest goes on."""


@dataclass(frozen=True, slots=True)
class Gather:
    """Wait for the next run of stored blocks; answered with what was loaded and its lease, or with a `StoreError`."""


@dataclass(frozen=True, slots=True)
class Room:
    """Wait until `rows` rows of keys and values have room."""

    rows: int


Wait = Load | Leave | Gather | Room | Fetch | Arrive


@dataclass(frozen=True)
class Model:
    """What every pass uses: the family, its weights and experts, the last norm, the KV cache, how many rows are computed at a time,
    and where. Keys, values and states are in the host's memory; what a step asks of them is brought there and back."""

    family: Family
    weights: Weights
    experts: ExpertCache
    norm: Tensor
    cache: Cache
    adapters: Adapters
    chunk_rows: int
    trace: Trace
    post: Callable[[Callable[[], object]], None]
    """Has a call run on the event loop; callable from the compute thread."""
    device: Device = field(default_factory=Host)
    berths: Berths | None = None
    """Where experts are computed with, if not where they are read to."""

    @cached_property
    def followed_by(self) -> dict[int, int]:
        """For each layer with experts, the piece of the next one."""
        routed = [(piece.layer, index) for index, piece in enumerate(self.weights.pieces) if piece.step and piece.step.experts]
        return {layer: index for (layer, _), (_, index) in pairwise(routed)}


def sweep(model: Model, batch: Batch, x: Tensor) -> Generator[Wait, Any, tuple[Batch, Tensor]]:
    """Run rows x [T, hidden] through all pieces. Returns who stayed to the end and the logits [N, vocabulary] of those
    segments whose input ended, in order."""
    device = model.device
    x, angles, mask = model.family.begin(device.put(x)), tuple(map(device.put, batch.angles(model.family))), _mask(model, batch)
    for first, rows in batch.inserts:
        x[first : first + len(rows)] = device.put(rows)
    batch.inserts.clear()
    logits = last = torch.empty(0)
    for index, piece in enumerate(model.weights.pieces):
        if batch.leaving and (piece.step is not None or batch.all_leaving):
            stay, keep = batch.without_leaving()
            x, angles, mask = x[keep], tuple(kind[keep] for kind in angles), None if mask is None else mask[keep]
            yield Leave(batch, stay, index)
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
                x, start = yield from _timed(model, piece, batch, run_step(model, piece.step, weights, batch, x, angles, mask))
            else:
                if piece.first_row == 0:
                    ends = [segment.first + segment.rows - 1 for segment in batch.segments if segment.ends_input]
                    last = model.family.finish(x[ends], model.norm)  # [N, hidden]
                    logits = x.new_empty(len(ends), model.family.vocabulary)
                if len(logits):
                    head = weights["head"]
                    logits[:, piece.first_row : piece.first_row + head.shape[0]] = linear(last, head)
        finally:
            if lease is not None:
                model.post(partial(model.weights.release, lease, device.mark()))
        model.trace.add(_computed(piece, batch, start))
        for request in batch.requests:
            request.progress = (index + 1) / len(model.weights.pieces)
    return batch, device.fetch(logits)


def _timed(model: Model, piece: Piece, batch: Batch, work: Generator[Wait, Any, Tensor]) -> Generator[Wait, Any, tuple[Tensor, float]]:
    """Run a step and note when it computes, between one wait and the next; returns its rows and when the last part began."""
    reply: Any = None
    while True:
        start = perf_counter()
        try:
            wait = work.send(reply)
        except StopIteration as done:
            return done.value, start
        model.trace.add(_computed(piece, batch, start))
        reply = yield wait


def _computed(piece: Piece, batch: Batch, start: float) -> Event:
    return Event("compute", start, perf_counter(), piece.layer, rows=len(batch), label=piece.label)


def run_step(
    model: Model, step: Step, weights: Params, batch: Batch, x: Tensor, angles: Angles, mask: Tensor | None
) -> Generator[Wait, Any, Tensor]:  # fmt: skip
    """One step for all rows, `chunk_rows` at a time: what the step needs besides x does not grow with the prompt."""
    rows = x.shape[0]
    if step.attends is not None and model.cache.pressed(rows):
        yield Room(rows)
    promoted: list[tuple[Cell, Cell]] = []
    cuts = batch.cuts(model.chunk_rows)
    own = [weights if mask is None else weights.with_deltas(model.adapters.deltas(step, mask[cut])) for cut in cuts]
    works = [step.run(params, x[cut], tuple(kind[cut] for kind in angles)) for params, cut in zip(own, cuts, strict=True)]
    answers: list[Tensor | None] = [None] * len(works)
    if step.experts is not None:
        likely = partial(_likely, model, step, x)
        answers = [*(yield from mix(step, weights, works, likely, model.post, model.experts.release, model.berths))]
    for cut, work, answer in zip(cuts, works, answers, strict=True):
        while True:
            try:
                effect = next(work) if answer is None else work.send(answer)
            except StopIteration as done:
                if len(cuts) == 1:
                    x = done.value
                else:
                    x[cut] = done.value
                break
            if isinstance(effect, Attend):
                asked = effect if not model.device.apart else _fetched(effect, model.device)
                answer = yield from _attend(model, asked, batch, cut.start, promoted if cut.stop == rows else None)
                answer = model.device.put(answer)
            elif isinstance(effect, Recall):
                answer = _carry(effect, batch, cut.start, model.device)
    if step.attends is not None and model.cache.records is not None:
        stores = [segment.store for segment in batch.segments]
        model.post(partial(model.cache.settle, step.attends, stores, promoted))
    return x


def _likely(model: Model, step: Step, x: Tensor) -> tuple[int, list[int]] | None:
    """Whom the next layer with experts would ask for if rows x came to it as they are now, before this layer's experts."""
    following = model.followed_by.get(step.layer)
    weights = model.weights.pinned(following) if following is not None else None
    if following is None or weights is None or model.experts.all_fit:
        return None
    then = model.weights.pieces[following].step
    assert then is not None and then.experts is not None
    return then.layer, sorted({*then.experts.likely(x, weights).flatten().tolist()})


def _mask(model: Model, batch: Batch) -> Tensor | None:
    """Which row has which adapter."""
    mask = model.adapters.mask([(segment.answer.request.adapter, segment.rows) for segment in batch.segments])
    return None if mask is None else model.device.put(mask)


def _fetched(effect: Attend, device: Device) -> Attend:
    """The same in the host's memory."""
    sinks = None if effect.sinks is None else device.fetch(effect.sinks)
    queries, keys, values = map(device.fetch, (effect.queries, effect.keys, effect.values))
    return Attend(effect.layer, queries, keys, values, effect.scale, sinks)


def _attend(
    model: Model, effect: Attend, batch: Batch, first: int, promoted: list[tuple[Cell, Cell]] | None
) -> Generator[Wait, Any, Tensor]:  # fmt: skip
    """Append each segment's keys and values to its store and fold its blocks, as they come.

    `promoted`: where to note copies of blocks that were read and may stay in memory; None while they will be read again.
    """
    layer, cache = effect.layer, model.cache
    window = model.family.kv.window(layer, cache.window)
    parts = list(batch.within(first, first + effect.queries.shape[0]))
    folds: list[Attention] = []
    for segment, low, high, position in parts:
        segment.store.append(layer, effect.keys[low:high], effect.values[low:high])
        folds.append(Attention(effect.queries[low:high], position, effect.scale, window, effect.sinks, segment.spans))
    for stop in itinerary(parts, layer, window, cache.run_nbytes):
        if not stop.run.cold:
            (number,) = stop.users
            _fold(stop.run.cells[0], parts[number][0].store, folds[number], None)
            continue
        reply = yield Gather()
        if isinstance(reply, StoreError):
            for number in stop.users:
                parts[number][0].miss(stop.run.cells[0].start, reply)
            continue
        loaded, lease = reply
        try:
            _fold_loaded(cache, loaded, [(parts[number][0], folds[number]) for number in stop.users], promoted)
        finally:
            model.post(lease.release)
    answers = [
        fold.result() if part[0].missed is None else torch.zeros_like(effect.queries[part[1] : part[2]])
        for part, fold in zip(parts, folds, strict=True)
    ]
    return answers[0] if len(answers) == 1 else torch.cat(answers)


def _fold_loaded(
    cache: Cache, loaded: Sequence[Loaded], users: Sequence[tuple[Segment, Attention]], promoted: list[tuple[Cell, Cell]] | None
) -> None:  # fmt: skip
    for block in loaded:
        keys_values = block.decode()
        for segment, fold in users:
            _fold(block.cell, segment.store, fold, keys_values)
        if promoted is not None and cache.has_room(block.cell.layer) and keys_values[0].shape[0] == BLOCK:
            promoted.append((block.cell, copied(cache.pool, block.cell, *keys_values)))


def _fold(cell: Cell, store: Store, fold: Attention, loaded: tuple[Tensor, Tensor] | None) -> None:
    """Fold as much of a cell as the store's history has of it."""
    rows = store.length(cell.layer) - cell.start
    if loaded is None:
        assert cell.slot is not None
        loaded = cell.slot.keys, cell.slot.values
    fold.add(Block(cell.start, loaded[0][:rows], loaded[1][:rows]))


def _carry(effect: Recall, batch: Batch, first: int, device: Device) -> Tensor:
    """Carry each segment's state along its rows, and keep it at the ends of blocks."""
    answers = []
    for segment, low, high, position in batch.within(first, first + effect.rows[0].shape[0]):
        states, at = segment.store.states, low
        while at < high:
            end = min(high, at + BLOCK - (position + at - low) % BLOCK)
            before = states.get(effect.layer)
            rows, state = effect.scan(tuple(kind[at:end] for kind in effect.rows), None if before is None else device.put(before))
            states.put(effect.layer, device.fetch(state), position + end - low)
            answers.append(rows)
            at = end
    return answers[0] if len(answers) == 1 else torch.cat(answers)
