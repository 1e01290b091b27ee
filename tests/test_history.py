"""The benchmark's history and what is concluded from it: nothing is lost, nothing is believed that is damaged, noise is no regression."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import exp, inf, nan
from pathlib import Path
from random import Random
from typing import Any

import pytest

from aollm.bench.codebase import normalized, origin
from aollm.bench.comparison import SUBJECTS, judge, together, values_of
from aollm.bench.history import LOG, SCHEMA, Entry, load, record
from aollm.errors import StoreError

KEY = {"model": "demo", "profile": "quick"}
DECODE, PREFILL = SUBJECTS[:2]
LANES = DECODE.parts


def value(seconds: float = 0.005, yardstick_s: float = 0.001, drive: float | None = None, kind: str = "operations") -> dict[str, Any]:
    return {"seconds": seconds, "count": 100, "yardstick": kind, "yardstick_seconds": yardstick_s, "drive_bytes_per_second": drive}


def run(factor: float = 1.0, **fields: Any) -> dict[str, dict[str, Any]]:
    return {name: value(0.005 * factor, **fields) for name in LANES}


def entry(values: dict[str, dict[str, Any]]) -> Entry:
    return Entry("a", "2026-01-01T00:00:00+00:00", KEY, values)


def heard(folder: Path) -> tuple[list[Entry], list[str]]:
    said: list[str] = []
    return load(folder, said.append), said


def test_what_is_recorded_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "history"
    assert heard(folder) == ([], [])
    made = [record(folder, {**KEY, "number": number}, run(1 + number), {"bench": "profile", "number": number}) for number in range(3)]
    assert heard(folder) == (made, [])
    assert len({each.digest for each in made}) == 3
    payload = json.loads((folder / f"{made[1].id}.json").read_text())
    assert (payload["number"], payload["id"], payload["schema"]) == (1, made[1].id, SCHEMA)
    assert sorted(os.listdir(folder)) == sorted([LOG, *(f"{each.id}.json" for each in made)])


def test_a_log_cut_anywhere_keeps_the_lines_before(tmp_path: Path) -> None:
    made = [record(tmp_path, KEY, run(), {}) for _ in range(2)]
    whole = (tmp_path / LOG).read_bytes()
    first = whole.index(b"\n") + 1
    for end in (*range(first, len(whole) - 1, 97), len(whole) - 2):
        (tmp_path / LOG).write_bytes(whole[:end])
        entries, said = heard(tmp_path)
        assert entries == made[:1]
        assert len(said) == (end > first) and all("cut short" in each and f"{LOG}:2" in each for each in said)
    added = record(tmp_path, KEY, run(), {})
    entries, said = heard(tmp_path)
    assert entries == [made[0], added] and len(said) == 1 and "damaged" in said[0]


INCOMPARABLE: list[dict[str, Any]] = [
    *(value() | {name: wrong} for name in ("seconds", "yardstick_seconds") for wrong in (0, -1.0, "1", None, True, nan, inf)),
    *(value() | {"drive_bytes_per_second": wrong} for wrong in (0, -1.0, "1", nan)),
    *({name: each for name, each in value().items() if name != missing} for missing in value() if missing != "count"),
    value() | {"yardstick": None},
]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (json.dumps({"schema": SCHEMA + 1, "runs": {"of": "another shape"}}), "newer version"),
        ("{}", "damaged"),
        ("[1]", "damaged"),
        ("\udcff\udcfe", "damaged"),
        (json.dumps({"schema": "1"}), "damaged"),
        (json.dumps({"schema": 1, "id": "a", "time": "b", "key": [], "values": {}}), "damaged"),
        *((json.dumps({"schema": 1, "id": "a", "time": "b", "key": KEY, "values": {LANES[0]: each}}), "damaged") for each in INCOMPARABLE),
    ],
)
def test_a_line_of_others_is_left_alone(line: str, said: str, tmp_path: Path) -> None:
    made = record(tmp_path, KEY, run(), {})
    strange = line.encode(errors="surrogateescape") + b"\n"
    with open(tmp_path / LOG, "ab") as file:
        file.write(strange)
    later = record(tmp_path, KEY, run(), {})
    entries, told = heard(tmp_path)
    assert judge(DECODE, run(), entries) is not None
    assert entries == [made, later] and len(told) == 1 and said in told[0] and f"{LOG}:2" in told[0]
    assert strange in (tmp_path / LOG).read_bytes()


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """The system refuses to write more, after it has written so much: what a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [10, 4000], ids=["no room for the payload", "room for the payload, not for the line"])
def test_what_does_not_fit_leaves_nothing_behind(room: int, tmp_path: Path) -> None:
    made = [record(tmp_path, KEY, run(), {}) for _ in range(5)]
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert len(before[LOG]) > 4000 - 600  # the next line would be cut in the middle
    with pytest.raises(StoreError, match="cannot be written: File too large"), files_of_at_most(room):
        while True:
            record(tmp_path, KEY, run(), {})
            before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before
    assert heard(tmp_path)[0][:5] == made and heard(tmp_path)[1] == []


def test_a_folder_that_cannot_be_made_or_read_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        record(tmp_path / "file" / "history", KEY, run(), {})
    (tmp_path / LOG).mkdir()
    with pytest.raises(StoreError, match="Is a directory"):
        load(tmp_path, print)


def test_processes_that_record_at_once_all_do(tmp_path: Path) -> None:
    program = (
        "import json, sys; from pathlib import Path; from aollm.bench.history import record\n"
        "for n in range(20): record(Path(sys.argv[1]), {'n': n}, {'warm': {**json.loads(sys.argv[2]), 'pad': 'x' * 3000}}, {})"
    )
    running = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path), json.dumps(value())]) for _ in range(4)]
    assert [each.wait(30) for each in running] == [0] * 4
    entries, said = heard(tmp_path)
    assert len({each.id for each in entries}) == 80 and said == []


def test_lanes_values_are_quiet_times_and_their_yardstick() -> None:
    measured = {"quiet": 0.004, "count": 90, "p50": 0.007}
    told = {"kind": "operations", "seconds": 0.001, "count": 36, "drive_bytes_per_second": None}
    lanes: dict[str, Any] = {
        "warm": {"values": {"decode": measured, "first-token": {**measured, "steady": False}}, "yardstick": told},
        "cold": {"values": {"cold": measured}, "yardstick": {**told, "seconds": None}},
        "overlap": {"fraction_of_bound": 0.9},
    }
    assert values_of(lanes) == {"warm/decode": {**value(0.004), "count": 90}}


@pytest.mark.parametrize(
    ("now", "change"),
    [
        (run(1.15), 0.15),
        (run(0.8), -0.2),
        (run(3.0, yardstick_s=0.003), 0.0),  # the machine is three times slower
        (run(1.0, yardstick_s=0.0005), 1.0),  # the machine is twice as fast, and the passes are not
        ({"warm/decode": value(0.006)}, 0.2),  # other lanes were not measured
        ({**run(), "warm/decode": value(0.005 * 1.2**4)}, 0.2),  # a mean of lanes
        (run(1.5, kind="products"), None),  # nothing to hold it against
        ({"warm/first-token": value()}, None),
    ],
)
def test_a_change_is_against_the_yardstick(now: dict[str, dict[str, Any]], change: float | None) -> None:
    found = judge(DECODE, now, [entry(run())])
    assert (found and found.change) == (change if change is None else pytest.approx(change))


def test_a_slower_drive_explains_slower_passes() -> None:
    earlier = [entry(run(1.0, drive=2e9))]
    slower, same = judge(DECODE, run(2.0, drive=1e9), earlier), judge(DECODE, run(1.0, drive=1e9), earlier)
    assert slower is not None and same is not None
    assert slower.change == same.change == pytest.approx(0)


def test_the_median_of_the_newest_runs_counts() -> None:
    earlier = [entry(run(factor)) for factor in (9.0, 9.0, 1.0, 1.0, 5.0, 1.0, 0.2)]
    found = judge(DECODE, run(1.15), earlier)
    assert found is not None and found.change == pytest.approx(0.15)


def test_what_wanders_is_not_told_from() -> None:
    steady, wandering = [1.0, 1.01, 0.99, 1.0, 1.0], [1.0, 1.2, 0.85, 1.1, 0.9]
    for factors, slower in ((steady, True), (wandering, False)):
        found = judge(DECODE, run(1.15), [entry(run(factor)) for factor in factors])
        assert found is not None and found.slower is slower, factors
    few = judge(DECODE, run(1.15), [entry(run(factor)) for factor in wandering[:3]])
    assert few is not None and few.threshold == DECODE.threshold


def test_two_measurements_are_one() -> None:
    merged = together(run(1.0), {"warm/decode": value(0.02, 0.005), "output-scaling/decode": value(0.02, 0.003), "plan/plan": value()})
    assert merged["warm/decode"] == value(0.02, 0.005) and merged["output-scaling/decode"] == value()  # the quieter one
    assert merged["plan/plan"] == value() and merged["session-growth/decode"] == value()


def test_noise_is_no_regression_and_a_slowdown_is_one() -> None:
    """With 3 % of noise in each process, about what was measured beside ten busy ones, and one earlier run to compare with."""
    random = Random(1)

    def noisy(factor: float) -> dict[str, dict[str, Any]]:
        return {name: value(0.005 * factor * exp(random.gauss(0, 0.03))) for name in LANES}

    def verdict(factor: float) -> bool:
        earlier = [entry(noisy(1.0))]
        first = judge(DECODE, noisy(factor), earlier)
        again = {name: each for name, each in noisy(factor).items() if name.split("/")[0] in DECODE.again}
        second = judge(DECODE, again, earlier)
        return first is not None and second is not None and first.slower and second.slower

    alarms, found = (sum(verdict(factor) for _ in range(400)) for factor in (1.0, 1.15))
    assert alarms < 4
    assert found > 360


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("git@github.com:org/name.git", "github.com/org/name"),
        ("https://GitHub.com/org/name", "github.com/org/name"),
        ("https://user:secret@github.com/org/name.git/", "github.com/org/name"),
        ("ssh://git@github.com:22/org/name", "github.com/org/name"),
        ("/somewhere/on/disk/name.git", "name"),
        ("file:///somewhere/name", "name"),
        ("", None),
    ],
)
def test_an_origin_has_one_name(url: str, name: str | None) -> None:
    assert normalized(url) == name


def test_the_origin_is_git_s(tmp_path: Path) -> None:
    assert origin(tmp_path) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    assert origin(tmp_path) is None
    subprocess.run(["git", "-C", str(tmp_path), "remote", "add", "origin", "git@example.org:a/b.git"], check=True)
    assert origin(tmp_path) == "example.org/a/b"
