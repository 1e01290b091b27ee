"""`aollm chat`: a conversation in the terminal, or over a pipe, one line a message.

The event loop has a thread of its own here, so that the main thread may wait for a line, with all that the terminal's
own line editor offers, and Ctrl-C reaches whoever is at work: the line, or the answer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio.from_thread
from anyio.from_thread import BlockingPortal

from ..errors import AollmError, RequestError
from ..meter import Meter, count, opening
from ..request import Token
from ..runtime import Runtime
from ..settings import GenerationConfig
from ..stream import TokenStream
from ..terminal import Row, Terminal
from . import generation_config, runtime_config
from .transcript import Message, load, save

HELP = """\
/save FILE   write the conversation as JSON
/load FILE   go on with a conversation that was saved
/reset       forget the conversation
/stats       figures of the last answer
/help        this list
/quit        leave; so does Ctrl-D. Ctrl-C stops an answer and keeps what was said."""


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Talk until the lines end. Raises `AollmError` when the model cannot be opened or has no chat template."""
    generation = generation_config(options)
    config = runtime_config(options)
    system = [{"role": "system", "content": options["system"]}] if "system" in options else []
    with anyio.from_thread.start_blocking_portal() as portal:
        runtime = portal.call(Runtime.open, config)
        terminal.status(lambda: opening(runtime))
        with portal.wrap_async_context_manager(runtime):
            terminal.status(None)
            runtime.text.render([{"role": "user", "content": "hello"}])  # a model without a chat template is refused here
            Chat(terminal, portal, runtime, generation, system).talk()
    return 0


class Chat:
    """The conversation, and what the lines do to it."""

    def __init__(
        self, terminal: Terminal, portal: BlockingPortal, runtime: Runtime, generation: GenerationConfig, system: list[Message]
    ) -> None:
        self._terminal, self._portal = terminal, portal
        self._runtime, self._generation = runtime, generation
        self._system = system
        self._messages = list(system)
        self._stats: Row = [("there has been no answer yet", "")]
        self._commands: dict[str, Callable[[str], object]] = {
            "/save": self._save, "/load": self._load, "/reset": self._reset, "/stats": self._tell_stats, "/help": self._help,
        }  # fmt: skip

    def talk(self) -> None:
        """Read lines until they end or one says `/quit`."""
        self._terminal.say([(f"{self._runtime.config.model_reference}: type a message, or /help", "dim")])
        for line in lines(self._terminal):
            if not line.strip():
                continue
            name, _, argument = line.strip().partition(" ")
            if name == "/quit":
                return
            try:
                if name.startswith("/"):
                    self._commands.get(name, self._unknown)(argument.strip())
                else:
                    self._answer(line)
            except AollmError as error:
                self._terminal.status(None)
                self._terminal.error(str(error))

    def _answer(self, line: str) -> None:
        """One turn. What the model said before Ctrl-C is kept; a question with no word of an answer is not."""
        messages: list[Message] = [*self._messages, {"role": "user", "content": line}]
        stream = self._runtime.stream(messages, self._generation)
        meter = Meter(self._runtime)
        said, token, stopped = "", None, False
        self._terminal.status(lambda: [meter.live(stream.progress)])
        try:
            while (token := self._portal.call(_next, stream)) is not None:
                meter.add()
                said += token.text
                self._terminal.text(token.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            self._portal.call(stream.cancel)
            self._terminal.status(None)
            if said:
                self._messages = [*messages, {"role": "assistant", "content": said}]
                self._terminal.text("" if said.endswith("\n") else "\n")
        self._stats = meter.summary()
        if stopped:
            self._terminal.say([("stopped; what was said is kept" if said else "stopped", "yellow")])

    def _save(self, name: str) -> None:
        save(_file(name), self._runtime.config.model_reference, self._messages)
        self._terminal.say([(f"saved {count(len(self._messages), 'message')} in {name}", "dim")])

    def _load(self, name: str) -> None:
        self._messages = load(_file(name))
        self._terminal.say([(f"going on with {count(len(self._messages), 'message')} of {name}", "dim")])
        for message in self._messages[-2:]:
            self._terminal.say([(f"{message['role']}: ", "bold"), (message["content"], "dim")])

    def _reset(self, _: str) -> None:
        self._messages = list(self._system)
        self._terminal.say([("forgotten", "dim")])

    def _tell_stats(self, _: str) -> None:
        self._terminal.say([(f"{count(len(self._messages), 'message')} · ", "dim"), *self._stats])

    def _help(self, _: str) -> None:
        for line in HELP.splitlines():
            self._terminal.say([(line, "")])

    def _unknown(self, _: str) -> None:
        self._terminal.error(f"there is no such command; there are {', '.join(self._commands)} and /quit")


def lines(terminal: Terminal) -> Iterator[str]:
    """Lines of stdin until it ends, with the line editor where a person types. Ctrl-C at the prompt drops the line."""
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed and terminal.interactive:
        import readline  # noqa: F401  gives `input` its history
    while sys.stdin is not None:
        try:
            if typed and terminal.interactive:
                yield input("> ")
            elif line := sys.stdin.readline():
                yield line.removesuffix("\n")
            else:
                return
        except EOFError:
            terminal.line()
            return
        except UnicodeDecodeError as error:
            raise RequestError(f"stdin is not UTF-8: {error}") from None
        except KeyboardInterrupt:
            if not typed:
                raise
            terminal.line()
            terminal.say([("Ctrl-D or /quit leaves", "dim")])


async def _next(stream: TokenStream) -> Token | None:
    return await anext(stream, None)


def _file(name: str) -> Path:
    if not name:
        raise RequestError("give the name of a file, such as /save talk.json")
    return Path(name).expanduser()
