"""What a thread holds while an answer is made: an iterator of tokens that cancels its request when it is left."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Self

from ..prompt import Prompt
from ..request import Request, Token
from ..runtime import Runtime
from ..settings import GenerationConfig
from .background import Background, Errand, Give


class Tokens:
    """`for token in client.stream(...)`; or `with client.stream(...) as tokens` around it, to end it at a place of one's choosing.

    Leaving the loop early cancels the request within one layer, and so does an error or Ctrl-C in the thread that reads. Tokens
    that are kept in a variable cannot see that their loop was left: end them with `with`, or `cancel`.
    """

    def __init__(self, open: Callable[[], Background], prompt: Prompt, settings: GenerationConfig) -> None:
        """Use `RuntimeClient.stream`. `open` gives the thread to ask, and keeps the client in use while somebody reads."""
        self.request: Request | None = None
        """The request once it was submitted: to be looked at, not touched."""
        self._open, self._prompt, self._settings = open, prompt, settings
        self._errand: Errand[Request | Token] | None = None
        self._ended = False
        self._beginning = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        """The next token; raises the request's error, `RequestError` for a prompt that cannot be taken."""
        if self._ended:
            raise StopIteration
        try:
            token = self._begun().take()
        except BaseException:
            self.cancel()
            raise
        if not isinstance(token, Token):
            self._ended = True
            raise StopIteration
        return token

    def __enter__(self) -> Self:
        """Submit the request now, so that it joins the next pass."""
        try:
            self._begun()
        except BaseException:
            self.cancel()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        """End the request; what was handed out stays valid. Idempotent, returns at once, for any thread."""
        self._ended = True
        if self._errand is not None:
            self._errand.cancel()

    def _begun(self) -> Errand[Request | Token]:
        with self._beginning:  # several threads may read one answer
            if self._errand is None:
                self._errand = Errand(self._open(), _reading(self._prompt, self._settings))
                self._errand.begin()
                if self._ended:  # while the model was opened
                    self._errand.cancel()
                request = self._errand.take()
                self.request = request if isinstance(request, Request) else None
            return self._errand

    def __del__(self) -> None:
        self.cancel()

    def __repr__(self) -> str:
        return f"<Tokens of {self.request or 'a request not begun'}>"


def _reading(prompt: Prompt, settings: GenerationConfig) -> Callable[[Runtime, Give[Request | Token]], Awaitable[None]]:
    """The errand of a stream: first its request, then its tokens. It knows nothing of who reads, who may be collected meanwhile."""

    async def work(runtime: Runtime, give: Give[Request | Token]) -> None:
        async with runtime.stream(prompt, settings) as stream:
            assert stream.request is not None
            await give(stream.request)
            async for token in stream:
                await give(token)

    return work
