"""Does the benchmark cry wolf, and does it see one? The same run again and again, and as often with a planted slowdown.

python benchmarks/regressions.py [--trials 10] [--slowdown 0.15] [--model demo] [--load N]

Each is compared with one earlier run alone, which is the hardest: a longer history only steadies the comparison.
`--load N` has N other processes compute meanwhile. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from card import machine_card

PLAIN = ["-m", "aollm.bench"]
SLOWED = Path(__file__).with_name("slowed.py")
DRIVER = """
import json, sys
from aollm.bench.__main__ import main
planted, skip = json.loads(sys.argv[1])
sys.exit(main(sys.argv[2:], [sys.executable, *planted], skip))
"""
NOISE = "import torch\na = torch.randn(512, 512)\nwhile True:\n    a = torch.tanh(a @ a)"


def bench(arguments: Sequence[str], skip: Sequence[str], history: Path, record: bool, slowdown: float | None) -> dict[str, Any]:
    """The result of one run against the history in `history`."""
    own = ["--history-dir", str(history), "--history-codebase-label", "regressions", *([] if record else ["--no-record-history"])]
    planted = PLAIN if slowdown is None else [str(SLOWED), str(slowdown)]
    command = [sys.executable, "-c", DRIVER, json.dumps([planted, skip]), *arguments, *own]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many other processes that compute."""
    busy = [subprocess.Popen([sys.executable, "-c", NOISE], env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def told(kind: str, number: int, result: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What a comparison said, as a line on stderr and for the result."""
    comparison = result["comparison"]
    changes = {subject["subject"]: [subject["first_change"], subject["second_change"]] for subject in comparison["subjects"]}
    shown = ", ".join(f"{name} {first:+.1%}{'' if again is None else f' ({again:+.1%})'}" for name, (first, again) in changes.items())
    states = [lane["state"] for lane in result["lanes"].values()]
    print(f"  {number:>2} {kind:<7} {comparison['verdict']:<14} {shown}  [{seconds:.0f} s, {states.count('measured')}/{len(states)} lanes, "
          f"load {os.getloadavg()[0]:.1f}]", file=sys.stderr, flush=True)  # fmt: skip
    return {
        "kind": kind, "verdict": comparison["verdict"], "changes": changes, "seconds": seconds, "load_average": os.getloadavg()[0],
        "lanes": dict(zip(result["lanes"], states, strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--slowdown", type=float, default=0.15)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load", type=int, default=0)
    parser.add_argument("--skip", default="", metavar="LANE,LANE", help="lanes to leave out, to save time")
    given = parser.parse_args()
    skip = given.skip.split(",")
    arguments, comparisons = ["--model-reference", given.model, "--quiet"], []
    with TemporaryDirectory() as folder, load(given.load):
        for number in range(1, given.trials + 1):
            history = Path(folder, f"{number}")
            bench(arguments, skip, history, True, None)
            for kind, slowdown in (("slowed", given.slowdown), ("same", None)):
                start = perf_counter()
                result = bench(arguments, skip, history, False, slowdown)
                comparisons.append(told(kind, number, result, perf_counter() - start))
    same = [each["verdict"] for each in comparisons if each["kind"] == "same"]
    slowed = [each["verdict"] for each in comparisons if each["kind"] == "slowed"]
    quiet, found = sum(verdict == "no regression" for verdict in same), sum(verdict == "regression" for verdict in slowed)
    print(f"the same run twice: no regression in {quiet} of {len(same)}", file=sys.stderr)
    print(f"a planted slowdown of {given.slowdown:.0%}: found in {found} of {len(slowed)}", file=sys.stderr)
    print(json.dumps({"bench": "regressions", **vars(given), "quiet": quiet, "found": found, "of": given.trials,
                      "comparisons": comparisons, "machine": machine_card()}))  # fmt: skip


if __name__ == "__main__":
    main()
