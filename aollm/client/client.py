"""The blocking face of a runtime, for programs without an event loop.

Any thread may ask, and waits for itself alone. It refuses to know how requests are answered.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from ..disk.base import Disk
from ..errors import RequestError
from ..prompt import Prompt
from ..runtime import Runtime
from ..session import Session
from ..settings import GenerationConfig, RuntimeConfig
from ..stream import Completion
from .background import Background, End, Errand, Give, check_thread
from .tokens import Tokens

Result = TypeVar("Result")

SHUT = "this client is closed; make another RuntimeClient"


class RuntimeClient:
    """A `Runtime` for threads: opened by `with`, or when it is first asked, and closed by `close` or when nobody has it any more.

    with RuntimeClient("demo", memory="1GiB") as client:
        for token in client.stream("Once upon a time"):
            print(token.text, end="", flush=True)

    All methods may be called from several threads at once. They raise `RequestError` in a thread that runs an event loop (a
    notebook's excepted, which waits for its cell anyway), after `close`, and in a process that was forked off.
    """

    def __init__(self, model: RuntimeConfig | str | Path | None = None, *, disk: Disk | None = None, **fields: Any) -> None:
        """`model`, `disk` and `fields` are those of `Runtime.open`. Raises `ConfigError`."""
        self.config = RuntimeConfig.of(model, fields)
        self._generation = GenerationConfig.of(None, {})  # read once, not by each request
        self._disk = disk
        self._background: Background | None = None
        self._closed = False
        self._opening, self._turns = threading.Lock(), threading.Lock()
        self._session: Session | None = None

    @property
    def runtime(self) -> Runtime:
        """The runtime, opened if need be. Its figures may be read here; its methods are for its own loop (see `run`).

        Raises what `open` raises.
        """
        return self._open().runtime

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation that `chat` goes on with."""
        return self._session.messages if self._session is not None else []

    def open(self) -> Self:
        """Open the runtime, unless it is. Raises `ModelError`, `MemoryBudgetError` or `DiskError`, and then leaves nothing behind."""
        self._open()
        return self

    def describe_plan(self) -> dict[str, Any]:
        """How the model is run, as JSON has it: placement, memory in bytes line by line, passes and their reasons."""
        return self.runtime.plan.as_dict()

    def prompt(self, prompt: Prompt, generation: GenerationConfig | None = None, **fields: Any) -> Completion:
        """The whole answer to `prompt`, and how it was made: see `Runtime.generate`. Ctrl-C cancels the request, and no more."""
        settings = self._settings(generation, fields)
        return self.run(lambda runtime: runtime.generate(prompt, settings))

    def stream(self, prompt: Prompt, generation: GenerationConfig | None = None, **fields: Any) -> Tokens:
        """An answer token by token: see `Runtime.stream`."""
        check_thread()
        return Tokens(self._open, prompt, self._settings(generation, fields))

    def chat(
        self, said: str | Sequence[Mapping[str, Any]], generation: GenerationConfig | None = None, **fields: Any
    ) -> Completion:  # fmt: skip
        """The answer to the next message of a conversation whose keys and values are kept, or to a whole one, which is gone on with.

        `said` is the next message's text, or messages with role and content from the first to the one to answer. Turns
        of several threads come one after the other. A turn that was interrupted stays, with what had been said.
        """
        settings = self._settings(generation, {"n": 1, **fields} if generation is None else fields)  # a turn has one answer
        if not said or not (isinstance(said, str) or all(isinstance(message, Mapping) for message in said)):
            raise RequestError(f"chat takes a text that is not empty, or a list of messages with role and content, not {said!r:.100}")
        check_thread()
        with self._turns:
            return self.run(lambda runtime: self._turn(runtime, said, settings))

    def reset(self) -> None:
        """Forget the conversation of `chat`, and give back what was kept of it."""
        check_thread()
        with self._turns:
            if self._session is not None:
                session, self._session = self._session, None
                self.run(lambda runtime: session.aclose())

    def run(self, function: Callable[[Runtime], Awaitable[Result]]) -> Result:
        """What `function(runtime)` comes to in the runtime's loop. An interrupt of this thread cancels it."""

        async def work(runtime: Runtime, give: Give[Result]) -> None:
            await give(await function(runtime))

        errand = Errand(self._open(), work)
        try:
            errand.begin()
            part = errand.take()
            assert not isinstance(part, End)
            return part
        except BaseException:
            errand.cancel()
            raise

    def close(self) -> None:
        """Cancel what is under way, close the runtime and end its thread. Idempotent. Raises `DiskError` if closing failed."""
        self._closed = True
        if self._background is not None:
            self._background.close()

    def _open(self) -> Background:
        """Its thread, once the runtime is open in it."""
        check_thread()
        with self._opening:
            if self._closed:
                raise RequestError(SHUT)
            if self._background is None:
                self._background = background = Background(self.config, self._disk)  # `close` finds it while it opens
                try:
                    background.wait()
                    if self._closed:
                        raise RequestError(SHUT)
                    weakref.finalize(self, background.end).atexit = False  # at exit it is waited for, and sees to that itself
                except BaseException:
                    self._background = None
                    background.end()
                    raise
            return self._background

    def _settings(self, generation: GenerationConfig | None, fields: Mapping[str, Any]) -> GenerationConfig:
        return GenerationConfig.of(self._generation if generation is None else generation, dict(fields))

    async def _turn(self, runtime: Runtime, said: str | Sequence[Mapping[str, Any]], settings: GenerationConfig) -> Completion:
        before, last = ([], said) if isinstance(said, str) else (said[:-1], said[-1])
        if self._session is None or not isinstance(said, str):
            previous, self._session = self._session, runtime.session(before)
            if previous is not None:
                await previous.aclose()
        return await runtime.collect(self._session.stream(last, settings))

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "not open" if self._background is None else repr(self._background)
        return f"<RuntimeClient {self.config.model_reference}, {state}>"
