"""`python -m aollm.bench`: measurements by name. Cards and progress go to stderr; the last line of stdout is one JSON object.

Exit code 2 is bad use, 1 a measurement that failed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import AollmError, ConfigError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurement that `arguments` name; its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.command is None:
        parser.print_help()
        return 0
    try:
        return _plot(given) if given.command == "plot" else _overlap(given)
    except AollmError as error:
        print(f"aollm.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m aollm.bench", description="Measure a runtime against what its machine can do.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    overlap = commands.add_parser("overlap", help="how much of the drive's speed a run reaches, and how long it stalls")
    overlap.add_argument("model", metavar="MODEL", help="folder of a model, or an alias such as demo")
    overlap.add_argument("--memory", help="limit on the whole process, such as 3GiB (default: what is free)")
    overlap.add_argument("--requests", type=_count, default=1, metavar="N", help="requests at once (default: 1)")
    overlap.add_argument("--tokens", type=_several, default=8, metavar="T", help="new tokens of each, at least 2 (default: 8)")
    overlap.add_argument("--rounds", type=_count, default=3, metavar="R", help="runs, each between two probes of the drive (default: 3)")
    overlap.add_argument("--prompt-tokens", type=_count, default=32, metavar="P", help="random tokens of each prompt (default: 32)")
    overlap.add_argument("--disk-backend", choices=("auto", "threads", "uring", "portable"), default="auto")
    overlap.add_argument("--prefetch-depth", type=_count, default=2, help="pieces read ahead (default: 2)")
    overlap.add_argument("--offload-cpu-layers", type=int, metavar="K", help="keep just K layers in memory (default: as many as fit)")
    overlap.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    overlap.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON object here")
    overlap.add_argument("--lanes", type=Path, metavar="FILE.png", help="draw the last pass")
    plot = commands.add_parser("plot", help="draw reads, computations and stalls of a pass")
    plot.add_argument("file", type=Path, metavar="FILE", help="a trace (of which the last pass is drawn) or a result of overlap")
    plot.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    return parser


def _overlap(given: argparse.Namespace) -> int:
    for path in filter(None, (given.output, given.lanes)):
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent} is not a folder, so {path.name} cannot be written there")
    from .plot import draw, require_matplotlib

    if given.lanes is not None:
        require_matplotlib()
    import anyio

    from .card import card
    from .overlap import Work, overlap

    fields = {name: getattr(given, name) for name in Work.__dataclass_fields__}
    result, interval = anyio.run(overlap, Work(**fields), lambda text: print(text, file=sys.stderr, flush=True))
    print(card(result), file=sys.stderr)
    if given.lanes is not None:
        draw(interval, given.lanes)
    line = json.dumps(result)
    if given.output is not None:
        given.output.write_text(line + "\n")
    print(line)
    return 0


def _plot(given: argparse.Namespace) -> int:
    from .interval import load
    from .plot import draw

    draw(load(given.file), given.output)
    return 0


def _count(text: str, least: int = 1) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least}, not {text!r}")
    return number


def _several(text: str) -> int:
    return _count(text, 2)


if __name__ == "__main__":
    sys.exit(main())
