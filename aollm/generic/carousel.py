"""Serves requests with a model of transformers, in turns of one forward each, until it is cancelled.

It has the face of the native engine. A request that is cancelled leaves at the next layer; one that fails fails alone. It refuses
to know text, settings, and how the model came to be loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any

import anyio
from safetensors import SafetensorError
from torch import Tensor, nn

from ..compute import Compute
from ..drawing import drawing
from ..errors import AollmError, DiskError, ModelError, RequestError
from ..request import Answer, Request
from ..sampling import Draw
from .kind import FAULTS, told
from .loaded import Loaded
from .strand import Strand

CLOSED = "the runtime was closed before this request was answered"


class _LeftError(Exception):
    """The request under way was cancelled."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much there may be at once: requests that ride, answers in the making."""

    requests: int
    answers: int


@dataclass(eq=False, slots=True)
class _Rider:
    """A request, what its processor made, and the strands of its answers, by choice."""

    request: Request
    inputs: Mapping[str, Tensor] | None
    reserved: int
    strands: dict[int, Strand] = field(default_factory=dict)
    turn: int = 0

    def next(self) -> Answer:
        """The answer whose turn it is: the first until the prompt is fed, then one after the other."""
        live = self.request.live
        if not self.request.answers[0].produced:
            return self.request.answers[0]
        self.turn += 1
        return live[self.turn % len(live)]


class Generic:
    """The carousel of the generic tier."""

    def __init__(self, loaded: Loaded, compute: Compute, limits: Limits) -> None:
        self._model: Any = loaded.model
        self._plan, self._compute, self._limits = loaded.plan, compute, limits
        self._inbox: deque[_Rider] = deque()
        self._riders: deque[_Rider] = deque()
        self._work = anyio.Event()
        self._closed = False
        self._under_way: Request | None = None
        self._done = 0
        self._layers = list(layers_of(loaded.model))
        self._hooks = [layer.register_forward_pre_hook(self._at_layer) for layer in self._layers]
        self.passes = 0

    def submit(self, request: Request, inputs: Mapping[str, Tensor] | None = None) -> None:
        """Have `request` join as soon as there is room; those that came before it go first.

        `inputs`: what a processor made beside the ids, such as `pixel_values`. Raises `RequestError` for one that can never ride.
        """
        if self._closed:
            raise RequestError(CLOSED)
        seq2seq = self._model.config.is_encoder_decoder
        if request.shift != "stop" and (seq2seq or inputs):
            what = "a model with an encoder" if seq2seq else "a prompt with images"
            raise RequestError(f"context_shift={request.shift!r}: {what} cannot leave out a part of its context; use 'stop'")
        context, count = self._plan.max_context_tokens, len(request.answers)
        wanted = count * min(len(request.prompt) + request.max_new_tokens, context)
        if len(request.prompt) > context or wanted > self._plan.kv_tokens:
            raise RequestError(
                f"this request can come to {max(wanted, len(request.prompt))} tokens of KV in memory, the runtime has room for "
                f"{self._plan.kv_tokens}, at most {context} an answer; "
                "shorten the prompt, lower max_new_tokens or n, or open the runtime with more memory or a larger max_context_tokens"
            )
        self._inbox.append(_Rider(request, inputs, wanted))
        self.wake()

    def wake(self) -> None:
        """Something changed that may give the next forward work."""
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
        """Take no more requests, and have the forward under way end at its next layer; to be followed by cancelling `run`."""
        self._closed = True
        for rider in self._riders:
            rider.request.error = rider.request.error or RequestError(CLOSED)
            rider.request.cancelled = True

    async def run(self) -> None:
        """Go round until cancelled."""
        try:
            while True:
                rider = await self._next()
                answer = rider.next()
                match await self._compute.run(self._advance, rider, answer):
                    case None:
                        self._retire(rider)
                    case AollmError() as error:
                        rider.request.close(error)
                        self._retire(rider)
                    case draws:
                        self._emit(rider, answer, draws)
        finally:
            self._closed = True
            for rider in [*self._riders, *self._inbox]:
                rider.strands.clear()
                rider.request.close(RequestError(CLOSED))
            self._riders.clear()
            self._inbox.clear()
            for hook in self._hooks:
                hook.remove()

    async def _next(self) -> _Rider:
        """Whose turn it is: who waited longest of those whose readers keep up."""
        while True:
            self._work = anyio.Event()
            for rider in [rider for rider in self._riders if rider.request.cancelled]:
                self._retire(rider)
            for rider in [waiting for waiting in self._inbox if waiting.request.cancelled]:
                self._inbox.remove(rider)
                rider.request.close()
            while self._inbox and self._fits(self._inbox[0]):
                self._riders.append(self._inbox.popleft())
            ready = next((rider for rider in self._riders if rider.request.has_room), None)
            if ready is not None:
                self._riders.remove(ready)
                self._riders.append(ready)
                return ready
            await self._work.wait()

    def _fits(self, rider: _Rider) -> bool:
        answers = sum(len(other.request.answers) for other in self._riders) + len(rider.request.answers)
        tokens = sum(other.reserved for other in self._riders) + rider.reserved
        few = len(self._riders) < self._limits.requests and (not self._riders or answers <= self._limits.answers)
        return few and tokens <= self._plan.kv_tokens

    def _advance(self, rider: _Rider, answer: Answer) -> list[Draw] | AollmError | None:
        """One forward: what was drawn, or why there is nothing; None when the request left. Runs in the compute thread."""
        self._under_way = rider.request
        try:
            return self._forward(rider, answer)
        except _LeftError:
            return None
        except AollmError as error:
            clear_frames(error.__traceback__)  # who keeps the error does not keep what was computed
            return error
        except FAULTS as error:
            clear_frames(error.__traceback__)
            return failure(error)
        finally:
            self._under_way = None
            self.passes += 1

    def _forward(self, rider: _Rider, answer: Answer) -> list[Draw]:
        self._done = 0
        strand = rider.strands.get(answer.choice)
        if strand is None:
            strand = rider.strands[answer.choice] = Strand.begin(self._model, answer.visible, rider.inputs)
            self._done = 0
        logits = strand.feed(self._model, self._plan.chunk_rows)
        if logits is None:
            return []
        choices = drawing(answer)
        draws = [choice.sampler.draw(logits, choice.history) for choice in choices]
        for choice, draw in zip(choices[1:], draws[1:], strict=True):
            rider.strands[choice.choice] = strand.fork()
            rider.strands[choice.choice].extend(draw.id)
        strand.extend(draws[0].id)
        return draws

    def _emit(self, rider: _Rider, answer: Answer, draws: list[Draw]) -> None:
        """Hand out what was drawn, and let go of what has ended."""
        request = rider.request
        if draws:
            rider.inputs = None  # they are in the cache
            for choice, draw in zip(drawing(answer), draws, strict=True):
                request.accept(choice, draw)
                choice.position = len(choice.visible) - 1
                if choice.finished:
                    del rider.strands[choice.choice]
                elif request.shift != "stop" and choice.position >= self._plan.max_context_tokens:
                    choice.drop_half()
                    del rider.strands[choice.choice]  # what is kept is prefilled again
        if not request.live:
            self._retire(rider)

    def _retire(self, rider: _Rider) -> None:
        """Give back all that a request holds."""
        rider.strands.clear()
        rider.inputs = None
        self._riders.remove(rider)
        rider.request.close()
        self.wake()

    def _at_layer(self, layer: nn.Module, arguments: object) -> None:
        """Before each layer, in the compute thread: leave if the request was cancelled, and tell how far it has come."""
        request = self._under_way
        if request is None:
            return
        if request.cancelled:
            raise _LeftError
        self._done += 1
        request.progress = min(self._done / len(self._layers), 1.0)

    def __repr__(self) -> str:
        return f"<Generic {self.riders} riding, {self.waiting} waiting, {self.passes} forwards>"


def failure(error: BaseException) -> AollmError:
    """What a foreign error in a forward is told as: of the drive, where weights are read, or of the model."""
    if isinstance(error, OSError | SafetensorError):
        told_as: AollmError = DiskError(f"a layer could not be read: {told(error)}; check the drive, and open the runtime again")
    else:
        told_as = ModelError(f"the model could not be computed: {told(error)}")
    told_as.__cause__ = error
    return told_as


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """What a model has several of in a row: its layers, of encoder, decoder and towers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module
