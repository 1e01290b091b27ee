"""`aollm run`: one prompt, its answer on stdout as it is written."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import anyio

from ..errors import ConfigError, RequestError
from ..media import read_part
from ..media.sound import RATE_HZ
from ..meter import Meter, opening, reused
from ..options import MODELS
from ..prompt import Prompt
from ..request import Request, Token
from ..runtime import Runtime
from ..settings import GenerationConfig, RuntimeConfig
from ..terminal import Terminal
from . import generation_config, runtime_config
from .account import Account
from .fetch import fetched


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Answer one prompt. Raises `AollmError`, and `KeyboardInterrupt` when what was written until then is there."""
    generation = generation_config(options)
    prompted(options)
    config = runtime_config(options)
    text = prompt_text(options["prompt"])
    parts = media_parts(options.get("image", ()), options.get("audio", ()))
    content = [*parts, {"type": "text", "text": text}] if parts else text
    prompt: Prompt = [{"role": "user", "content": content}] if parts or options.get("chat") else text
    if trace := options.get("trace"):
        writable(trace)
    answer = Answer(terminal, options.get("json", False), generation)
    anyio.run(_answer, config, prompt, generation, answer, trace)
    return 0


class Answer:
    """What has been written so far; the first of several answers is shown as it comes, the others behind it. Without `stream`
    the first one, too, is shown when it is whole."""

    def __init__(self, terminal: Terminal, as_json: bool, generation: GenerationConfig) -> None:
        self.terminal, self.as_json, self._streamed = terminal, as_json, generation.stream
        self._logprobs = generation.logprobs > 0
        self.tokens: list[list[Token]] = [[] for _ in range(generation.n)]

    def add(self, token: Token) -> None:
        """One more token."""
        self.tokens[token.choice].append(token)
        if token.choice == 0 and self._streamed and not self.as_json:
            self.terminal.text(token.text)

    def end(self, meter: Meter, request: Request | None) -> None:
        """Write what is left to write, and the summary. `request`: None if it did not come to be."""
        self.terminal.status(None)
        if self.as_json:
            self.terminal.text(json.dumps(self._as_dict(meter, request)) + "\n")
            return
        first = "".join(token.text for token in self.tokens[0])
        if not self._streamed:
            self.terminal.text(first)
        if self.tokens[0] and not first.endswith("\n"):
            self.terminal.text("\n")
        for number, tokens in enumerate(self.tokens[1:], 2):
            self.terminal.text(f"\n--- {number} of {len(self.tokens)} ---\n{''.join(token.text for token in tokens)}\n")
        self.terminal.say(meter.summary(request))
        if request is not None and meter.runtime.config.kv_cache_lifecycle == "persistent":
            self.terminal.say([(reused(request), "dim")])

    def _as_dict(self, meter: Meter, request: Request | None) -> dict[str, Any]:
        choices = [
            {
                "text": "".join(token.text for token in tokens),
                "token_ids": [token.id for token in tokens],
                "finish_reason": (tokens[-1].finish_reason if tokens else None) or "cancelled",
                "logprobs": [{"logprob": token.logprob, "likeliest": token.top_logprobs} for token in tokens] if self._logprobs else None,
            }
            for tokens in self.tokens
        ]
        state = meter.runtime.cache_state() if request is None else meter.runtime.cache_state_of(request)
        return {**choices[0], "choices": choices, **meter.figures(request), "cache_state": state, "plan": meter.runtime.plan.as_dict()}


async def _answer(config: RuntimeConfig, prompt: Prompt, generation: GenerationConfig, answer: Answer, trace: str | None) -> None:
    terminal = answer.terminal
    runtime = Runtime.open(await fetched(terminal, config))
    stream = runtime.stream(prompt, generation)
    account = Account(terminal, runtime)
    terminal.status(lambda: opening(runtime))
    async with runtime:
        account.opened()
        meter = Meter(runtime)
        terminal.status(lambda: [meter.live(stream.progress)])
        try:
            async for token in stream:
                meter.add()
                answer.add(token)
        except anyio.get_cancelled_exc_class():
            answer.end(meter, stream.request)
            raise
        else:
            answer.end(meter, stream.request)
        finally:
            account.finished()
            if trace:
                runtime.trace.save(trace)


def prompted(options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` where the one word that was typed is a model, and none is configured that it could be a prompt for."""
    if "model" in options or "model_reference" in RuntimeConfig.said():
        return
    word = options["prompt"]
    if word in MODELS or os.path.isdir(os.path.expanduser(word)):
        raise ConfigError(f"PROMPT is missing: aollm run {shlex.quote(word)} PROMPT")


def prompt_text(given: str) -> str:
    """The prompt that was typed, or for `-` what stdin holds but for one last newline. Raises `ConfigError`."""
    if given != "-":
        return given
    try:
        text = sys.stdin.buffer.read().decode() if sys.stdin is not None else ""
    except UnicodeDecodeError as error:
        raise ConfigError(f"the prompt on stdin is not UTF-8: {error}") from None
    return text.removesuffix("\n")


def media_parts(images: Iterable[str], sounds: Iterable[str]) -> list[dict[str, Any]]:
    """Parts of a message from files: read now, so that a bad one is told before a model is opened. Raises `RequestError`."""
    parts: list[dict[str, Any]] = []
    for kind, files in (("image", images), ("audio", sounds)):
        for file in files:
            try:
                parts.append({"type": kind, kind: read_part({"type": kind, "path": file}).data, "sampling_rate": RATE_HZ})
            except RequestError as error:
                raise RequestError(f"--{kind} {file}: {error}") from error
    return parts


def writable(path: str) -> None:
    """Raises `ConfigError` unless a file can be written at `path`: better now than after the answer."""
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ConfigError(f"--trace {path} cannot be written: {error.strerror}") from None
