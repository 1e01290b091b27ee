"""The command `aollm`: what was typed is run, and an exit code follows.

It imports nothing heavy, so that help and mistakes are answered at once; a command's own module is imported when it runs.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from .configuration import quiet
from .errors import AollmError, ConfigError
from .parser import parse
from .terminal import INTERRUPTED, Terminal

BAD_USE, FAILURE, BROKEN_PIPE = 2, 1, 128 + signal.SIGPIPE

UNCONFIGURED = ("completion", "doctor")
"""Commands that work where the configuration is broken, or packages are missing."""


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
        with Terminal(is_quiet(options)) as terminal:
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


def is_quiet(options: Mapping[str, Any]) -> bool:
    """As was typed, or else as is configured. Raises `ConfigError`."""
    if "quiet" in options:
        return bool(options["quiet"])
    return options["command"] not in UNCONFIGURED and not options.get("verbose") and quiet()


def load(terminal: Terminal, name: str) -> ModuleType:
    """The command's module, and torch with it where it needs that. Raises `AollmError` where a package is missing."""
    with terminal.loading():
        return import_module(f".commands.{name}", __package__)
