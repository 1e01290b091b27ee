"""The command `aollm`: what may be typed, and which exit code follows.

It imports nothing heavy, so that help and mistakes are answered at once; a command's own module is imported when it runs.
Settings are passed on as they were typed: `settings` says what is accepted.
"""

from __future__ import annotations

import argparse
import difflib
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from . import __version__
from .errors import AollmError, ConfigError
from .terminal import Terminal, spinner

BAD_USE, FAILURE, INTERRUPTED, BROKEN_PIPE = 2, 1, 128 + signal.SIGINT, 128 + signal.SIGPIPE

EPILOG = """\
examples:
  aollm demo                                              see it work, with the bundled model
  aollm run demo "Once upon a time" --max-new-tokens 60
  aollm run ~/models/llama-70b "Dear Sir," --memory 8GiB  a model larger than memory
  aollm run ~/models/gemma3-12b "What is this?" --image photo.png
  aollm plan ~/models/llama-70b --memory 8GiB             what would be kept, and what read
  aollm chat ~/models/llama-8b --save talk.json           a conversation that can be resumed
  aollm export ~/models/llama-8b --verify                 its weights as raw files, for direct reads
  aollm cache ls                                          what is stored of earlier runs

MODEL is a folder with config.json, *.safetensors and a tokenizer, an alias such as demo, or org/repo[@revision] of the
Hugging Face Hub.
"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Commands without the empty line that stands for their name."""

    def __init__(self, prog: str, **fields: Any) -> None:
        super().__init__(prog, max_help_position=32, **fields)

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields, allow_abbrev=False, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0, 1 for a failure, 2 for bad use, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        parser, options = parse(sys.argv[1:] if argv is None else argv)
        if "command" not in options:
            parser.print_help()
            return 0
        with Terminal(options.pop("quiet", False)) as terminal:
            try:
                command = load(terminal, options.pop("command"))
                return int(command.main(terminal, options))
            except KeyboardInterrupt:
                return INTERRUPTED
            except AollmError as error:
                terminal.status(None)
                terminal.error(str(error))
                return BAD_USE if isinstance(error, ConfigError) else FAILURE
    except KeyboardInterrupt:
        return INTERRUPTED
    except ConfigError as error:
        Terminal().error(str(error))
        return BAD_USE
    except BrokenPipeError:  # whoever read has gone; nothing is left to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE


def load(terminal: Terminal, name: str) -> ModuleType:
    """The command's module, and torch with it. Ctrl-C ends the process there and then: libraries swallow the exception."""

    def leave(number: int, frame: object) -> None:
        terminal.status(None)
        os._exit(INTERRUPTED)

    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("loading", "dim")]])
    before = signal.signal(signal.SIGINT, leave)
    try:
        return import_module(f".commands.{name}", __package__)
    finally:
        signal.signal(signal.SIGINT, before)
        terminal.status(None)


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the options that were given: nothing is filled in. Raises `ConfigError` for bad use."""
    parser = Parser(
        prog="aollm",
        usage="aollm COMMAND [options]",
        description="Runs language models that are larger than memory: weights stream from disk, ahead of need.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"aollm {__version__}")
    commands = parser.add_subparsers(title="commands", prog="aollm", metavar="")
    makers = {"demo": _demo, "run": _run, "chat": _chat, "plan": _plan, "export": _export, "cache": _cache}
    known = {name: make(commands) for name, make in makers.items()}
    namespace, unknown = parser.parse_known_args(argv)
    options = vars(namespace)
    if unknown:
        used = options.pop("parser", None) or known.get(options.get("command", ""), parser)
        near = difflib.get_close_matches(unknown[0].split("=")[0], used._option_string_actions, 1)
        used.error(f"{unknown[0]} is not known" + (f"; did you mean {near[0]}?" if near else ""))
    options.pop("parser", None)
    return parser, options


def _command(commands: Any, name: str, arguments: str, description: str) -> Parser:
    parser: Parser = commands.add_parser(
        name,
        usage=f"aollm {name} {arguments}[options]",
        help=description,
        description=f"{description[0].upper()}{description[1:]}.",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=name)
    return parser


def _demo(commands: Any) -> Parser:
    parser = _command(commands, "demo", "", "watch the bundled model being read from disk while it writes")
    parser.add_argument("--quiet", action="store_true", help="no live status")
    return parser


def _run(commands: Any) -> Parser:
    parser = _command(commands, "run", "MODEL PROMPT ", "complete a text")
    parser.add_argument("model", metavar="MODEL", help="a folder, an alias, or org/repo[@rev]")
    parser.add_argument("prompt", metavar="PROMPT", help="the text to go on from; - reads it from stdin, without its last newline")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message: put it into the model's chat template")
    parser.add_argument("--image", action="append", metavar="FILE", help="show a picture before PROMPT; may be given more than once")
    parser.add_argument("--audio", action="append", metavar="FILE", help="play a sound before PROMPT; may be given more than once")
    _generation(parser)
    parser.add_argument("--adapter", metavar="NAME", help="answer with this one of the adapters in --adapter-dir (default: with none)")
    parser.add_argument("-n", type=int, metavar="N", help="answers to the same prompt; they share each pass (default 1)")
    _runtime(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object at the end in place of the text")
    output.add_argument("--trace", metavar="FILE", help="write what happened when, for chrome://tracing or Perfetto")
    output.add_argument("--quiet", action="store_true", help="no status and no summary on stderr")
    return parser


def _chat(commands: Any) -> Parser:
    parser = _command(commands, "chat", "MODEL ", "talk with a model; /help says what else can be typed")
    parser.add_argument("model", metavar="MODEL", help="a folder, an alias, or org/repo[@rev]")
    parser.add_argument("--system", metavar="TEXT", help="a first message with the role system")
    parser.add_argument("--save", metavar="FILE", help="write the conversation there after each answer, and keep its KV cache")
    parser.add_argument("--resume", metavar="FILE", help="go on with a conversation that was saved, and with its KV cache")
    _generation(parser)
    _runtime(parser)
    parser.add_argument("--quiet", action="store_true", help="no status and no summary on stderr")
    return parser


def _plan(commands: Any) -> Parser:
    parser = _command(commands, "plan", "MODEL ", "say what a run would keep and what it would read; loads no weights")
    parser.add_argument("model", metavar="MODEL", help="a folder, an alias, or org/repo[@rev]")
    _runtime(parser)
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no live status")
    return parser


def _export(commands: Any) -> Parser:
    parser = _command(commands, "export", "MODEL ", "write the weights as raw aligned files, which can be read without safetensors")
    parser.add_argument("model", metavar="MODEL", help="a folder, an alias, or org/repo[@rev]")
    parser.add_argument("--output", metavar="DIR", help="where to; a model by itself then (default: gds_export in the model's folder)")
    parser.add_argument("--verify", action="store_true", help="read all of it back and check it; an export that is there is only checked")
    parser.add_argument("--force", action="store_true", help="make it again where there is one already")
    parser.add_argument("--quiet", action="store_true", help="no live status")
    return parser


def _cache(commands: Any) -> Parser:
    parser = _command(commands, "cache", "ACTION ", "list, check, keep or remove what persistent KV caches have stored")
    actions = parser.add_subparsers(title="actions", prog="aollm cache", metavar="ACTION", dest="action", required=True)
    for name, arguments, description in (
        ("ls", "[NAME] ", "list what is stored, with sizes"),
        ("verify", "[NAME] ", "read every stored block and check it"),
        ("purge", "NAME ", "remove what is stored"),
        ("pin", "NAME ", "never drop it for room or age"),
        ("unpin", "NAME ", "let it be dropped for room or age again"),
    ):
        action = actions.add_parser(
            name, usage=f"aollm cache {name} {arguments}[options]", help=description, argument_default=argparse.SUPPRESS,
            description=f"{description[0].upper()}{description[1:]}. NAME is how the name of a volume or of its model begins.",
        )  # fmt: skip
        action.set_defaults(parser=action)
        action.add_argument("prefix", metavar="NAME", nargs="?", help=argparse.SUPPRESS)
        if name == "verify":
            action.add_argument("--drop", action="store_true", help="have damaged blocks not be found any more")
        elif name != "ls":
            action.add_argument("--all", action="store_true", help="in place of NAME: everything")
        action.add_argument("--cache-dir", metavar="FOLDER", help="where to look (default: aollm in your cache folder)")
        action.add_argument("--json", action="store_true", help="one JSON list in place of the table")
        action.add_argument("--quiet", action="store_true", help="no live status")
    return parser


def _generation(parser: Parser) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens of an answer at most (default 256)")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token (default)")
    group.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that together have P")
    group.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    group.add_argument("--min-p", type=float, metavar="P", help="leave out what is less than P times as likely as the likeliest")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1: what was said becomes less likely")
    group.add_argument("--seed", type=int, metavar="S", help="the same seed draws the same tokens")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given more than once")
    group.add_argument("--context-shift", metavar="HOW", help="when the context is full: stop (default), rotate or prefill")
    group.add_argument("--keep-tokens", type=int, metavar="N", help="first tokens that a context shift keeps (default 4)")
    group.add_argument("--cache-salt", metavar="TEXT", help="share stored prompts only with runs that give the same text")


def _runtime(parser: Parser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument("--memory", metavar="SIZE", help="limit for the whole process, such as 3GiB (default: what is free)")
    group.add_argument("--max-context-tokens", type=int, metavar="N", help="the longest prompt and answer together")
    group.add_argument("--max-concurrent-requests", type=int, metavar="N", help="requests that may ride on one pass")
    group.add_argument("--disk-backend", metavar="NAME", help="auto, threads, uring, gds or portable")
    group.add_argument("--prefetch-depth", type=int, metavar="N", help="pieces that are read ahead of need (default 2)")
    group.add_argument("--dense-projection-chunk-rows", type=int, metavar="N", help="rows that are computed at a time")
    group.add_argument("--models-dir", metavar="FOLDER", help="where models of the Hub are kept (default: huggingface_hub's cache)")
    group.add_argument("--force-download", action="store_true", help="fetch a model of the Hub again, all of it")
    group.add_argument("--adapter-dir", metavar="FOLDER", help="a LoRA adapter, or a folder with several")
    group.add_argument("--expert-memory", metavar="SIZE", help="what experts may have of the memory (default: all that is left)")
    group.add_argument("--offload-cpu-layers", type=int, metavar="N", help="keep just N layers in memory (default: all that fit)")
    group.add_argument("--offload-cpu-policy", metavar="WHICH", help="auto, prefix, suffix or middle-band")
    group = parser.add_argument_group("KV cache")
    group.add_argument(
        "--kv-cache-strategy", metavar="NAME", help="resident (default: all in memory); on disk: chunked, paged, streamed-segmented, "
        "log-structured-journal, sliding-window-ring-buffer, quantized-cold-tier or tiered-write-back",
    )  # fmt: skip
    group.add_argument("--kv-cache-lifecycle", metavar="WHICH", help="runtime-scoped (default) or persistent")
    group.add_argument("--kv-cache-window-tokens", type=int, metavar="N", help="tokens kept by sliding-window-ring-buffer")
    group.add_argument("--kv-cache-memory", metavar="SIZE", help="memory for keys and values (default: a share of --memory)")
    group.add_argument("--kv-cache-max-bytes", metavar="SIZE", help="room on disk for what is persistent; the oldest goes first")
    group.add_argument("--kv-cache-max-age-s", type=float, metavar="S", help="seconds for which what is persistent is kept")
    group.add_argument("--cache-dir", metavar="FOLDER", help="where it is stored (default: aollm in your cache folder)")
