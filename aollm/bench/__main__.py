"""`python -m aollm.bench`: a whole run, one lane of it, or a measurement by name.

Cards and progress go to stderr; the last line of stdout is one JSON object. Exit code 2 is bad use, 1 a measurement that
failed, 3 a regression under `--fail-on-regression`, 130 an interruption.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import AollmError, ConfigError
from .arguments import parser
from .signals import INTERRUPTED, abrupt, heard, held

BROKEN_PIPE = 128 + signal.SIGPIPE
PROBED = "probe_"
REQUESTED = ("prompt", "max_new_tokens", "iterations", "seconds")


def main(arguments: Sequence[str] | None = None, program: Sequence[str] | None = None, skip: Collection[str] = ()) -> int:
    """Run the measurement that `arguments` name; its exit code. `program` runs the lanes in place of this one, but those in `skip`."""
    given = parser().parse_args(arguments)
    try:
        if given.command == "plot":
            return _plot(given)
        if given.command == "overlap":
            return _overlap(vars(given))
        options = {name: value for name, value in vars(given).items() if name not in ("command", "probe_runtime")}
        return _probe(options) if given.probe_runtime else _campaign(options, program, skip)
    except AollmError as error:
        print(f"aollm.bench: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read has gone; nothing is left to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE


def _campaign(options: dict[str, Any], program: Sequence[str] | None, skip: Collection[str]) -> int:
    if stray := [name for name in options if name.startswith(PROBED)]:
        raise ConfigError(f"--{stray[0].replace('_', '-')} is for one lane alone: give --probe-runtime too")
    import anyio

    from ..reference import find
    from ..settings import BenchmarkConfig, RuntimeConfig
    from ..terminal import Terminal
    from .campaign import Campaign, Target
    from .lane import PROGRAM

    benchmark = BenchmarkConfig.of({name: value for name, value in options.items() if name in BenchmarkConfig.model_fields})
    runtime = {name: value for name, value in options.items() if name in RuntimeConfig.model_fields and name != "quiet"}
    if "model_reference" not in runtime and "model_reference" not in RuntimeConfig.said():
        runtime["model_reference"] = "demo"
    config = RuntimeConfig.of(None, runtime)
    folder = anyio.run(find, config.model_reference, config.models_dir)
    with heard(), Terminal(options.get("quiet", False)) as terminal:
        return Campaign(benchmark, Target(folder, config, runtime), terminal, program or PROGRAM, skip).run()


def _probe(options: dict[str, Any]) -> int:
    """One lane; interrupted, it prints what it has, so that nothing measured is lost."""
    with abrupt():
        import anyio

        from ..settings import BenchmarkConfig, RuntimeConfig
        from .output import tell, writable
        from .probe import Probe, Work
        from .report import card
        from .tinies import make

    probed = {name.removeprefix(PROBED): value for name, value in options.items() if name.startswith(PROBED)}
    mode, tiny = probed.pop("mode", "warm"), probed.pop("tiny", None)
    merged = {**options, **probed}
    merged.setdefault("model_reference", "demo")
    benchmark = BenchmarkConfig.of({name: value for name, value in merged.items() if name in BenchmarkConfig.model_fields})
    if benchmark.output is not None:
        writable(benchmark.output)
    with heard(), TemporaryDirectory(prefix="aollm-") as folder:
        if tiny is not None:
            merged["model_reference"] = str(make(tiny, Path(folder, f"tiny-{tiny}")))
        runtime = {name: value for name, value in merged.items() if name in RuntimeConfig.model_fields and name != "quiet"}
        scales = {name: getattr(benchmark, name) for name in Work.__dataclass_fields__ if name in BenchmarkConfig.model_fields}
        own = {name: merged[name] for name in REQUESTED if name in merged and name not in scales}
        probe = Probe(Work(mode, RuntimeConfig.of(None, runtime), **{**scales, **own}))
        code = 0
        try:
            anyio.run(probe.run)
        except KeyboardInterrupt:
            code = INTERRUPTED
    with held():
        result = probe.result()
        print(card(mode, result), file=sys.stderr)
        tell(result, benchmark.output)
    return code


def _overlap(options: dict[str, Any]) -> int:
    """How reading overlaps computing; interrupted, it prints the rounds that it has."""
    from .output import tell, writable

    output, lanes = options["output"], options["lanes"]
    for option, path in (("output", output), ("lanes", lanes)):
        if path is not None:
            writable(path, option)
    with abrupt():
        from .plot import draw, require_matplotlib

        if lanes is not None:
            require_matplotlib()
        import anyio

        from ..settings import RuntimeConfig
        from .card import card
        from .overlap import WORK, Overlap, Work

    settings = {name: value for name, value in options.items() if name in RuntimeConfig.model_fields and name != "quiet"}
    work = Work(options["model"], settings=settings, **{name: options[name] for name in WORK})
    measurement = Overlap(work, lambda text: print(text, file=sys.stderr, flush=True))
    code = 0
    with heard():
        try:
            anyio.run(measurement.run)
        except KeyboardInterrupt:
            code = INTERRUPTED
    if not measurement.rounds:
        return code
    with held():
        result, interval = measurement.result()
        print(card(result), file=sys.stderr)
        tell(result, output)
    if lanes is not None:
        draw(interval, lanes)
    return code


def _plot(given: argparse.Namespace) -> int:
    from .picture import picture

    picture(given.file, given.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
