"""`aollm doctor`: whether this machine is ready, how fast it is, and what to do about what is not as it should be."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..checkup.check import Check, State
from ..checkup.packages import check_extras, check_packages, required
from ..terminal import Terminal, spinner

if TYPE_CHECKING:
    from ..settings import RuntimeConfig

STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "problem": "red", "unknown": "dim"}
NAME, WIDEST = 15, 100
"""Columns of a check's name, and of all of a line."""


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the checks; the exit code is 1 when one of them is a problem."""
    load = os.getloadavg()[0]  # before anything of this is counted
    report = Report(terminal, "json" in options)
    requirements = required()
    report.add(check_packages(requirements))
    report.add(check_extras(requirements))
    if any(each["installed"] is None for each in report.checks[0].figures.values()):
        report.add(Check("machine", "unknown", "not looked at: packages come first"))
    else:
        _examine(terminal, options, load, report)
    return report.end()


class Report:
    """Checks, printed as they come, or all at the end as JSON."""

    def __init__(self, terminal: Terminal, as_json: bool) -> None:
        self.checks: list[Check] = []
        self._terminal, self._as_json = terminal, as_json

    def add(self, check: Check) -> None:
        """One more."""
        self.checks.append(check)
        if not self._as_json:
            self._print(check)

    def end(self) -> int:
        """Print what there is to say of all; the exit code."""
        counts: dict[str, int] = {state: sum(check.state == state for check in self.checks) for state in STYLES}
        if self._as_json:
            found = {"aollm": __version__, **counts, "checks": [check.as_dict() for check in self.checks]}
            self._terminal.text(json.dumps(found) + "\n")
        else:
            told = [f"{counts[state]} {word}{'' if counts[state] == 1 else 's'}" for state, word in COUNTED if counts[state]]
            self._terminal.line()
            self._terminal.line([(", ".join(told) or "nothing is wrong", "bold")])
        return int(counts["problem"] > 0)

    def _print(self, check: Check) -> None:
        room = max(min(self._terminal.width, WIDEST) - NAME - 12, 30)
        for number, line in enumerate(_lines(check.found, room)):
            start = (
                [(f"{check.state:<9}", STYLES[check.state]), (f"{check.name:<{NAME}}", "bold")] if not number else [(" " * (9 + NAME), "")]
            )
            self._terminal.line([*start, (line, "")])
        for number, line in enumerate(_lines(check.advice or "", room - 2)):
            self._terminal.line([(" " * (9 + NAME), ""), ("  " if number else "→ ", STYLES[check.state]), (line, STYLES[check.state])])


COUNTED: tuple[tuple[State, str], ...] = (("problem", "problem"), ("warning", "warning"), ("unknown", "check without an answer"))


def _examine(terminal: Terminal, options: Mapping[str, Any], load: float, report: Report) -> None:
    with terminal.loading():
        import anyio

        from ..checkup.examination import examine, settled

    check, config = settled(options.get("cache_dir"), options.get("models_dir"))
    report.add(check)
    doing = "looking"

    def tell(text: str) -> None:
        nonlocal doing
        doing = text

    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), (doing, "dim")]])

    async def all_of_them(config: RuntimeConfig, add: Callable[[Check], object]) -> None:
        async for check in examine(config.cache_dir, config.models_dir, load, tell):
            add(check)

    anyio.run(all_of_them, config, report.add)
    terminal.status(None)


def _lines(text: str, width: int) -> Sequence[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)
