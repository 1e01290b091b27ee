"""One request: its answers of tokens, and the bounded stream through which they leave.

A request with `n` answers is prefilled once and then forked. The engine drives it; this module refuses to know how.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import anyio

from .errors import AollmError
from .item import Item
from .maths.attention import BLOCK
from .sampling import Draw, Sampler
from .stores.store import Store

OUTBOX = 64
"""Tokens that wait for a slow reader before its request pauses."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


class Session(Protocol):
    """Who keeps a request's store when the request has ended."""

    store: Store | None


class Decoder(Protocol):
    """Token ids to text, as far as it is certain."""

    stopped: bool

    def push(self, token_id: int) -> str: ...
    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. `text` may be empty while a character is incomplete; `finish_reason` is None until the last."""

    id: int
    text: str
    index: int
    logprob: float
    finish_reason: str | None = None
    choice: int = 0
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False, slots=True)
class Answer:
    """One answer in the making: ids that are not yet in its store, and everything before them that is."""

    request: Request
    choice: int
    sampler: Sampler
    decoder: Decoder
    pending: list[int]
    history: list[int]
    store: Store | None = None
    position: int = 0
    produced: int = 0
    finished: bool = False
    misses: int = 0
    """How often a part of its history was lost and computed again."""
    keep: int = 0
    dropped: int = 0
    """Tokens after the first `keep` that context shifts have left out of its store."""

    @property
    def visible(self) -> list[int]:
        """The tokens that its store has, or is to have."""
        return self.history[: self.keep] + self.history[self.keep + self.dropped :] if self.dropped else self.history

    def resume(self, position: int) -> None:
        """Go on from the first `position` of the visible tokens, which are in the store; the others are to be computed."""
        self.position = position
        self.pending = self.visible[position:]
        assert self.store is not None
        self.store.accept(self.pending)

    def drop_half(self) -> tuple[int, int, int]:
        """Leave out the older half of what follows the first tokens that are kept: how many are kept, how many are left out
        now, and how many the store had."""
        self.keep = min(self.request.keep_tokens, self.position // 2)
        dropped = (self.position - self.keep) // 2
        self.dropped += dropped
        end, self.position = self.position, self.position - dropped
        return self.keep, dropped, end


class Request:
    """A prompt and what becomes of it. All methods are for the event loop."""

    def __init__(
        self, number: int, prompt: Sequence[int], max_new_tokens: int, stop_ids: frozenset[int],
        samplers: Sequence[Sampler], decoders: Sequence[Decoder], wake: Callable[[], None],
        salt: str = "", session: Session | None = None, shift: str = "stop", keep_tokens: int = 0, context: int = 1 << 62,
        items: Sequence[Item] = (), adapter: int | None = None,
    ) -> None:  # fmt: skip
        self.number = number
        self.prompt = list(prompt)
        self.max_new_tokens = max_new_tokens
        self.stop_ids = stop_ids
        self.cancelled = False
        self.closed = False
        self.error: AollmError | None = None
        self.progress = 0.0
        self.salt = salt
        self.session = session
        self.shift = shift
        self.keep_tokens = keep_tokens
        self.items = items
        """Images and sounds, in the order of the prompt."""
        self.adapter = adapter
        """The number of the adapter that it is answered with, None for none."""
        self._context = context
        self.prefix_hit_tokens = 0
        self.prefix_miss_reason: str | None = None
        self.cache_state: dict[str, Any] | None = None
        """Where keys and values were when it ended."""
        self._wake = wake
        self._outbox: deque[Token] = deque()
        self._changed = anyio.Event()
        self.answers = [
            Answer(self, choice, sampler, decoder, list(prompt) if choice == 0 else [], list(prompt))
            for choice, (sampler, decoder) in enumerate(zip(samplers, decoders, strict=True))
        ]

    @property
    def tokens_at_most(self) -> int:
        """Tokens of KV that it can come to fill: the prompt once, each answer, and the block that each further answer copies."""
        forks = len(self.answers) - 1
        whole = len(self.prompt) + len(self.answers) * self.max_new_tokens + forks * (len(self.prompt) % BLOCK)
        return min(whole, len(self.answers) * self._context)

    @property
    def has_room(self) -> bool:
        """Whether its reader keeps up, so that another pass may add a token for each answer."""
        return len(self._outbox) + len(self.answers) <= OUTBOX

    @property
    def live(self) -> list[Answer]:
        """The answers that go on."""
        return [answer for answer in self.answers if not answer.finished]

    def accept(self, answer: Answer, draw: Draw) -> None:
        """Add a sampled token to an answer and hand it out."""
        answer.produced += 1
        answer.history.append(draw.id)
        answer.pending = [draw.id]
        stopped = draw.id in self.stop_ids
        text = "" if stopped else answer.decoder.push(draw.id)
        stopped = stopped or answer.decoder.stopped
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH if answer.produced >= self.max_new_tokens else None
        if reason is not None:
            answer.finished = True
            text += answer.decoder.finish()
        self._put(Token(draw.id, text, answer.produced - 1, draw.logprob, reason, answer.choice, draw.top))

    def cancel(self) -> None:
        """Leave at the next layer; idempotent."""
        if not self.closed:
            self.cancelled = True
            self._wake()

    def close(self, error: AollmError | None = None) -> None:
        """No more tokens will come; the reader gets `error` after those that wait."""
        self.closed = True
        self.error = self.error or error
        for answer in self.answers:
            answer.finished = True
        self._notify()

    async def take(self) -> Token | None:
        """The next token, or None after the last; raises the request's error."""
        while not self._outbox:
            if self.closed:
                if self.error is not None:
                    raise self.error
                return None
            await self._changed.wait()
        held = not self.has_room
        token = self._outbox.popleft()
        if held and self.has_room:
            self._wake()
        return token

    async def ended(self) -> None:
        """Return when no more tokens will come."""
        while not self.closed:
            await self._changed.wait()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "cancelled" if self.cancelled else "live"
        return f"<Request {self.number} {state}, {len(self.prompt)} prompt tokens, {sum(s.produced for s in self.answers)} produced>"

    def _put(self, token: Token) -> None:
        self._outbox.append(token)
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
