"""What may be typed behind `python -m aollm.bench`. Settings are passed on as they are: `settings` says what is accepted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

MODES = ("cold", "warm", "prompt-scaling", "output-scaling", "session-growth", "reopen-session-growth", "plan")
DESCRIPTION = """\
Measure a model on this machine: cold and warm requests, how they scale with prompts, answers and conversations, planning,
and how well reading overlaps computing. Each lane runs in a process of its own. What people read is on stderr; the last
line of stdout is one JSON object. Runs are kept in .aollm/benchmark-history and compared with earlier ones of their kind.

Exit codes: 0, 1 nothing could be measured or written, 2 bad use, 3 a regression under --fail-on-regression, 130 Ctrl-C.
"""


def parser() -> argparse.ArgumentParser:
    """The parser; nothing is filled in for settings that are not given."""
    made = argparse.ArgumentParser(
        "python -m aollm.bench", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND")
    _overlap(commands)
    plot = commands.add_parser("plot", help="draw a pass, the curves of a run, or a history, as a PNG")
    plot.add_argument(
        "file", type=Path, metavar="FILE", help="a trace, a result of overlap or of a run of the benchmark, or a history (its folder)"
    )
    plot.add_argument("--output", type=Path, required=True, metavar="FILE.png")
    for action in (_run(made), _runtime(made), _history(made), _probe(made)):
        for each in action._group_actions:
            each.default = argparse.SUPPRESS
    made.set_defaults(probe_runtime=False)
    return made


def _run(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = made.add_argument_group("run")
    group.add_argument("--profile", metavar="NAME", help="quick (default): one model, a minute; full: families and KV strategies too")
    group.add_argument("--model-reference", "--model", metavar="MODEL", help="a folder, an alias, or org/repo[@rev] (default: demo)")
    group.add_argument("--iterations", type=int, metavar="N", help="requests of each kind, at least (default 3); more while time lasts")
    group.add_argument("--prompt-scale-tokens", metavar="N,N,...", help="lengths of prompts (default 32,128,512)")
    group.add_argument("--output-scale-tokens", metavar="N,N,...", help="lengths of answers (default 16,64,128)")
    group.add_argument("--session-turns", type=int, metavar="N", help="turns of a conversation (default 3)")
    group.add_argument("--session-max-new-tokens", type=int, metavar="N", help="tokens of each answer in it (default 32)")
    group.add_argument("--output", metavar="FILE", help="also write the JSON object here")
    group.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    return group


def _runtime(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = made.add_argument_group("runtime")
    group.add_argument("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--memory", metavar="SIZE", help="limit for a whole process, such as 3GiB (default: what is free)")
    group.add_argument("--models-dir", metavar="FOLDER", help="where models of the Hub are; the full profile measures those in it too")
    group.add_argument("--kv-cache-strategy", metavar="NAME", help="where keys and values are kept (default: auto)")
    group.add_argument("--kv-cache-window-tokens", type=int, metavar="N", help="tokens kept by sliding-window-ring-buffer")
    group.add_argument("--strategy-selector-profile", metavar="NAME", help="how kv-cache-strategy auto chooses")
    group.add_argument("--kv-cache-lifecycle", metavar="WHICH", help="runtime-scoped or persistent")
    group.add_argument("--offload-cpu-layers", type=int, metavar="N", help="keep just N layers in memory (default: all that fit)")
    group.add_argument("--offload-cpu-policy", metavar="WHICH", help="auto, prefix, suffix or middle-band")
    return group


def _history(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = made.add_argument_group("history")
    group.add_argument("--history-dir", metavar="FOLDER", help="where runs are kept (default: .aollm/benchmark-history)")
    group.add_argument("--no-record-history", dest="record_history", action="store_false", help="compare this run, and do not keep it")
    group.add_argument("--history-codebase-label", metavar="TEXT", help="compare with runs of this label (default: git's origin)")
    group.add_argument("--fail-on-regression", action="store_true", help="exit with 3 when the run is slower than earlier ones")
    return group


def _probe(made: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = made.add_argument_group("one lane alone, in this process")
    group.add_argument("--probe-runtime", action="store_true", help="measure one lane, which --probe-mode names")
    group.add_argument("--probe-mode", choices=MODES, metavar="MODE", help=f"one of {', '.join(MODES)} (default: warm)")
    group.add_argument("--probe-backend", metavar="NAME", help="auto, optimized-native or transformers-generic")
    group.add_argument("--probe-kv-cache-strategy", metavar="NAME")
    group.add_argument("--probe-kv-cache-window-tokens", type=int, metavar="N")
    group.add_argument("--probe-strategy-selector-profile", metavar="NAME")
    group.add_argument("--probe-offload-cpu-layers", type=int, metavar="N")
    group.add_argument("--probe-offload-cpu-policy", metavar="WHICH")
    group.add_argument("--probe-offload-gpu-layers", type=int, metavar="N")
    group.add_argument("--probe-prompt", metavar="TEXT", help="what is gone on from (default: Once upon a time)")
    group.add_argument("--probe-max-new-tokens", type=count, metavar="N", help="tokens of a cold or warm answer (default 32)")
    group.add_argument("--probe-iterations", type=int, metavar="N", help="as --iterations")
    group.add_argument("--probe-seconds", type=float, metavar="S", help="time for requests beyond those (default 0)")
    group.add_argument("--probe-tiny", metavar="KIND", help="in place of a model: a tiny random one of this kind, made on the fly")
    return group


def _overlap(commands: Any) -> None:
    told = "how much of the drive's speed a run reaches, and how long it stalls"
    overlap = commands.add_parser("overlap", help=told, argument_default=argparse.SUPPRESS)
    overlap.add_argument("model", metavar="MODEL", help="folder of a model, or an alias such as demo")
    overlap.add_argument("--requests", type=count, default=1, metavar="N", help="requests at once (default: 1)")
    overlap.add_argument("--tokens", type=_several, default=8, metavar="T", help="new tokens of each, at least 2 (default: 8)")
    overlap.add_argument("--rounds", type=count, default=3, metavar="R", help="runs, each between two probes of the drive (default: 3)")
    overlap.add_argument("--prompt-tokens", type=count, default=32, metavar="P", help="random tokens of each prompt (default: 32)")
    overlap.add_argument("--seed", type=int, default=0, help="of the prompts (default: 0)")
    overlap.add_argument("--output", type=Path, default=None, metavar="FILE", help="also write the JSON object here")
    overlap.add_argument("--lanes", type=Path, default=None, metavar="FILE.png", help="draw the last pass")
    group = _runtime(overlap)
    group.add_argument("--backend", metavar="NAME", help="auto or optimized-native, whose passes alone can be told")
    group.add_argument("--offload-gpu-layers", type=int, metavar="N", help="keep just N layers on the device (default: all that fit)")
    group.add_argument("--disk-backend", metavar="NAME", help="auto (default), threads, uring, gds or portable")
    group.add_argument("--prefetch-depth", type=int, metavar="N", help="pieces read ahead (default: 2)")


def count(text: str, least: int = 1) -> int:
    """A whole number that is not too small, or argparse's error."""
    number = int(text) if text.isdecimal() else 0
    if number < least:
        raise argparse.ArgumentTypeError(f"a whole number from {least}, not {text!r}")
    return number


def _several(text: str) -> int:
    return count(text, 2)
