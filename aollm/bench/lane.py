"""A lane: one measurement in a process of its own, which has only so much time.

Whatever becomes of the process, the benchmark goes on: a lane has been measured, or in part, or is unavailable for a reason.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

PROGRAM = (sys.executable, "-m", "aollm.bench")
GRACE_S = 5.0
"""For a process to say what it has measured, when it is told to end."""


@dataclass(frozen=True, slots=True)
class Lane:
    """`arguments` of the program, which prints one JSON object as its last line, within `limit_s` seconds."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a lane. `state`: `measured`, `partial` when it was cut short, or `unavailable`; then `reason` says why."""

    state: str
    reason: str | None
    seconds: float
    result: dict[str, Any] | None
    interrupted: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The outcome as JSON has it."""
        return {"state": self.state, "reason": self.reason, "seconds": self.seconds, "result": self.result}


def run(lane: Lane, program: Sequence[str] = PROGRAM) -> Outcome:
    """Run a lane to its end. Ctrl-C ends its process, by its id, and is told in the outcome."""
    start, cut = perf_counter(), None
    try:
        process = subprocess.Popen(
            [*program, *lane.arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
    except OSError as error:
        return Outcome("unavailable", f"no process can be started: {error.strerror}", 0.0, None)
    try:
        output, errors = process.communicate(timeout=lane.limit_s)
    except subprocess.TimeoutExpired:
        cut = f"it ran over its {lane.limit_s:.0f} s"
        output, errors = _end(process)
    except KeyboardInterrupt:
        cut = "interrupted"
        output, errors = _end(process)
    result, seconds = _last_object(output), perf_counter() - start
    if cut is not None:
        measured = result is not None and any(result.get(name) for name in ("values", "points", "by_round"))
        return Outcome("partial" if measured else "unavailable", cut, seconds, result if measured else None, cut == "interrupted")
    if process.returncode == 0 and result is not None:
        return Outcome("measured", None, seconds, result)
    return Outcome("unavailable", _why(process.returncode, errors), seconds, None)


def _end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Interrupt the process, and kill it when it does not end soon; what it printed."""
    try:
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        process.kill()
        return process.communicate()


def _last_object(output: str) -> dict[str, Any] | None:
    try:
        found = json.loads((output.splitlines() or [""])[-1])
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _why(code: int, errors: str) -> str:
    """The last line of what the process said, or how it ended."""
    said = [line for line in errors.splitlines() if line.strip()]
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}" + ("; was memory short?" if code == -signal.SIGKILL else "")
    if said:
        return said[-1].removeprefix("aollm.bench: ")
    return f"its process ended with {code} and printed no result"
