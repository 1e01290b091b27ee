"""What a caller holds while an answer is made: an async iterator of tokens that cancels its request when it is left."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Self

import anyio

from .request import Request, Token


class TokenStream:
    """`async for token in stream`; or `async with stream:` around it, to end it at a place of one's choosing.

    Leaving the loop early, or cancelling the task that reads, cancels the request within one layer. A stream that is kept
    in a variable cannot see that its loop was left: end it with `async with`, or `cancel`.
    """

    def __init__(
        self,
        submit: Callable[[], Awaitable[Request]],
        post: Callable[[Callable[[], object]], None],
        heard: Callable[[Token], None] | None = None,
    ) -> None:
        """`heard`: called with each token before it is handed out."""
        self._submit = submit
        self._heard = heard
        self._post = post
        self._request: Request | None = None
        self._ended = False
        self._beginning = anyio.Lock()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        """The next token; raises the request's error, `RequestError` for a prompt that cannot be taken."""
        if self._ended:
            raise StopAsyncIteration
        try:
            token = await (await self._begun()).take()
        except BaseException:
            self.cancel()
            raise
        if token is None:
            self._ended = True
            raise StopAsyncIteration
        if self._heard is not None:
            self._heard(token)
        return token

    async def __aenter__(self) -> Self:
        """Submit the request now, so that it joins the next pass."""
        await self._begun()
        return self

    async def __aexit__(self, *raised: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; what was handed out stays valid. Idempotent."""
        self._ended = True
        if self._request is not None:
            self._request.cancel()

    async def ended(self) -> None:
        """Return when the engine has let go of the request, whatever became of it."""
        if self._request is not None:
            await self._request.ended()

    @property
    def request(self) -> Request | None:
        """The request once it was submitted."""
        return self._request

    @property
    def progress(self) -> float:
        """How much of the pass under way is done, from 0 to 1: while a long prompt is prefilled, how far it has come."""
        return self._request.progress if self._request is not None else 0.0

    async def _begun(self) -> Request:
        async with self._beginning:  # several tasks may read one stream
            if self._request is None:
                self._request = await self._submit()
                if self._ended:  # cancelled while the prompt was encoded
                    self._request.cancel()
            return self._request

    def __del__(self) -> None:
        if self._request is not None and not self._request.closed:
            self._post(self._request.cancel)  # whoever collects garbage may be another thread

    def __repr__(self) -> str:
        return f"<TokenStream {self._request or 'not begun'}>"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of `n` answers."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens in and out; `completion_tokens` of all answers together."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer (the first of `n`, which are all in `choices`) and what it took."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    choices: tuple[Choice, ...]
    profile: dict[str, Any] | None
    cache_state: dict[str, Any]
    plan: Any
