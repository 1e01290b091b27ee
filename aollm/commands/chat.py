"""`aollm chat`: a conversation in the terminal, or over a pipe, one line a message.

The event loop has a thread of its own here, so that the main thread may wait for a line, with all that the terminal's
own line editor offers, and Ctrl-C reaches whoever is at work: the line, or the answer. Keys and values are kept from
turn to turn, and with `--save` or `--resume` from run to run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio.from_thread
from anyio.from_thread import BlockingPortal

from ..errors import AollmError, ConfigError, RequestError
from ..meter import Meter, amount, count, opening, reused
from ..reference import locate
from ..request import Token
from ..runtime import Runtime
from ..session import Session
from ..settings import GenerationConfig, RuntimeConfig
from ..stores.presets import PRESETS
from ..stream import TokenStream
from ..terminal import Row, Terminal
from . import generation_config, runtime_config
from .account import Account
from .fetch import fetched
from .transcript import Message, Transcript, load, save

HELP = """\
/save FILE   write the conversation as JSON, and what is persistent of its KV cache to disk
/load FILE   go on with a conversation that was saved
/reset       forget the conversation
/stats       figures of the last answer and of the KV cache
/help        this list
/quit        leave; so does Ctrl-D. Ctrl-C stops an answer and keeps what was said."""

KEPT = ("kv_cache_strategy", "kv_cache_lifecycle", "kv_cache_window_tokens")
"""Settings that a transcript has and `--resume` takes up again; from `cache_dir` it only says what was another one."""


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Talk until the lines end. Raises `AollmError` when the model cannot be opened or has no chat template."""
    resumed = _resumed(options["resume"]) if "resume" in options else None
    if "save" in options:
        _writable(options["save"], options.get("resume"))
    said = RuntimeConfig.said()
    if resumed is not None and resumed.model is not None and "model" not in options and "model_reference" not in said:
        options = {**options, "model": resumed.model}
    configured = {name: one.value for name, one in said.items() if name in (*KEPT, "use_cache")}
    options = {**_defaults({**configured, **options}, resumed), **options}
    generation = generation_config({**options, "n": 1})  # a turn has one answer, whatever is configured
    config = runtime_config(options)
    system = [{"role": "system", "content": options["system"]}] if "system" in options else []
    with anyio.from_thread.start_blocking_portal() as portal:
        config = portal.call(fetched, terminal, config)
        runtime = portal.call(Runtime.open, config)
        account = Account(terminal, runtime)
        terminal.status(lambda: opening(runtime))
        with portal.wrap_async_context_manager(runtime):
            terminal.status(None)
            account.opened()
            runtime.text.render([{"role": "user", "content": "hello"}])  # a model without a chat template is refused here
            chat = Chat(terminal, portal, runtime, generation, system, options.get("save"))
            if resumed is not None:
                chat.go_on(resumed, options["resume"])
            chat.talk()
            account.finished()
    return 0


NO_ANSWER: Row = [("there has been no answer yet", "")]
"""The figures of a conversation that has just begun."""


class Chat:
    """The conversation, and what the lines do to it."""

    def __init__(
        self, terminal: Terminal, portal: BlockingPortal, runtime: Runtime, generation: GenerationConfig, system: list[Message],
        saved_in: str | None = None,
    ) -> None:  # fmt: skip
        """`saved_in`: a file that the conversation is written to after each answer."""
        self._terminal, self._portal = terminal, portal
        self._runtime, self._generation = runtime, generation
        self._system = system
        self._saved_in = saved_in
        self._session: Session = runtime.session(system)
        self._unanswered = False  # the session's last message is a question that got no word of an answer
        self._loaded = False  # the next answer shows how much of a transcript was in the KV cache
        self._stats = NO_ANSWER
        self._commands: dict[str, Callable[[str], object]] = {
            "/save": self._save, "/load": self._load, "/reset": self._reset, "/stats": self._tell_stats, "/help": self._help,
        }  # fmt: skip

    @property
    def messages(self) -> list[Message]:
        """The conversation, without a question that nothing was answered to."""
        said = self._session.messages
        return said[:-1] if self._unanswered else said

    def talk(self) -> None:
        """Read lines until they end or one says `/quit`; what is persistent is written at the end."""
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

    def go_on(self, found: Transcript, name: str) -> None:
        """Go on with `found`, which was read from the file `name`."""
        self._begin(found.messages)
        self._stats = NO_ANSWER
        self._loaded = True
        self._terminal.say([(f"going on with {count(len(found.messages), 'message')} of {name}", "dim")])
        for warning in _differences(found, self._runtime.config):
            self._terminal.say([(warning, "yellow")])
        for message in found.messages[-2:]:
            self._terminal.say([(f"{message['role']}: ", "bold"), (message["content"], "dim")])

    def _answer(self, line: str) -> None:
        """One turn. What the model said before Ctrl-C is kept; a question with no word of an answer is not."""
        stream = self._portal.call(self._session.stream, line, self._generation)
        self._unanswered = True
        meter = Meter(self._runtime)
        shown, stopped = "", False
        self._terminal.status(lambda: [meter.live(stream.progress)])
        try:
            while (token := self._portal.call(_next, stream)) is not None:
                meter.add()
                if self._generation.stream:
                    shown += token.text
                    self._terminal.text(token.text)
        except KeyboardInterrupt:
            stopped = True
        finally:
            self._portal.call(_stop, stream)
            self._terminal.status(None)
            last = self._session.messages[-1]
            said = last["content"] if last["role"] == "assistant" else ""
            self._unanswered = not said
            if said:
                rest = said.removeprefix(shown)  # a token that Ctrl-C came in the way of
                self._terminal.text(rest if rest.endswith("\n") or (not rest and shown.endswith("\n")) else f"{rest}\n")
        self._stats = [*meter.summary(), *_of_cache(self._runtime, stream)]
        if stopped:
            self._terminal.say([("stopped; what was said is kept" if said else "stopped", "yellow")])
        if self._loaded and stream.request is not None and meter.tokens:
            self._loaded = False
            self._terminal.say([(reused(stream.request), "dim")])
        if self._saved_in is not None and said:
            self._write(self._saved_in)

    def _save(self, name: str) -> None:
        self._write(name)
        kept = f"saved {count(len(self.messages), 'message')} in {name}"
        if (cache := self._runtime.cache) is not None and cache.lifecycle.persistent:
            self._begin(self.messages)  # with the end of a session its last, incomplete block is stored too
            self._portal.call(cache.flush)
            if self._runtime.cache_state()["persisted_tokens"]:  # a few tokens are not worth a file
                kept += f", its KV cache in {self._runtime.config.cache_dir}"
        self._terminal.say([(kept, "dim")])

    def _write(self, name: str) -> None:
        config = self._runtime.config
        told = {key: value for key in KEPT if (value := getattr(config, key)) is not None}
        if config.kv_cache_lifecycle == "persistent":
            told["cache_dir"] = str(config.cache_dir)
        save(_file(name), config.model_reference, self.messages, told)

    def _load(self, name: str) -> None:
        self.go_on(load(_file(name)), name)

    def _reset(self, _: str) -> None:
        self._begin(self._system)
        self._stats = NO_ANSWER
        self._terminal.say([("forgotten", "dim")])

    def _begin(self, messages: list[Message]) -> None:
        """Another session with these messages, in place of the one so far."""
        self._portal.call(self._session.aclose)
        self._session = self._runtime.session(messages)
        self._unanswered = self._loaded = False

    def _tell_stats(self, _: str) -> None:
        self._terminal.say([(f"{count(len(self.messages), 'message')} · ", "dim"), *self._stats])

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


async def _stop(stream: TokenStream) -> None:
    stream.cancel()
    await stream.ended()


def _of_cache(runtime: Runtime, stream: TokenStream) -> Row:
    """What the KV cache did for an answer, and what is in it."""
    state = runtime.cache_state()
    parts = [reused(stream.request)] if stream.request is not None else []
    parts.append(f"KV {state['strategy_id']}: {state['resident_tokens']:,} tokens in memory ({amount(state['resident_bytes'])})")
    if state["persisted_bytes"]:
        parts.append(f"{state['persisted_tokens']:,} on disk ({amount(state['persisted_bytes'])})")
    return [("".join(f" · {part}" for part in parts), "dim")]


def _resumed(name: str) -> Transcript:
    try:
        return load(_file(name))
    except RequestError as error:
        raise ConfigError(f"--resume: {error}") from None


def _defaults(options: Mapping[str, Any], resumed: Transcript | None) -> dict[str, Any]:
    """What a conversation that outlives the run is held with, unless told otherwise: the settings it had, or blocks in pages."""
    if not options.keys() & {"resume", "save"} or options.get("kv_cache_lifecycle") == "runtime-scoped":
        return {}
    if options.get("use_cache") is False:
        return {}
    if "kv_cache_strategy" in options:
        preset = PRESETS.get(str(options["kv_cache_strategy"]))  # none for auto, which then chooses one that writes
        return {} if preset is not None and preset.layout is None else {"kv_cache_lifecycle": "persistent"}
    kept = {name: resumed.settings[name] for name in KEPT if name in resumed.settings} if resumed is not None else {}
    return kept if kept.get("kv_cache_lifecycle") == "persistent" else {"kv_cache_strategy": "paged", "kv_cache_lifecycle": "persistent"}


def _differences(found: Transcript, config: RuntimeConfig) -> list[str]:
    """Why less of a transcript than was computed can be in this run's KV cache."""
    told = []
    if found.model is not None and found.model != config.model_reference and not _same(found.model, config.model_reference):
        told.append(f"the transcript is of the model {found.model}: {config.model_reference} reads all of it anew")
    used = found.settings.get("cache_dir")
    if used is not None and config.kv_cache_lifecycle == "persistent" and used != str(config.cache_dir):
        told.append(f"its KV cache was kept with --cache-dir {used}, not {config.cache_dir}")
    return told


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model's folder."""
    try:
        return locate(one) == locate(other)
    except AollmError:
        return False


def _writable(name: str, resumed: str | None) -> None:
    """Raises `ConfigError` unless a new file could be written there, or the one that is resumed: better now than after an answer."""
    path = _file(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--save {name} cannot be written: {'it is a folder' if path.is_dir() else 'there is no such folder'}")
    if path.exists() and (resumed is None or not path.samefile(_file(resumed))):
        raise ConfigError(f"--save {name} is there already: go on with it by --resume {name} as well, or choose another name")


def _file(name: str) -> Path:
    if not name:
        raise RequestError("give the name of a file, such as /save talk.json")
    return Path(name).expanduser()
