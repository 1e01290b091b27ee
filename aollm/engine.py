"""The carousel: admit, sweep, sample, emit, for ever.

The weights go round; a request joins at the next pass and leaves at the next layer. One pass serves all that ride,
whether they prefill or decode. It refuses to know text, settings and where weights are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import anyio
from torch import Tensor

from .batch import Batch, Segment
from .compute import Compute
from .embedding import Embedding
from .errors import AollmError, ModelError, RequestError
from .request import Answer, Request
from .sampling import Draw
from .stores.base import Store
from .stores.pool import BlockPool
from .sweep import Leave, Load, Model, Wait, sweep
from .trace import Event

FOREIGN = (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError, MemoryError)
"""What torch and a family's code may raise on weights or settings that they cannot cope with."""
CLOSED = "the runtime was closed before this request was answered"
RIDING_ROWS = 4096
"""Prompt rows that a pass takes on while others decode, so that one long prompt does not hold them up for minutes."""


@dataclass(frozen=True, slots=True)
class _Done:
    value: Any


@dataclass(frozen=True, slots=True)
class Limits:
    """How much there may be at once: rows of a pass, requests that ride, answers in the making."""

    rows: int
    requests: int
    answers: int


class Engine:
    """Serves requests with one model until it is cancelled."""

    def __init__(
        self, model: Model, embedding: Embedding, compute: Compute, pool: BlockPool, new_store: Callable[[], Store], limits: Limits
    ) -> None:
        self._model, self._embedding, self._compute = model, embedding, compute
        self._pool, self._new_store, self._limits = pool, new_store, limits
        self._inbox: deque[Request] = deque()
        self._riders: list[Request] = []
        self._work = anyio.Event()
        self._closed = False
        self.passes = 0

    def submit(self, request: Request) -> None:
        """Have `request` join as soon as it fits; those that came before it go first."""
        if self._closed:
            raise RequestError(CLOSED)
        if request.tokens_at_most > self._pool.tokens:
            raise RequestError(
                f"this request can come to {request.tokens_at_most} tokens of KV, the runtime has room for {self._pool.tokens}; "
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
            async with self._model.weights:
                while True:
                    batch = await self._admit()
                    try:
                        batch, logits = await self._sweep(batch)
                        draws = await self._compute.run(_sample, batch, logits)
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
            for request in [waiting for waiting in self._inbox if waiting.cancelled]:
                self._inbox.remove(request)
                request.close()
            while self._inbox and self._joins(self._inbox[0]):
                self._inbox.popleft()
            ready = [answer for rider in self._riders if rider.has_room for answer in rider.live if answer.store is not None]
            if ready:
                return self._pack(ready)
            await self._work.wait()

    async def _sweep(self, batch: Batch) -> tuple[Batch, Tensor]:
        """One pass; returns who stayed, and the logits of those whose input ended."""
        start = perf_counter()
        x = await self._embedding.rows(batch.ids)
        self._model.trace.add(Event("stall", start, perf_counter(), label="embedding"))
        work = sweep(self._model, batch, x)
        reply: Any = None
        while True:
            step = await self._compute.run(_advance, work, reply)
            if isinstance(step, _Done):
                stayed, logits = step.value
                if not len(stayed):  # the pass ended before the round did
                    await self._model.weights.restart()
                self.passes += 1
                return stayed, logits
            start = perf_counter()
            reply = await self._answer(step)
            self._model.trace.add(Event("stall", start, perf_counter(), label=type(step).__name__.lower()))

    async def _emit(self, batch: Batch, draws: list[list[Draw] | AollmError]) -> None:
        """Move the answers on by their rows, and hand out what was sampled."""
        sampled = iter(draws)
        for segment in batch.segments:
            answer, request = segment.answer, segment.answer.request
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
                for choice, draw in zip(_drawing(answer), drawn, strict=True):
                    if choice.store is None:  # its siblings go on from the prompt that the first one prefilled
                        choice.store, choice.position = segment.store.fork(), answer.position
                    request.accept(choice, draw)
            if not request.live:
                await self._retire(request)

    async def _answer(self, wait: Wait) -> Any:
        match wait:
            case Load():
                return await self._model.weights.next()
            case Leave(batch, stay):
                for request in batch.requests - stay.requests:
                    await self._retire(request)
                return None

    def _joins(self, request: Request) -> bool:
        """Let the first in line ride, if there is room."""
        answers = sum(len(rider.answers) for rider in self._riders) + len(request.answers)
        if len(self._riders) >= self._limits.requests or (self._riders and answers > self._limits.answers):
            return False
        if not self._pool.reserve(request.tokens_at_most):
            return False
        request.reserved = request.tokens_at_most
        request.answers[0].store = self._new_store()
        self._riders.append(request)
        return True

    def _pack(self, ready: list[Answer]) -> Batch:
        decoding = [answer for answer in ready if answer.produced]
        room = min(self._limits.rows - len(decoding), RIDING_ROWS if decoding else self._limits.rows)
        parts = [(answer, 1) for answer in decoding]
        for answer in (answer for answer in ready if not answer.produced):
            rows = min(len(answer.pending), room)
            if rows:
                parts.append((answer, rows))
                room -= rows
        return Batch([(answer, answer.store, rows) for answer, rows in parts if answer.store is not None])

    async def _retire(self, request: Request) -> None:
        """Give back all that a request holds."""
        if request in self._riders:
            self._riders.remove(request)
        with anyio.CancelScope(shield=True):
            for answer in request.answers:
                if answer.store is not None:
                    await answer.store.aclose()
                    answer.store = None
        self._pool.release(request.reserved)
        request.reserved = 0
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


def _advance(work: Generator[Wait, Any, tuple[Batch, Tensor]], reply: Any) -> Wait | _Done:
    try:
        return work.send(reply)
    except StopIteration as done:
        return _Done(done.value)
    except FOREIGN as error:
        raise ModelError(f"a layer could not be computed: {error}") from error


def _drawing(answer: Answer) -> list[Answer]:
    """Who samples from an answer's logits: itself, and after the prompt all its siblings."""
    return [answer] if answer.produced else answer.request.answers


def _sample(batch: Batch, logits: Tensor) -> list[list[Draw] | AollmError]:
    """For each segment whose input ended a draw for each of its answers, or why there is none. Runs in the compute thread."""
    ends = [segment for segment in batch.segments if segment.ends_input]
    return [_draw(segment, row) for segment, row in zip(ends, logits, strict=True)]


def _draw(segment: Segment, row: Tensor) -> list[Draw] | AollmError:
    try:
        return [choice.sampler.draw(row, choice.history) for choice in _drawing(segment.answer)]
    except AollmError as error:  # such as logits that are not numbers: the others are not affected
        return error
    except FOREIGN as error:
        return ModelError(f"no token could be drawn: {error}")
