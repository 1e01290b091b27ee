"""The parser: which commands there are and what may be typed behind them.

It imports nothing heavy. Settings are passed on as they were typed: `settings` says what is accepted.
"""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from . import __version__
from .errors import ConfigError
from .options import GENERATION, KV_CACHE, OUTPUT, PLACEMENT, RUNTIME, RUNTIME_GROUPS

EPILOG = """\
examples:
  aollm demo                                see it work, with the bundled model
  aollm doctor                              is this machine ready, how fast is it
  aollm run demo "Once upon a time"         complete a text
  aollm run ~/llama-70b "Dear Sir," --memory 8GiB
                                            a model larger than memory
  aollm run ~/gemma3-12b "What is this?" --image photo.png
  aollm plan ~/llama-70b --memory 8GiB      what would be kept, and what read
  aollm chat ~/llama-8b --save talk.json    a conversation that can be resumed
  aollm models ls                           which models are here
  aollm export ~/llama-8b --verify          weights as raw files, for direct reads
  aollm cache ls                            what is stored of earlier runs

MODEL is a folder with config.json, *.safetensors and a tokenizer, an alias such
as demo, or org/repo[@revision] of the Hugging Face Hub. It may be left out where
a setting names it: AOLLM_RUNTIME__MODEL_REFERENCE, or aollm.toml.
"""
MODEL_HELP = "a folder, an alias, or org/repo[@rev] (default: as configured)"
SHELLS = ("bash", "zsh", "fish")


class Help(argparse.RawDescriptionHelpFormatter):
    """Commands without the empty line that stands for their name; names are not broken at their hyphens."""

    def __init__(self, prog: str, **fields: Any) -> None:
        super().__init__(prog, max_help_position=32, **fields)

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        return text.partition("\n")[2] if isinstance(action, argparse._SubParsersAction) else text

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(text if "\n" in text else textwrap.fill(text, width), width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviations."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields, allow_abbrev=False, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """One of the choices, or an error with all of them and the nearest."""
        if action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices], 1)
            question = f"; did you mean {near[0]}?" if near else ""
            self.error(f"invalid choice: {value!r} (choose from {', '.join(map(repr, action.choices))}){question}")


def parse(argv: Sequence[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, and the options that were given: nothing is filled in. Raises `ConfigError` for bad use."""
    parser, known = parsers()
    namespace, unknown = parser.parse_known_args(argv)
    options = vars(namespace)
    used = options.pop("parser", None) or known.get(options.get("command", ""), parser)
    words = _words(used, unknown)
    if options.get("command") == "run":
        _read_words(used, options, words)
    elif words:
        used.error(f"{words[0]!r} is more than {used.prog} takes")
    return parser, options


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """The parser of everything, and that of each command."""
    parser = Parser(
        prog="aollm",
        usage="aollm COMMAND [options]",
        description="Runs language models that are larger than memory: weights stream from disk, ahead of need.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"aollm {__version__}")
    commands = parser.add_subparsers(title="commands", prog="aollm", metavar="")
    return parser, {name: make(commands) for name, make in COMMANDS.items()}


def _words(parser: Parser, unknown: Sequence[str]) -> list[str]:
    """The words among what was not understood, which come behind an option; raises `ConfigError` for an option."""
    end = unknown.index("--") if "--" in unknown else len(unknown)
    for text in unknown[:end]:
        if parser._parse_optional(text) is not None:  # argparse's own opinion: a number and a text with blanks are words
            near = difflib.get_close_matches(text.split("=")[0], parser._option_string_actions, 1)
            parser.error(f"{text} is not known" + (f"; did you mean {near[0]}?" if near else ""))
    return [*unknown[:end], *unknown[end + 1 :]]


def _read_words(parser: Parser, options: dict[str, Any], behind: Sequence[str]) -> None:
    """MODEL PROMPT or, as the model may be configured, PROMPT alone; `behind` were typed after options."""
    words = [*(options.pop(name) for name in ("model", "prompt") if name in options), *behind]
    if not words:
        parser.error("the following arguments are required: PROMPT, behind MODEL where none is configured")
    if len(words) > 2:
        parser.error(f"MODEL and PROMPT are two words, and these are {len(words)}; put a prompt in quotes")
    options.update(zip(("model", "prompt")[-len(words) :], words, strict=True))


def _command(commands: Any, name: str, arguments: str, description: str, more: str = "") -> Parser:
    parser: Parser = commands.add_parser(
        name,
        usage=f"aollm {name} {arguments}[options]",
        help=description,
        description=f"{description[0].upper()}{description[1:]}.{more}",
        argument_default=argparse.SUPPRESS,
    )
    parser.set_defaults(command=name)
    return parser


def _actions(parser: Parser, rows: Iterable[tuple[str, str, str, str]]) -> dict[str, Parser]:
    """What a command can do: name, arguments, description, and what else is to be said of it."""
    actions = parser.add_subparsers(title="actions", prog=parser.prog, metavar="ACTION", dest="action", required=True)
    made: dict[str, Parser] = {}
    for name, arguments, description, more in rows:
        action: Parser = actions.add_parser(
            name, usage=f"{parser.prog} {name} {arguments}[options]", help=description, argument_default=argparse.SUPPRESS,
            description=f"{description[0].upper()}{description[1:]}.{more}",
        )  # fmt: skip
        action.set_defaults(parser=action)
        made[name] = action
    return made


def _demo(commands: Any) -> Parser:
    parser = _command(commands, "demo", "", "watch the bundled model being read from disk while it writes")
    _quiet(parser)
    return parser


def _run(commands: Any) -> Parser:
    parser = _command(commands, "run", "[MODEL] PROMPT ", "complete a text")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    prompt = "the text to go on from; - reads it from stdin, without its last newline"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help=prompt)
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message: put it into the model's chat template")
    parser.add_argument("--image", action="append", metavar="FILE", help="show a picture before PROMPT; may be given more than once")
    parser.add_argument("--audio", action="append", metavar="FILE", help="play a sound before PROMPT; may be given more than once")
    for group in (GENERATION, RUNTIME, PLACEMENT, KV_CACHE):
        group.add_to(parser)
    output = OUTPUT.add_to(parser)
    output.add_argument("--json", action="store_true", help="one JSON object at the end in place of the text")
    output.add_argument("--trace", metavar="FILE", help="write what happened when, for chrome://tracing or Perfetto")
    return parser


def _chat(commands: Any) -> Parser:
    parser = _command(commands, "chat", "[MODEL] ", "talk with a model; /help says what else can be typed")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--system", metavar="TEXT", help="a first message with the role system")
    parser.add_argument("--save", metavar="FILE", help="write the conversation there after each answer, and keep its KV cache")
    parser.add_argument("--resume", metavar="FILE", help="go on with a conversation that was saved, and with its KV cache")
    GENERATION.add_to(parser, without=("n", "logprobs", "stream"))
    for group in RUNTIME_GROUPS:
        group.add_to(parser)
    return parser


def _plan(commands: Any) -> Parser:
    parser = _command(commands, "plan", "[MODEL] ", "say what a run would keep and what it would read; loads no weights")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    for group in (RUNTIME, PLACEMENT, KV_CACHE):
        group.add_to(parser)
    OUTPUT.add_to(parser).add_argument("--json", action="store_true", help="the plan as one JSON object")
    return parser


def _models(commands: Any) -> Parser:
    parser = _command(commands, "models", "ACTION ", "say which models are on this machine, and what one is")
    what = " No weights are read, and nothing is asked of the network."
    for name, action in _actions(parser, (
        ("ls", "", "list the aliases and all models that are here", what),
        ("info", "[MODEL] ", "say what a model is, from its config.json and the headers of its files", what),
    )).items():  # fmt: skip
        if name == "info":
            action.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
        RUNTIME.options["models_dir"].add_to(action, "models_dir")
        action.add_argument("--json", action="store_true", help="JSON in place of the table")
        _quiet(action)
    return parser


def _doctor(commands: Any) -> Parser:
    parser = _command(
        commands, "doctor", "", "check whether this machine is ready, and measure it",
        " It ends with 1 if there is a problem. It writes 256 MiB to --cache-dir and reads them again; nothing is left of them.",
    )  # fmt: skip
    RUNTIME.options["models_dir"].add_to(parser, "models_dir")
    KV_CACHE.options["cache_dir"].add_to(parser, "cache_dir")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the list")
    _quiet(parser)
    return parser


def _export(commands: Any) -> Parser:
    parser = _command(commands, "export", "[MODEL] ", "write the weights as raw aligned files, which can be read without safetensors")
    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument("--output", metavar="DIR", help="where to; a model by itself then (default: gds_export in the model's folder)")
    parser.add_argument("--verify", action="store_true", help="read all of it back and check it; an export that is there is only checked")
    parser.add_argument("--force", action="store_true", help="make it again where there is one already")
    RUNTIME.options["models_dir"].add_to(parser, "models_dir")
    PLACEMENT.options["disk_backend"].add_to(parser, "disk_backend")
    _quiet(parser)
    return parser


def _cache(commands: Any) -> Parser:
    parser = _command(commands, "cache", "ACTION ", "list, check, keep or remove what persistent KV caches have stored")
    named = " NAME is how the name of a volume or of its model begins."
    for name, action in _actions(parser, (
        ("ls", "[NAME] ", "list what is stored, with sizes", named),
        ("verify", "[NAME] ", "read every stored block and check it", named),
        ("purge", "NAME ", "remove what is stored", named),
        ("pin", "NAME ", "never drop it for room or age", named),
        ("unpin", "NAME ", "let it be dropped for room or age again", named),
    )).items():  # fmt: skip
        action.add_argument("prefix", metavar="NAME", nargs="?", help=argparse.SUPPRESS)
        if name == "verify":
            action.add_argument("--drop", action="store_true", help="have damaged blocks not be found any more")
        elif name != "ls":
            action.add_argument("--all", action="store_true", help="in place of NAME: everything")
        action.add_argument("--cache-dir", metavar="FOLDER", help="where to look (default: aollm in your cache folder)")
        action.add_argument("--json", action="store_true", help="one JSON list in place of the table")
        _quiet(action)
    return parser


def _config(commands: Any) -> Parser:
    parser = _command(commands, "config", "ACTION ", "show the settings that a run would have")
    show = _actions(parser, [("show", "", "list every setting, and where its value comes from", "")])["show"]
    for group in (GENERATION, RUNTIME, PLACEMENT, KV_CACHE):
        group.add_to(show)
    OUTPUT.add_to(show).add_argument("--json", action="store_true", help="one JSON object in place of the table")
    return parser


def _completion(commands: Any) -> Parser:
    more = (
        " Have your shell read it: put eval \"$(aollm completion bash)\" into ~/.bashrc, the same with zsh into ~/.zshrc,"
        " or write that of fish to ~/.config/fish/completions/aollm.fish."
    )  # fmt: skip
    parser = _command(commands, "completion", "SHELL ", "print a script by which a shell completes what is typed", more)
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash, zsh or fish")
    return parser


def _quiet(parser: Parser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no live status")


COMMANDS: dict[str, Callable[[Any], Parser]] = {
    "demo": _demo, "run": _run, "chat": _chat, "plan": _plan, "models": _models, "doctor": _doctor, "export": _export,
    "cache": _cache, "config": _config, "completion": _completion,
}  # fmt: skip
