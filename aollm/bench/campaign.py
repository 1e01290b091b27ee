"""A whole run of the benchmark: its lanes one after the other, what they say together, and how it compares with earlier runs.

Nothing that was measured is lost: a lane that fails leaves the others, and so do Ctrl-C, a full disk and a broken history.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from time import perf_counter
from typing import Any

from ..device import choose_device
from ..errors import StoreError
from ..settings import BenchmarkConfig, RuntimeConfig
from ..terminal import Terminal, spinner
from .codebase import origin
from .comparison import SUBJECTS, Judgement, Subject, judge, together, values_of
from .history import SCHEMA, Entry, digest, load, record, usable
from .lane import PROGRAM, Lane, Outcome, run
from .machine import host_digest, machine_card
from .output import writable, write
from .profiles import lanes_of, scaled
from .report import compared, summary, told
from .signals import held

FAILURE, REGRESSION, INTERRUPTED = 1, 3, 130
OTHERS = ("plan-unspecialized", "family-", "model-", "overlap")
"""How lanes begin that do not make a run: they are not about the target, or nothing of them is compared."""
CONTROLS = ("prompt_scale_tokens", "output_scale_tokens", "session_turns", "session_max_new_tokens")
APART = {"model_reference", "models_dir", "cache_dir", "force_download", "verbose", "quiet"}
"""The runtime's settings that do not set runs apart, since they change nothing that is measured."""
KEYED = {"device", "backend", "kv_cache_strategy"}
"""Those whose outcome is in the key."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: the model's folder and settings, and those of them that were given."""

    folder: Path
    config: RuntimeConfig
    given: Mapping[str, Any]


class Campaign:
    """Call `run`; `result` holds what is measured so far."""

    def __init__(
        self, benchmark: BenchmarkConfig, target: Target, terminal: Terminal, program: Sequence[str] = PROGRAM, skip: Collection[str] = ()
    ) -> None:
        """`program` runs a lane's arguments; lanes whose names are in `skip` are left out. Raises `ConfigError` when there is no such
        device, and when the output or the history cannot be written."""
        self._benchmark, self._target, self._terminal, self._program = scaled(benchmark), target, terminal, program
        self.lanes = [lane for lane in lanes_of(self._benchmark, target.config, target.given) if lane.name not in skip]
        self.outcomes: dict[str, Outcome] = {}
        self._again: list[dict[str, Outcome]] = []
        self._codebase, self._host = benchmark.history_codebase_label or origin(Path.cwd()), host_digest()
        self._comparison: dict[str, Any] = _nothing("the run was not finished")
        self._recorded: str | None = None
        self._interrupted = self._forgetful = False
        self._start, self._began = perf_counter(), datetime.now(UTC)
        if benchmark.output is not None:
            writable(benchmark.output)
        usable(benchmark.history_dir, benchmark.record_history)
        choose_device(target.config.device)

    def run(self) -> int:
        """Measure, compare, keep and print; the exit code."""
        try:
            self._measure()
            if not self._interrupted and self._measured:
                self._compare()
        except KeyboardInterrupt:
            self._interrupted = True
        self._terminal.status(None)
        with held():
            return self._finish()

    @property
    def result(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        benchmark = self._benchmark
        return {
            "bench": "profile", "schema": SCHEMA, "profile": benchmark.profile, "model": Path(self._target.config.model_reference).name,
            "began": self._began.isoformat(timespec="seconds"), "seconds": perf_counter() - self._start, "interrupted": self._interrupted,
            "settings": benchmark.model_dump(mode="json", include={*CONTROLS, "iterations", "fail_on_regression"}), "key": self.key,
            "lanes": {name: outcome.as_dict() for name, outcome in self.outcomes.items()},
            "measured_again": [{name: outcome.as_dict() for name, outcome in turn.items()} for turn in self._again],
            "values": self._values, "comparison": self._comparison, "recorded": self._recorded, "machine": machine_card(),
        }  # fmt: skip

    @property
    def key(self) -> dict[str, Any]:
        """What has to be the same for two runs to be comparable."""
        config, benchmark = self._target.config, self._benchmark
        plans = [result["plan"] for result in self._measured.values() if "backend" in result.get("plan", {})]
        plan = plans[0] if plans else config.model_dump()
        return {
            "model": Path(config.model_reference).name, "model_digest": _model_digest(self._target.folder), "device": plan["device"],
            "backend": plan["backend"], "host": self._host, "strategy": plan["kv_cache_strategy"], "profile": benchmark.profile,
            "controls": benchmark.model_dump(mode="json", include=set(CONTROLS)),
            "placement": _placement(config), "codebase": self._codebase,
        }  # fmt: skip

    @property
    def _measured(self) -> dict[str, dict[str, Any]]:
        """What lanes of the target came to."""
        results = {name: outcome.result for name, outcome in self.outcomes.items() if not name.startswith(OTHERS)}
        return {name: result for name, result in results.items() if result is not None}

    @property
    def _values(self) -> dict[str, dict[str, Any]]:
        """What can be compared, of the lanes and of those that were measured again."""
        return reduce(together, map(_values_of, (self.outcomes, *self._again)))

    def _measure(self) -> None:
        for number, lane in enumerate(self.lanes, 1):
            self.outcomes[lane.name] = outcome = self._run(lane, f"{number} of {len(self.lanes)}")
            self._terminal.say([(told(lane.name, outcome), "" if outcome.state == "measured" else "yellow")])
            if outcome.interrupted:
                self._interrupted = True
                return

    def _run(self, lane: Lane, which: str) -> Outcome:
        self._terminal.status(lambda: [[(f"{spinner()} ", "cyan"), (f"{lane.name}, {which}", "dim")]])
        return run(lane, self._program)

    def _compare(self) -> None:
        """Judge against earlier runs; what seems slower is measured again before it is said."""
        try:
            earlier = [entry for entry in load(self._benchmark.history_dir, self._warn) if entry.digest == digest(self.key)]
        except StoreError as error:
            self._warn(str(error))
            self._comparison, self._forgetful = _nothing(str(error)), True
            return
        if not earlier:
            if self._benchmark.record_history:
                self._measure_again(SUBJECTS[:1], "again: later runs are compared with this one")
            self._comparison = _nothing("no earlier run of this kind is in the history")
            return
        values = self._values
        lost = [subject for subject in SUBJECTS if not subject.names(values) and any(subject.names(entry.values) for entry in earlier)]
        if lost:
            self._measure_again(lost, "again: the machine was too busy")
            values = self._values
        first = {subject.name: found for subject in SUBJECTS if (found := judge(subject, values, earlier)) is not None}
        if not first:
            self._comparison = _nothing("the machine was too busy to measure anything that can be compared")
            return
        second: dict[str, Judgement | None] = {}
        if suspects := [judgement.subject for judgement in first.values() if judgement.slower]:
            found_again = _values_of(self._measure_again(suspects, "again: it seems slower than in earlier runs"))
            second = {subject.name: judge(subject, found_again, earlier) for subject in suspects}
        subjects = [_judged(found, second.get(name), _both(found.subject, self._values, earlier)) for name, found in first.items()]
        verdicts = [subject["verdict"] for subject in subjects]
        self._comparison = {
            "reason": None,
            "verdict": "regression" if "regression" in verdicts else "unconfirmed" if "unconfirmed" in verdicts else "no regression",
            "earlier_runs": len(earlier), "newest": earlier[-1].time, "subjects": subjects,
        }  # fmt: skip

    def _measure_again(self, subjects: Sequence[Subject], why: str) -> dict[str, Outcome]:
        wanted = {name for subject in subjects for name in subject.again}
        turn: dict[str, Outcome] = {}
        self._again.append(turn)
        for lane in self.lanes:
            if lane.name in wanted:
                turn[lane.name] = self._run(lane, why)
                if turn[lane.name].interrupted:
                    raise KeyboardInterrupt
        return turn

    def _finish(self) -> int:
        """Keep the run, print it, and say what it comes to."""
        benchmark = self._benchmark
        if benchmark.record_history and not self._interrupted and self._measured and self._values:
            try:
                self._recorded = record(benchmark.history_dir, self.key, self._values, self.result).id
            except StoreError as error:
                self._terminal.error(f"the run is not kept: {error}")
                self._forgetful = True
        result = self.result
        for row in (*summary(result), *compared(self._comparison)):
            self._terminal.say(row)
        line = json.dumps(result) + "\n"
        code = self._written(line)
        self._terminal.text(line)
        if self._interrupted:
            return INTERRUPTED
        if code or not self._measured:
            return FAILURE
        if not benchmark.fail_on_regression:
            return 0
        return REGRESSION if self._comparison["verdict"] == "regression" else FAILURE if self._forgetful else 0

    def _written(self, line: str) -> int:
        if (output := self._benchmark.output) is None:
            return 0
        try:
            write(output, line)
        except StoreError as error:
            self._terminal.error(str(error))
            return FAILURE
        return 0

    def _warn(self, message: str) -> None:
        self._terminal.say([(f"aollm.bench: {message}", "yellow")])


def _values_of(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    return values_of({name: outcome.result for name, outcome in outcomes.items() if outcome.state == "measured" and outcome.result})


def _nothing(reason: str) -> dict[str, Any]:
    """A comparison that there is not."""
    return {"verdict": "not compared", "reason": reason, "earlier_runs": 0, "newest": None, "subjects": []}


def _judged(first: Judgement, second: Judgement | None, both: Judgement) -> dict[str, Any]:
    """What is said of a subject. A slowdown has to be seen twice; a second measurement that failed confirms nothing."""
    if first.slower:
        verdict = "unconfirmed" if second is None else "regression" if second.slower else "no regression"
    else:
        verdict = "faster" if first.faster else "no regression"
    return {
        "subject": first.subject.name, "verdict": verdict, "change": both.change, "threshold": first.threshold,
        "first_change": first.change, "second_change": None if second is None else second.change, "by_value": both.by_value,
    }  # fmt: skip


def _both(subject: Subject, values: Mapping[str, Mapping[str, Any]], earlier: Sequence[Entry]) -> Judgement:
    found = judge(subject, values, earlier)
    assert found is not None  # it has more values than before
    return found


def _placement(config: RuntimeConfig) -> dict[str, Any]:
    """The other settings that are not as they are by default, as JSON has them, and folders by their names alone."""
    names = RuntimeConfig.model_fields.keys() - APART - KEYED
    changed = {name: value for name in names if (value := getattr(config, name)) != RuntimeConfig.model_fields[name].default}
    told: dict[str, Any] = json.loads(json.dumps(changed, default=lambda folder: folder.name, sort_keys=True))
    return told


def _model_digest(folder: Path) -> str:
    """Of the configuration, and of the names and sizes of the weights' files: another model of the same name is another one."""
    try:
        described = (folder / "config.json").read_text(errors="replace")
        files = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    except OSError:
        return ""
    return digest({"config": described, "files": files})
