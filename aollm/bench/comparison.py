"""Is this run slower than those before it? An answer that a noisy machine does not make up.

Five things keep the noise out. A value is what one pass takes when nothing disturbs it (see `spread`), not a mean. It counts if
two halves of its lane agree on it. It is held against a fixed piece of work, measured between the requests of the same process
(see `yardstick`). A subject is the mean over lanes, each of which was a process of its own. And a slowdown counts when a second
measurement finds it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from statistics import fmean, median
from typing import Any

from .history import Entry

Values = Mapping[str, Mapping[str, Any]]

BASELINES = 5
"""Earlier runs, the newest, whose median is compared with."""
ENOUGH = 4
"""Earlier runs that say how far a subject wanders."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is judged: the values whose names are in `parts`, or begin with one that ends in `-`. A slowdown by less than
    `threshold` is not told; `again` are the lanes that measure it a second time."""

    name: str
    parts: tuple[str, ...]
    threshold: float
    again: tuple[str, ...]

    def names(self, values: Values) -> list[str]:
        """The names of its values among `values`."""
        return [name for name in values if any(name == part or (part.endswith("-") and name.startswith(part)) for part in self.parts)]


SUBJECTS = (
    Subject(
        "decode", ("warm/decode", "output-scaling/decode", "session-growth/decode", "reopen-session-growth/decode"), 0.10,
        ("warm", "output-scaling", "session-growth"),
    ),
    Subject("prefill", ("prompt-scaling/prefill-", "warm/first-token"), 0.15, ("prompt-scaling", "warm")),
    Subject("planning", ("plan/plan-cpu", "plan-unspecialized/plan-cpu"), 0.30, ("plan", "plan-unspecialized")),
    Subject("cold start", ("cold/cold-cpu",), 0.40, ("cold",)),
)  # fmt: skip
"""Planning waits for threads all the time and a cold start happens once: of both it is processor time that is judged, the time
that passes on a busy machine says nothing."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A subject's `change` against earlier runs (0.1: takes 10 % longer), and how much of that is not told."""

    subject: Subject
    change: float
    threshold: float
    by_value: dict[str, float]

    @property
    def slower(self) -> bool:
        """Whether it takes longer by more than the threshold."""
        return self.change > self.threshold

    @property
    def faster(self) -> bool:
        """Whether the earlier runs took longer than it by more than the threshold."""
        return self.change < 1 / (1 + self.threshold) - 1


def values_of(lanes: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The values to compare of lanes' results: quiet seconds, and those of the yardstick meanwhile. What was not steady, because
    the machine was too busy, is no value."""
    values: dict[str, dict[str, Any]] = {}
    for lane, result in lanes.items():
        yardstick = result.get("yardstick") or {}
        for name, measured in result.get("values", {}).items():
            if yardstick.get("seconds") and measured.get("steady") is not False:
                values[f"{lane}/{name}"] = {
                    "seconds": measured["quiet"], "count": measured["count"], "yardstick": yardstick["kind"],
                    "yardstick_seconds": yardstick["seconds"], "drive_bytes_per_second": yardstick["drive_bytes_per_second"],
                }  # fmt: skip
    return values


def judge(subject: Subject, values: Values, earlier: Sequence[Entry]) -> Judgement | None:
    """How `values` differ from the median of the newest of `earlier`; None where they have nothing in common."""
    recent = [entry.values for entry in earlier[-BASELINES:]]
    by_value: dict[str, float] = {}
    for name in subject.names(values):
        changes = [found for each in recent if name in each and (found := _change(values[name], each[name])) is not None]
        if changes:
            by_value[name] = median(changes)
    if not by_value:
        return None
    return Judgement(subject, exp(fmean(by_value.values())) - 1, _threshold(subject, recent), {k: exp(v) - 1 for k, v in by_value.items()})


def together(first: Values, second: Values) -> dict[str, dict[str, Any]]:
    """Two measurements of the same run as one: of what both have, the quieter, since disturbances only ever add time."""
    merged = {name: dict(value) for name, value in {**second, **first}.items()}
    for name in first.keys() & second.keys():
        merged[name] = dict(min(first[name], second[name], key=lambda value: value["seconds"] / value["yardstick_seconds"]))
    return merged


def _change(now: Mapping[str, Any], then: Mapping[str, Any]) -> float | None:
    """The logarithm of how much longer it takes now, against the yardstick; where the drive was measured both times, against
    whichever of the two explains more."""
    if now["yardstick"] != then["yardstick"]:
        return None
    longer = log(now["seconds"] / then["seconds"])
    against = [longer - log(now["yardstick_seconds"] / then["yardstick_seconds"])]
    if now["drive_bytes_per_second"] and then["drive_bytes_per_second"]:
        against.append(longer + log(now["drive_bytes_per_second"] / then["drive_bytes_per_second"]))
    return min(against, key=abs)


def _threshold(subject: Subject, recent: Sequence[Values]) -> float:
    """The subject's own, or three times what earlier runs wander, where that is more and there are enough of them."""
    levels = [
        fmean(log(each[name]["seconds"] / each[name]["yardstick_seconds"]) for name in names)
        for each in recent
        if len(names := sorted(set.intersection(*(set(subject.names(one)) for one in recent)))) > 0
    ]
    if len(levels) < ENOUGH:
        return subject.threshold
    middle = median(levels)
    wander = 1.4826 * median(abs(level - middle) for level in levels)
    return max(subject.threshold, exp(3 * wander) - 1)
