"""The carousel: admit, sweep, sample, emit, for ever.

The weights go round; a request joins at the next pass and leaves at the next layer. One pass serves all that ride,
whether they prefill or decode. It refuses to know text, settings and where weights are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Generator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import anyio
import anyio.lowlevel
from torch import Tensor

from .batch import Batch, Segment
from .compute import FOREIGN, Compute
from .drawing import drawing, sample
from .embedding import Embedding
from .errors import AollmError, ModelError, RequestError, StoreError
from .gathering import Gathering
from .item import Item, whole
from .maths.attention import BLOCK
from .mixing import Arrive, Fetch
from .request import Answer, Request
from .sampling import Draw
from .shift import shift
from .stores.node import common, pack_ids
from .stores.store import Store
from .sweep import Gather, Leave, Load, Model, Room, Wait, sweep
from .towers import Towers
from .trace import Event

CLOSED = "the runtime was closed before this request was answered"
MOST_MISSES = 8
"""Times that an answer's lost history is computed again before the drive is held to be broken."""
RIDING_ROWS = 4096
"""Prompt rows that a pass takes on while others decode, so that one long prompt does not hold them up for minutes."""


@dataclass(frozen=True, slots=True)
class _Done:
    value: Any


@dataclass(frozen=True, slots=True)
class Limits:
    """How much there may be at once: rows of a pass, requests that ride, answers in the making, tokens of one."""

    rows: int
    requests: int
    answers: int
    context: int


class Engine:
    """Serves requests with one model until it is cancelled."""

    def __init__(self, model: Model, embedding: Embedding, towers: Towers, compute: Compute, limits: Limits) -> None:
        self._model, self._embedding, self._towers, self._compute, self.limits = model, embedding, towers, compute, limits
        self.between: Callable[[], Awaitable[None]] = anyio.lowlevel.checkpoint
        self.note: Callable[[Request], None] = lambda request: None
        """Called with a request that is over, while it still holds what it held."""
        """Waited for whenever nobody rides, before the next one joins."""
        self._cache = model.cache
        self._cache.freed = self.wake
        self._cache.compute = compute.run
        self._gathering = Gathering(model)
        self._inbox: deque[Request] = deque()
        self._riders: list[Request] = []
        self._work = anyio.Event()
        self._held: Request | None = None
        self._closed = False
        self.passes = 0
        self.served = self.waited = self.refused = 0
        """Requests that have ridden; that had to wait until there was room for their keys and values; that would never have had it."""
        self.most_tokens = 0
        """The most tokens that riders could come to, together with what sessions kept."""

    def submit(self, request: Request) -> None:
        """Have `request` join as soon as it fits; those that came before it go first."""
        if self._closed:
            raise RequestError(CLOSED)
        room, wanted = self._cache.pool.tokens, self._cache.reservation(request.tokens_at_most, len(request.answers))
        if wanted > room:
            self.refused += 1
            self.wake()
            raise RequestError(
                f"this request can come to {wanted} tokens of KV in memory, the runtime has room for {room}; "
                "shorten the prompt, lower max_new_tokens or n, or open the runtime with more memory or a larger max_context_tokens"
            )
        self._inbox.append(request)
        self.wake()

    def wake(self) -> None:
        """Something changed that may give the next pass work."""
        self._work.set()

    @property
    def riders(self) -> int:
        """Requests that ride."""
        return len(self._riders)

    @property
    def waiting(self) -> int:
        """Requests in line."""
        return len(self._inbox)

    def close(self) -> None:
        """Take no more requests, and have the pass under way end at its next piece; to be followed by cancelling `run`."""
        self._closed = True
        for request in self._riders:
            request.error = request.error or RequestError(CLOSED)
            request.cancelled = True

    async def run(self) -> None:
        """Go round until cancelled."""
        try:
            async with self._model.experts, self._model.weights:
                while True:
                    batch = await self._admit()
                    try:
                        batch, logits = await self._sweep(batch)
                        draws = await self._compute.run(sample, batch, logits)
                    except AollmError as error:
                        await self._fail(batch, error)
                    else:
                        await self._emit(batch, draws)
        finally:
            self._closed = True
            for request in [*self._riders, *self._inbox]:
                request.close(RequestError(CLOSED))

    async def _admit(self) -> Batch:
        """The next pass's rows: who decodes first, then prompts in the order in which they came, as many rows as fit."""
        while True:
            self._work = anyio.Event()
            for request in [rider for rider in self._riders if rider.cancelled]:
                await self._retire(request)
            if not self._riders:
                await self.between()
            for request in [waiting for waiting in self._inbox if waiting.cancelled]:
                self._inbox.remove(request)
                request.close()
            while self._inbox and await self._joins(self._inbox[0]):
                pass
            ready = [answer for rider in self._riders if rider.has_room for answer in rider.live if answer.store is not None]
            if ready:
                return self._pack(ready)
            await self._work.wait()

    async def _sweep(self, batch: Batch) -> tuple[Batch, Tensor]:
        """One pass; returns who stayed, and the logits of those whose input ended."""
        await self._model.weights.begin()
        start = perf_counter()
        tails = sum(min(segment.rows, BLOCK) for segment in batch.segments)
        await self._cache.turn(len(batch), tails)
        x = await self._rows(batch)
        self._model.trace.add(Event("stall", start, perf_counter(), label="embedding"))
        work = sweep(self._model, batch, x)
        reply: Any = None
        try:
            await self._gathering.begin(batch, 0)
            while True:
                step = await self._compute.run(_advance, work, reply)
                if isinstance(step, _Done):
                    break
                start = perf_counter()
                reply = await self._answer(step)
                self._model.trace.add(Event("stall", start, perf_counter(), label=type(step).__name__.lower()))
        finally:
            work.close()  # what it holds goes back, though an error may keep it alive
            self._model.experts.stop()
            await self._gathering.stop()
        stayed, logits = step.value
        if not len(stayed):  # the pass ended before the round did
            await self._model.weights.restart()
        self.passes += 1
        return stayed, logits

    async def _rows(self, batch: Batch) -> Tensor:
        """The rows that a pass begins with; those of images and sounds are noted, to take their places."""
        for segment in batch.segments:
            for item in segment.items:
                rows = await self._towers.rows(item)
                low, high = max(item.first, segment.start), min(item.end, segment.start + segment.rows)
                batch.inserts.append((segment.first + low - segment.start, rows[low - item.first : high - item.first]))
        if not batch.inserts:
            return await self._embedding.rows(batch.ids)
        vocabulary = self._model.family.vocabulary
        return await self._embedding.rows([number if number < vocabulary else 0 for number in batch.ids])

    async def _emit(self, batch: Batch, draws: list[list[Draw] | AollmError]) -> None:
        """Move the answers on by their rows, and hand out what was sampled."""
        sampled = iter(draws)
        for segment in batch.segments:
            answer, request = segment.answer, segment.answer.request
            if segment.missed is not None:
                if segment.ends_input:
                    next(sampled)
                await self._go_back(segment)
                continue
            answer.position += segment.rows
            if not segment.ends_input:
                answer.pending = answer.pending[segment.rows :]
                continue
            drawn = next(sampled)
            if request.closed:  # another of its answers failed
                continue
            if isinstance(drawn, AollmError):
                request.close(drawn)
            else:
                for choice, draw in zip(drawing(answer), drawn, strict=True):
                    if choice.store is None:  # its siblings go on from the prompt that the first one prefilled
                        choice.store, choice.position = segment.store.fork(), answer.position
                    request.accept(choice, draw)
                    choice.store.accept([draw.id])
                    if choice.position >= self.limits.context and not choice.finished:
                        await shift(choice, self._model, self._compute)
            if not request.live:
                await self._retire(request)

    async def _answer(self, wait: Wait) -> Any:
        match wait:
            case Load():
                return await self._model.weights.next()
            case Gather():
                return await self._gathering.next()
            case Room(rows):
                return await self._cache.relieve(rows)
            case Fetch(layer, experts, rows, likely):
                return self._model.experts.fetch(layer, experts, rows, likely)
            case Arrive():
                return await self._model.experts.next()
            case Leave(batch, stay, piece):
                await self._gathering.stop()
                for request in {segment.answer.request for segment in batch.segments if segment.answer.request.cancelled}:
                    await self._retire(request)
                for segment in batch.segments:
                    if segment.missed is not None and not segment.answer.request.closed:
                        await self._go_back(segment)
                await self._gathering.begin(stay, piece)

    async def _go_back(self, segment: Segment) -> None:
        """A part of an answer's history was lost: what was stored is a miss, and the rest is computed again."""
        answer, store = segment.answer, segment.store
        assert segment.missed is not None and segment.reason is not None
        answer.misses += 1
        if answer.misses > MOST_MISSES:
            answer.request.close(segment.reason)
            await self._retire(answer.request)
            return
        answer.request.prefix_miss_reason = str(segment.reason)
        await self._cache.missed(store, segment.missed, segment.reason)
        answer.resume(unparted(store, store.truncate(segment.missed), answer.request.items))

    async def _joins(self, request: Request) -> bool:
        """Let the first in line ride, if there is room; it takes what is stored of its prompt along."""
        answers = sum(len(rider.answers) for rider in self._riders) + len(request.answers)
        if len(self._riders) >= self.limits.requests or (self._riders and answers > self.limits.answers):
            return False
        store = await self._store_for(request)
        if store is None:
            self.waited += request is not self._held
            self._held = request
            return False
        self._inbox.popleft()
        self._riders.append(request)
        kept = sum(store.tokens for store in self._cache.idle.values())
        self.most_tokens = max(self.most_tokens, kept + sum(rider.tokens_at_most for rider in self._riders))
        answer = request.answers[0]
        answer.store = store
        known = request.prompt[:-1]  # the last token's logits are wanted
        if store.ids:
            answer.position = store.truncate(common(pack_ids(store.ids), pack_ids(known)))
            try:
                await self._cache.ready(store)
            except StoreError as error:
                request.prefix_miss_reason = str(error)
                answer.position = store.truncate(answer.position // BLOCK * BLOCK)
        else:
            answer.position, request.prefix_miss_reason = await self._cache.adopt(store, known)
        answer.position = unparted(store, answer.position, request.items)
        request.prefix_hit_tokens = answer.position
        answer.resume(answer.position)
        return True

    async def _store_for(self, request: Request) -> Store | None:
        """The session's store or a new one, with what the request can need set aside; None while there is no room."""
        kept = request.session.store if request.session is not None else None
        if kept is not None and kept.closed:
            kept = None
        had = kept.reserved if kept is not None else 0
        wanted = max(self._cache.reservation(request.tokens_at_most, len(request.answers)), had)
        while not self._cache.pool.reserve(wanted - had):
            if not await self._cache.close_idle(kept):
                return None
        if kept is None:
            kept = self._cache.open(request.salt)
        self._cache.idle.pop(kept.number, None)
        if request.session is not None:
            request.session.store = None
        kept.reserved = wanted
        return kept

    def _pack(self, ready: list[Answer]) -> Batch:
        decoding = [answer for answer in ready if len(answer.pending) == 1]
        room = min(self.limits.rows - len(decoding), RIDING_ROWS if decoding else self.limits.rows)
        parts = [(answer, 1) for answer in decoding]
        for answer in (answer for answer in ready if len(answer.pending) > 1):
            rows = min(len(answer.pending), room)
            if rows < len(answer.pending):  # cut where chunks are cut, so that results do not depend on it
                rows = rows // self._model.chunk_rows * self._model.chunk_rows or rows
                rows = whole(answer.position + rows, answer.request.items) - answer.position
            if rows:
                parts.append((answer, rows))
                room -= rows
        return Batch([(answer, answer.store, rows) for answer, rows in parts if answer.store is not None])

    async def _retire(self, request: Request) -> None:
        """Give back all that a request holds."""
        if request in self._riders:
            self._riders.remove(request)
            self.served += 1
            self.note(request)
        with anyio.CancelScope(shield=True):
            for answer in request.answers:
                store, answer.store = answer.store, None
                if store is None:
                    continue
                if request.session is not None and answer.choice == 0 and request.error is None:
                    store.truncate(answer.position)
                    request.session.store = store
                    self._cache.rest(store)
                else:
                    await store.aclose()
        request.close()
        self.wake()

    async def _fail(self, batch: Batch, error: AollmError) -> None:
        """The pass failed: all that rode on it fail with it; later ones may go on."""
        for request in batch.requests:
            request.close(error)
            await self._retire(request)
        await self._model.weights.stop()

    def __repr__(self) -> str:
        return f"<Engine {self.riders} riding, {self.waiting} waiting, {self.passes} passes>"


def unparted(store: Store, position: int, items: Sequence[Item]) -> int:
    """Have `store`, which has `position` tokens, go back to where no image is parted; returns where that is."""
    while (cut := whole(position, items)) < position:
        position = store.truncate(cut)
    return position


def _advance(work: Generator[Wait, Any, tuple[Batch, Tensor]], reply: Any) -> Wait | _Done:
    try:
        return work.send(reply)
    except StopIteration as done:
        return _Done(done.value)
    except FOREIGN as error:
        raise ModelError(f"a layer could not be computed: {error}") from error
