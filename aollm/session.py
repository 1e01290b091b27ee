"""A conversation whose keys and values are kept: a turn computes what is new, and nothing else.

Every turn's prompt is the whole conversation; the store keeps what it shares with the turns before. It refuses to know
where that is: if the cache had to give it up, the turn is merely slower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import anyio

from .errors import RequestError
from .request import Token
from .settings import GenerationConfig
from .stores.cache import Cache
from .stores.store import Store
from .stream import TokenStream


class Host(Protocol):
    """What answers a session's turns: a runtime."""

    @property
    def cache(self) -> Cache | None: ...

    def stream(
        self,
        prompt: Sequence[Mapping[str, Any]],
        generation: GenerationConfig | None = None,
        *,
        session: Session | None = None,
        **fields: Any,
    ) -> TokenStream: ...


class Session:
    """One conversation on `runtime`; turns one after the other, branches side by side."""

    def __init__(self, runtime: Host, messages: Sequence[Mapping[str, Any]] = ()) -> None:
        self.store: Store | None = None
        """What is kept between turns; during a turn its request has it."""
        self._runtime = runtime
        self._messages = [dict(message) for message in messages]
        self._said: list[str] = []
        self._turn: TokenStream | None = None
        self._closed = False

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation so far, with as much of the last answer as was heard."""
        said = "".join(self._said)
        return [*self._messages, *([{"role": "assistant", "content": said}] if said else [])]

    def stream(self, message: str | Mapping[str, Any], generation: GenerationConfig | None = None, **fields: Any) -> TokenStream:
        """The answer to the next message: a text, or a message with role and content.

        The turn before ends here if it has not; a message that nothing was answered to is forgotten. Raises `RequestError`
        after `aclose`, or for `n` above 1.
        """
        if self._closed:
            raise RequestError("this session is closed; ask runtime.session() for another one")
        if (fields.get("n") or (generation.n if generation is not None else 1)) != 1:
            raise RequestError("n: a session has one answer a turn; use branch() for more")
        if generation is None:
            fields = {"n": 1, **fields}  # whatever is configured for answers by themselves
        if self._turn is not None:
            self._turn.cancel()
        said = self.messages
        if self._turn is not None and not "".join(self._said):
            said.pop()
        self._messages = [*said, {"role": "user", "content": message} if isinstance(message, str) else dict(message)]
        self._said = []
        self._turn = self._runtime.stream(self._messages, generation, session=self, **fields)
        return self._turn

    def heard(self, token: Token) -> None:
        """A token of the answer was handed out."""
        self._said.append(token.text)

    def branch(self) -> Session:
        """Another session with the same conversation, that shares what is kept until the two differ. Between turns."""
        twin = Session(self._runtime, self.messages)
        if (cache := self._runtime.cache) is not None and self.store is not None and not self.store.closed:
            twin.store = cache.branch(self.store)
        return twin

    async def aclose(self) -> None:
        """End the turn under way and give back what is kept. Idempotent."""
        self._closed = True
        if self._turn is not None:
            self._turn.cancel()
            await self._turn.ended()
        if self.store is not None:
            store, self.store = self.store, None
            with anyio.CancelScope(shield=True):
                await store.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<Session {len(self.messages)} messages, {self.store or 'nothing kept'}>"
