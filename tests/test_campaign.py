"""A run of the benchmark: its lanes say what they should, and whatever happens to one, what was measured is printed."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aollm.bench import pagecache
from aollm.bench.__main__ import main
from aollm.bench.arguments import MODES, parser
from aollm.bench.campaign import Campaign, Target
from aollm.bench.history import LOG, SCHEMA
from aollm.bench.lane import Lane, run
from aollm.bench.probe import Probe, Work
from aollm.bench.profiles import SHARED, lanes_of, scaled
from aollm.bench.scratch import Scratch
from aollm.bench.spread import quiet, spread, steady
from aollm.demo import MODEL
from aollm.errors import ConfigError, RequestError
from aollm.settings import BenchmarkConfig, RuntimeConfig
from aollm.terminal import Terminal

SMALL: dict[str, Any] = {
    "iterations": 1, "max_new_tokens": 5, "prompt_scale_tokens": (8, 24), "output_scale_tokens": (3, 6), "session_turns": 2,
    "session_max_new_tokens": 4,
}  # fmt: skip
FIGURES = {
    "prompt_tokens", "output_tokens", "ttft_seconds", "inter_token_seconds", "prompt_tokens_per_second", "output_tokens_per_second",
    "rss_nbytes", "rss_source", "peak_rss_nbytes", "peak_rss_source", "accelerator_memory_nbytes", "accelerator_utilization",
    "allocator_slack_nbytes", "cpu_seconds", "cpu_share", "cache_dir_size_mb", "prefix_hit_tokens", "loop_lateness_ms",
}  # fmt: skip
STATE = {"kv_cache_strategy", "cache_state", "chunked_prefill", "native_runtime_profile"}


async def probed(mode: str, tmp_path: Path, work: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """What a lane says, which left nothing in the folder of its caches; as JSON has it."""
    settings = {"memory": "4GiB", "kv_cache_strategy": "resident", "cache_dir": tmp_path, **settings}
    probe = Probe(Work(mode, RuntimeConfig.of("demo", settings), **{**SMALL, **(work or {})}))
    try:
        await probe.run()
    finally:
        assert os.listdir(tmp_path) == []
    result: dict[str, Any] = json.loads(json.dumps(probe.result()))
    return result


@pytest.mark.anyio
async def test_a_warm_lane_tells_everything(tmp_path: Path) -> None:
    result = await probed("warm", tmp_path, {"iterations": 3})
    (point,) = result["points"].values()
    assert point.keys() >= STATE and len(point["requests"]) == 3
    for request in point["requests"]:
        assert request.keys() >= FIGURES
        assert (request["prompt_tokens"], request["output_tokens"], request["passes"]) == (4, 5, 5)
        assert 0 < request["ttft_seconds"] < request["seconds"]
        assert request["prompt_tokens_per_second"] == pytest.approx(4 / request["ttft_seconds"])
        assert request["output_tokens_per_second"] == pytest.approx(5 / request["seconds"])
        assert request["cache_dir_size_mb"] is request["accelerator_memory_nbytes"] is request["accelerator_utilization"] is None
        assert request["cpu_seconds"] > 0 and 0 < request["cpu_share"] <= 1.01
        if sys.platform == "linux":
            assert 0 < request["rss_nbytes"] <= request["peak_rss_nbytes"]
    assert point["native_runtime_profile"]["events"]["compute"]["count"] % 5 == 0
    assert result["values"]["decode"]["count"] == 3 * 4 and result["values"]["first-token"]["count"] == 3
    assert 0 < result["values"]["decode"]["quiet"] <= result["values"]["decode"]["p95"]
    assert result["yardstick"]["kind"] == "operations" and result["yardstick"]["seconds"] > 0
    assert result["yardstick"]["drive_bytes_per_second"] is None
    assert result["plan"]["backend"] == "optimized-native"


@pytest.mark.anyio
async def test_scaling_lanes_have_the_lengths_that_fit(tmp_path: Path) -> None:
    result = await probed("prompt-scaling", tmp_path, {"prompt_scale_tokens": (8, 24, 999)}, max_context_tokens=512)
    assert [point["requests"][0]["prompt_tokens"] for point in result["points"].values()] == [8, 24]
    assert result["left_out"].keys() == {"999"} and result["values"].keys() == {"prefill-8", "prefill-24"}
    chunks = [point["chunked_prefill"] for point in result["points"].values()]
    assert [(each["rows"], each["passes"], each["chunks"]) for each in chunks] == [(8, 1, 1), (24, 1, 1)]
    result = await probed("output-scaling", tmp_path)
    assert [point["requests"][0]["output_tokens"] for point in result["points"].values()] == [3, 6]
    assert result["values"]["decode"]["count"] == 2 + 5


@pytest.mark.anyio
async def test_a_chunked_prefill_is_told(tmp_path: Path) -> None:
    result = await probed("prompt-scaling", tmp_path, {"prompt_scale_tokens": (100,)}, dense_projection_chunk_rows=32)
    assert result["points"]["100"]["chunked_prefill"] | {"rows_per_pass": 0, "passes": 0} == {
        "rows": 100, "rows_per_pass": 0, "passes": 0, "chunk_rows": 32, "chunks": 4,
    }  # fmt: skip


@pytest.mark.anyio
async def test_conversations_grow_in_one_runtime_and_over_several(tmp_path: Path) -> None:
    result = await probed("session-growth", tmp_path, {"session_max_new_tokens": 32})
    first, second = (point["requests"][0] for point in result["points"].values())
    assert first["prefix_hit_tokens"] == 0 < second["prefix_hit_tokens"] < second["prompt_tokens"]
    result = await probed("reopen-session-growth", tmp_path, {"session_max_new_tokens": 32})
    again = [point["requests"][0] for point in result["points"].values()]
    assert [each["prompt_tokens"] for each in again] == [first["prompt_tokens"], second["prompt_tokens"]]
    assert again[0]["prefix_hit_tokens"] == 0 < again[1]["prefix_hit_tokens"]
    assert all(each["open_seconds"] > 0 for each in again) and again[1]["cache_dir_size_mb"] > 0
    assert result["points"]["2"]["kv_cache_strategy"] == "paged"
    assert result["points"]["2"]["chunked_prefill"]["rows"] == again[1]["prompt_tokens"] - again[1]["prefix_hit_tokens"]
    assert result["points"]["2"]["cache_state"]["cache_lifecycle"] == "persistent"


@pytest.mark.anyio
async def test_planning_reads_no_weights(tmp_path: Path) -> None:
    result = await probed("plan", tmp_path)
    assert result["values"]["plan"]["count"] >= 1 and result["first_seconds"] > 0
    assert result["plan"]["specialization_state"] == "planned"  # and not applied: nothing was opened
    assert result["points"] == {}


@pytest.mark.anyio
async def test_a_cold_lane_drops_the_files_first(tmp_path: Path) -> None:
    result = await probed("cold", tmp_path)
    cache = result["page_cache"]
    assert cache["nbytes"] == sum(path.stat().st_size for path in MODEL.rglob("*") if path.is_file())
    assert cache["cold"] is (None if cache["resident_share"] is None else cache["resident_share"] <= pagecache.COLD_SHARE)
    assert cache["cold"] or cache["reason"]
    assert result["values"]["cold"]["quiet"] > result["open_seconds"]


@pytest.mark.anyio
async def test_a_lane_that_fails_in_the_middle_keeps_what_it_has(tmp_path: Path) -> None:
    config = RuntimeConfig.of("demo", {"memory": "4GiB", "kv_cache_strategy": "resident", "cache_dir": tmp_path, "max_context_tokens": 40})
    probe = Probe(Work("session-growth", config, **{**SMALL, "session_turns": 9}))
    with pytest.raises(RequestError, match="max_context_tokens"):
        await probe.run()
    result = probe.result()
    assert 1 <= len(result["points"]) < 9 and result["values"]["decode"]["count"] >= 3 and result["yardstick"]["seconds"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what it caches")
def test_pages_are_seen_and_dropped(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(os.urandom(3 << 20))
    (tmp_path / "empty").write_bytes(b"")
    assert pagecache.resident_share([tmp_path / "weights" / "a"]) == 1
    found = pagecache.drop(tmp_path)
    assert (found["files"], found["nbytes"], found["resident_share_before"]) == (2, 3 << 20, 1)
    assert found["cold"] is True and found["resident_share"] <= 0.02 and found["reason"] is None
    with open(tmp_path / "weights" / "a", "rb") as file:
        file.read(1 << 20)
    assert 0.3 <= (pagecache.resident_share([tmp_path / "weights" / "a"]) or 0) < 1


@pytest.mark.parametrize(
    ("rounds", "found"),
    [
        ([[[1.0, 2.0]]], None),
        ([[[1.0, 2.0]], [[1.0, 2.1]]], True),
        ([[[1.0, 9.0]], [[1.0, 2.1]], [[9.0, 2.0]]], True),  # what one half lacks in one round, it has in another
        ([[[1.0, 2.0]], [[1.0, 2.6]]], False),
        ([[[5.0]], [[9.0]], [[6.0]], [[7.0]]], False),
    ],
)
def test_steady_is_what_two_halves_agree_on(rounds: list[list[list[float]]], found: bool | None) -> None:
    assert steady(rounds) is found


def test_quiet_is_the_low_end_of_each_part() -> None:
    disturbed = [[1.0, 9.0], [9.0, 2.0]] * 20
    assert quiet(disturbed) == 3.0
    assert quiet([*disturbed, [0.1, 0.1, 0.1]]) == 3.0  # cut otherwise: does not count
    assert spread(disturbed) == {"count": 40, "quiet": 3.0, "p50": 10.5, "p95": 11.0, "max": 11.0}


SAY = "import json, sys, time, signal\nprint('chatter')\n"
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', file=sys.stderr)\n"


@pytest.mark.parametrize(
    ("program", "limit_s", "state", "reason", "result"),
    [
        ("print(json.dumps({'a': 1}))", 30, "measured", None, {"a": 1}),
        ("print('aollm.bench: no such model', file=sys.stderr); sys.exit(1)", 30, "unavailable", "no such model", None),
        ("print(json.dumps({'a': 1})); sys.exit(1)", 30, "unavailable", "its process ended with 1 and printed no result", None),
        ("print('[1]')", 30, "unavailable", "its process ended with 0 and printed no result", None),
        ("import os; os.kill(os.getpid(), 9)", 30, "unavailable", "ended by SIGKILL; was memory short?", None),
        ("time.sleep(60)", 0.7, "unavailable", "ran over its 1 s", None),
        (
            "try: time.sleep(60)\nexcept KeyboardInterrupt: print(json.dumps({'values': {'warm': 1}}))",
            0.7, "partial", "ran over its 1 s", {"values": {"warm": 1}},
        ),
        (
            "try: time.sleep(60)\nexcept KeyboardInterrupt: print(json.dumps({'bench': 'overlap', 'by_round': [1]}))",
            0.7, "partial", "ran over its 1 s", {"bench": "overlap", "by_round": [1]},
        ),
    ],
)  # fmt: skip
def test_a_lane_comes_to_something(program: str, limit_s: float, state: str, reason: str | None, result: dict[str, Any] | None) -> None:
    found = run(Lane("a", (SAY + program,), limit_s), [sys.executable, "-c"])
    assert (found.state, found.result, found.interrupted) == (state, result, False)
    assert found.reason == reason or (reason is not None and found.reason is not None and reason in found.reason)


def test_a_lane_that_hears_nothing_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aollm.bench.lane.GRACE_S", 0.2)
    found = run(Lane("a", (f"{SAY}{DEAF}time.sleep(60)",), 1.0), [sys.executable, "-c"])
    assert found.state == "unavailable" and found.seconds < 20
    assert run(Lane("a", (), 1), ["/no/such/program"]).reason == "no process can be started: No such file or directory"


def test_every_lane_can_be_typed() -> None:
    for profile, least in (("quick", 9), ("full", 20)):
        benchmark = scaled(BenchmarkConfig.of({"profile": profile}))
        typed = {
            "models_dir": "models",
            "memory": 1 << 30,
            "kv_cache_strategy": "sliding-window-ring-buffer",
            "kv_cache_window_tokens": 64,
            "device": "cpu",
        }
        lanes = lanes_of(benchmark, RuntimeConfig.of("demo", typed), typed)
        assert len({lane.name for lane in lanes}) == len(lanes) >= least
        for lane in lanes:
            given = vars(parser().parse_args(lane.arguments))
            assert given["command"] == "overlap" or given["probe_runtime"]
            assert given.get("models_dir") == (None if "--probe-tiny" in lane.arguments else "models")
            if lane.name == "warm":
                assert (given["probe_kv_cache_strategy"], given["probe_kv_cache_window_tokens"]) == ("sliding-window-ring-buffer", 64)
                assert (given["memory"], given["device"], given["model_reference"]) == (str(1 << 30), "cpu", "demo")


TYPED: dict[str, Any] = {
    "device": "cuda:0", "memory": 1 << 30, "models_dir": "/models", "backend": "optimized-native", "kv_cache_lifecycle": "persistent",
    "kv_cache_strategy": "sliding-window-ring-buffer", "kv_cache_window_tokens": 64, "strategy_selector_profile": "capacity",
    "offload_cpu_layers": 2, "offload_cpu_policy": "suffix", "offload_gpu_layers": 3,
}  # fmt: skip


def test_every_lane_of_the_target_runs_it_as_it_was_typed() -> None:
    config = RuntimeConfig.of("demo", TYPED)
    assert TYPED.keys() == SHARED.keys() and all(getattr(config, name) != getattr(RuntimeConfig.of("demo", {}), name) for name in TYPED)
    for lane in lanes_of(BenchmarkConfig.of({}), config, TYPED):
        given = vars(parser().parse_args(lane.arguments))
        probed = {name.removeprefix("probe_"): value for name, value in given.items()}
        if lane.name != "plan-unspecialized":
            assert RuntimeConfig.of("demo", {name: probed[name] for name in TYPED}) == config, lane.name


@pytest.mark.parametrize(("configured", "typed", "kept"), [({}, {}, "0"), (TYPED, {}, None), (TYPED, TYPED, "2")])
def test_overlap_streams_unless_it_is_said_what_stays(configured: dict[str, Any], typed: dict[str, Any], kept: str | None) -> None:
    lanes = {lane.name: lane.arguments for lane in lanes_of(BenchmarkConfig.of({}), RuntimeConfig.of("demo", configured), typed)}
    said = dict(zip(lanes["overlap"][2::2], lanes["overlap"][3::2], strict=True))
    assert said.get("--offload-cpu-layers") == kept


STUB = """
import json, sys, pathlib
state = json.loads(pathlib.Path(sys.argv[1]).read_text())
arguments = sys.argv[2:]
mode = arguments[arguments.index("--probe-mode") + 1] if "--probe-mode" in arguments else arguments[0]
if mode in state["broken"] and "--probe-tiny" not in arguments:
    sys.exit("aollm.bench: broken")
names = {"prompt-scaling": ["prefill-32"], "warm": ["decode", "first-token"], "plan": ["plan-cpu"], "cold": ["cold-cpu"]}
pace = state["pace"].pop(0) if mode == "warm" and len(state["pace"]) > 1 else state["pace"][0]
pathlib.Path(sys.argv[1]).write_text(json.dumps(state))
seconds = {name: {"quiet": pace, "count": 9, "p50": pace, "steady": mode not in state["unsteady"]} for name in names.get(mode, ["decode"])}
yardstick = {"kind": "operations", "seconds": 0.001, "count": 9, "drive_bytes_per_second": None}
plan = {"backend": "optimized-native", "device": "cpu", "kv_cache_strategy": "resident"}
print(json.dumps({"values": seconds, "yardstick": yardstick, "points": {}, "plan": plan, "first_seconds": 1}
      | ({"bench": "overlap", "fraction_of_bound": 1, "limiter": "disk", "stall_share": 0, "tokens_per_second": 1, "requests": 1}
         if mode == "overlap" else {"page_cache": None})))
"""


class House:
    """A history and lanes that say at once what they are told to; `pace` is their seconds, the next one with each warm lane."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, folder / "state.json"
        (folder / "stub.py").write_text(STUB)
        self.program = [sys.executable, "-IS", str(folder / "stub.py"), str(self.state)]

    def run(self, *arguments: str, pace: tuple[float, ...] = (0.005,), broken: tuple[str, ...] = (), unsteady: tuple[str, ...] = ()) -> int:
        self.state.write_text(json.dumps({"pace": pace, "broken": broken, "unsteady": unsteady}))
        return main(["--history-dir", str(self.folder / "history"), *arguments], self.program)

    @property
    def kept(self) -> int:
        log = self.folder / "history" / LOG
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The object that stdout holds, which is its only line, and stderr."""
    said = capsys.readouterr()
    assert said.out.count("\n") == 1
    return json.loads(said.out), said.err


def test_a_run_is_compared_kept_and_told(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.run() == 0
    result, told = shown(capsys)
    assert result["comparison"]["verdict"] == "not compared" and "no earlier run" in told
    assert {lane["state"] for lane in result["lanes"].values()} == {"measured"} and len(result["lanes"]) == 9
    assert [sorted(turn) for turn in result["measured_again"]] == [["output-scaling", "session-growth", "warm"]]  # others lean on it
    assert result["recorded"] is not None and house.kept == 1
    assert str(Path.home()) not in json.dumps(result) and os.uname().nodename not in json.dumps(result["key"])
    assert house.run("--no-record-history", "--fail-on-regression") == 0
    result, told = shown(capsys)
    assert result["comparison"]["verdict"] == "no regression" and result["recorded"] is None and house.kept == 1
    assert [subject["change"] for subject in result["comparison"]["subjects"]] == pytest.approx([0, 0, 0, 0])
    assert "against 1 earlier run: no regression" in told


@pytest.mark.parametrize(
    ("pace", "arguments", "verdict", "code"),
    [
        ((0.006,), [], "regression", 0),
        ((0.006,), ["--fail-on-regression"], "regression", 3),
        ((0.009, 0.005), ["--fail-on-regression"], "no regression", 0),  # not found again
        ((0.0051,), ["--fail-on-regression"], "no regression", 0),
        ((0.004,), ["--fail-on-regression"], "no regression", 0),
        ((0.006,), ["--fail-on-regression", "--session-turns", "5"], "not compared", 0),  # another kind of run
        ((0.006,), ["--fail-on-regression", "--history-codebase-label", "other"], "not compared", 0),
        ((0.006,), ["--fail-on-regression", "--memory", "2GiB"], "not compared", 0),
        ((0.006,), ["--fail-on-regression", "--models-dir", "elsewhere"], "regression", 3),  # changes nothing that is measured
    ],
)
def test_a_slowdown_counts_when_it_is_found_again(
    pace: tuple[float, ...], arguments: list[str], verdict: str, code: int, house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.run()
    shown(capsys)
    assert house.run(*arguments, pace=pace) == code
    result, _ = shown(capsys)
    assert result["comparison"]["verdict"] == verdict
    assert bool(result["measured_again"]) is (pace[0] > 0.0055)


SET_APART: dict[str, Any] = {
    "use_specialization": False, "device_memory": "1GiB", "max_context_tokens": 100, "max_concurrent_requests": 3, "use_cache": False,
    "strategy_selector_profile": "capacity", "kv_cache_adaptation_mode": "disabled", "kv_cache_lifecycle": "persistent",
    "kv_cache_window_tokens": 64, "kv_cache_memory": "9MiB", "expert_memory": "9MiB", "multimodal": False, "adapter_dir": "/a/lora",
    "kv_cache_max_bytes": "9MiB", "kv_cache_max_age_s": 9.0, "disk_backend": "portable", "prefetch_depth": 9,
    "dense_projection_chunk_rows": 33, "offload_cpu_layers": 1, "offload_cpu_policy": "prefix", "offload_gpu_layers": 1,
    "memory": "1GiB", "kv_cache_strategy": "chunked", "backend": "transformers-generic", "device": "cpu",
}  # fmt: skip
ALIKE: dict[str, Any] = {
    "models_dir": "elsewhere", "cache_dir": "elsewhere", "force_download": True, "verbose": True, "quiet": True, "model_reference": "demo",
}  # fmt: skip
BESIDE: dict[str, dict[str, Any]] = {
    "offload_cpu_policy": {"offload_cpu_layers": 1},
    "kv_cache_window_tokens": {"kv_cache_strategy": "sliding-window-ring-buffer", "kv_cache_window_tokens": 65},
    "kv_cache_max_bytes": {"kv_cache_lifecycle": "persistent"},
    "kv_cache_max_age_s": {"kv_cache_lifecycle": "persistent"},
}


def key_of(settings: dict[str, Any]) -> dict[str, Any]:
    config = RuntimeConfig.of("demo", settings)
    return Campaign(BenchmarkConfig.of({}), Target(MODEL, config, {}), Terminal(quiet=True)).key


@pytest.mark.parametrize("name", RuntimeConfig.model_fields)
def test_every_setting_that_is_measured_sets_runs_apart(name: str) -> None:
    beside = BESIDE.get(name, {})
    key = key_of({**beside, name: (SET_APART | ALIKE)[name]})
    assert (key != key_of(beside)) is (name in SET_APART)
    assert "/a" not in json.dumps(key)


def test_lanes_can_be_left_out() -> None:
    target = Target(MODEL, RuntimeConfig.of("demo", {}), {})
    every, some = (Campaign(BenchmarkConfig.of({}), target, Terminal(quiet=True), skip=skip).lanes for skip in ((), ("plan", "cold", "no")))
    assert [lane for lane in every if lane.name not in ("plan", "cold")] == some and len(some) == len(every) - 2


def test_what_a_busy_machine_hides_is_measured_again(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.run()
    shown(capsys)
    everything = tuple(name for name in MODES if name not in ("plan", "cold"))
    assert house.run("--fail-on-regression", unsteady=everything) == 0
    result, told = shown(capsys)
    assert "too busy a machine to compare decode" in told and not {"warm/decode", "prompt-scaling/prefill-32"} & result["values"].keys()
    assert sorted(result["measured_again"][0]) == ["output-scaling", "prompt-scaling", "session-growth", "warm"]
    assert house.run(unsteady=MODES) == 0
    comparison = shown(capsys)[0]["comparison"]
    assert comparison["verdict"] == "not compared" and "too busy" in comparison["reason"]


def test_what_fails_is_unavailable_and_the_rest_is_there(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.run(broken=("warm", "overlap")) == 0
    result, told = shown(capsys)
    states = {name: (lane["state"], lane["reason"]) for name, lane in result["lanes"].items()}
    assert states["warm"] == states["overlap"] == ("unavailable", "broken") and states["cold"] == ("measured", None)
    assert "unavailable: broken" in told and "warm/decode" not in result["values"]
    assert house.run(broken=MODES) == 1  # nothing of the target is measured
    result, _ = shown(capsys)
    measured = [name for name, lane in result["lanes"].items() if lane["state"] == "measured"]
    assert measured == ["plan-unspecialized", "overlap"] and result["recorded"] is None and house.kept == 1


@pytest.mark.parametrize(
    ("arguments", "pace", "verdict", "expected"),
    [
        ([], 0.005, "no regression", 0),
        (["--fail-on-regression"], 0.005, "no regression", 1),
        (["--fail-on-regression", "--no-record-history"], 0.005, "no regression", 0),
        (["--fail-on-regression"], 0.006, "regression", 3),
    ],
)
def test_a_full_disk_or_a_strange_history_loses_nothing(
    arguments: list[str], pace: float, verdict: str, expected: int, house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    house.run()
    shown(capsys)
    log = house.folder / "history" / LOG
    whole = log.read_bytes()
    newer = json.dumps({"schema": SCHEMA + 1}).encode()
    log.write_bytes(whole + newer + b"\n" + whole[: len(whole) // 2])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code = house.run(*arguments, pace=(pace,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    result, told = shown(capsys)
    assert (code, result["comparison"]["verdict"], result["recorded"]) == (expected, verdict, None)
    assert "newer version" in told and "cut short" in told
    assert ("the run is not kept" in told and "File too large" in told) is ("--no-record-history" not in arguments)
    assert log.read_bytes() == whole + newer + b"\n" + whole[: len(whole) // 2]
    assert sorted(os.listdir(log.parent)) == sorted([LOG, *(path.name for path in log.parent.glob("2*.json"))])


@pytest.mark.parametrize(("arguments", "expected"), [([], 0), (["--fail-on-regression"], 1)])
def test_a_log_that_cannot_be_read_is_told(arguments: list[str], expected: int, house: House, capsys: pytest.CaptureFixture[str]) -> None:
    (house.folder / "history" / LOG).mkdir(parents=True)
    assert house.run("--no-record-history", *arguments) == expected
    result, told = shown(capsys)
    assert result["comparison"]["verdict"] == "not compared" and "cannot be read: Is a directory" in result["comparison"]["reason"]
    assert f"{LOG} cannot be read" in told and {lane["state"] for lane in result["lanes"].values()} == {"measured"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "no/such/folder/a.json"], "output"),
        (["--device", "cuda:99"], "device: there is no cuda:99"),
        (["--history-dir", __file__], "it is not a folder"),
        (["--history-dir", f"{__file__}/deeper", "--no-record-history"], "it is not a folder"),
        (["--history-dir", "/proc/history"], "cannot be used"),
        (["--output", "/"], "output"),
        (["--profile", "medium"], "profile"),
        (["--iterations", "0"], "iterations"),
        (["--prompt-scale-tokens", "32,many"], "prompt_scale_tokens"),
        (["--kv-cache-strategy", "pagd"], "kv_cache_strategy"),
        (["--device", "tpu"], "device"),
        (["--probe-mode", "warm"], "--probe-runtime"),
        (["--probe-runtime", "--probe-tiny", "nothing"], "probe-tiny"),
        (["--probe-runtime", "--output", "no/such/folder/a.json"], "output: "),
        (["--probe-runtime", "--output", "/"], "output: "),
    ],
)
def test_bad_use_is_told_before_anything_is_measured(
    arguments: list[str], said: str, house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    assert house.run(*arguments) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and said in told.err and house.kept == 0


def test_an_output_that_fills_the_disk_is_told_and_stdout_has_it(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.run("--output", "/dev/full") == 1
    result, told = shown(capsys)
    assert "/dev/full cannot be written: No space left on device" in told and result["recorded"] is not None
    assert house.run("--output", str(house.folder / "a.json")) == 0
    printed = capsys.readouterr().out
    assert (house.folder / "a.json").read_text() == printed


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model-reference", "no-such-model"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_interrupted_run_prints_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aollm.bench", "--iterations", "1", "--history-dir", str(tmp_path / "h")]
    sent = (signal.SIGINT, signal.SIGTERM)
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in sent]
    for process, each in zip(running, sent, strict=True):
        assert process.stderr is not None
        first = process.stderr.readline()
        time.sleep(1.0)  # into the second lane, whichever state it is in
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
        process.send_signal(each)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and first.strip().startswith("plan ") and len(children) == 1
        result = json.loads(out)
        assert result["interrupted"] is True and result["lanes"]["plan"]["state"] == "measured"
        assert "interrupted" in err and not (tmp_path / "h").exists()
        assert not Path(f"/proc/{children[0]}").exists()


ENDED = {
    "overlap": ["overlap", "demo", "--rounds", "1000", "--tokens", "3"],
    "probe": ["--probe-runtime", "--probe-mode", "warm", "--probe-iterations", "1000"],
}


def test_a_lane_that_is_ended_prints_what_it_has_and_leaves_no_folder(tmp_path: Path) -> None:
    cases = [("overlap", signal.SIGINT), ("probe", signal.SIGTERM), ("probe", signal.SIGKILL)]
    roots = [tmp_path / f"{number}" for number in range(len(cases))]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "aollm.bench", *ENDED[kind]],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "AOLLM_RUNTIME__CACHE_DIR": str(root)},
        )
        for (kind, _), root in zip(cases, roots, strict=True)
    ]  # fmt: skip
    for process, (kind, sent), root in zip(running, cases, roots, strict=True):
        assert process.stderr is not None
        if kind == "overlap":
            assert any(line.startswith("round 1 of 1000") for line in process.stderr)
        while not list(root.glob("bench-*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sent)
        out, _ = process.communicate(timeout=60)
        if sent is signal.SIGKILL:
            assert process.returncode == -sent and len(os.listdir(root)) == 1
            with Scratch(root) as path:
                assert os.listdir(root) == [path.name]
        else:
            result = json.loads(out)
            assert process.returncode == 130 and result["bench"] == kind
        assert os.listdir(root) == []
        if kind == "overlap":
            assert result["interrupted"] is True and result["rounds"] == 1000
            assert 1 <= len(result["by_round"]) == len(result["drive_probes"]) - 1 < 1000


def test_only_folders_that_nobody_uses_are_swept(tmp_path: Path) -> None:
    dead, others = tmp_path / f"bench-{'0' * 16}", [tmp_path / name for name in ("bench-results", "bench-0123", "kv_cache_paged")]
    for folder in (dead, *others):
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
    (tmp_path / f"bench-{'1' * 16}").symlink_to(others[0])
    with Scratch(tmp_path) as first, Scratch(tmp_path) as second:
        assert first != second and first.is_dir() and second.is_dir() and not dead.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*(path.name for path in others), f"bench-{'1' * 16}"])
    assert all((folder / "file").exists() for folder in others)


def test_a_probe_by_hand_answers_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--probe-runtime", "--probe-mode", "warm", "--probe-tiny", "llama", "--probe-iterations", "1", "--probe-max-new-tokens", "3"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["plan"]["family"], result["plan"]["backend"]) == ("llama", "optimized-native")
    work = ["--probe-runtime", "--probe-mode", "plan", "--probe-tiny", "t5", "--probe-iterations", "1"]
    assert main([*work, "--output", "/dev/full"]) == 1
    told = capsys.readouterr()
    assert "/dev/full cannot be written: No space left on device" in told.err
    result = json.loads(told.out)  # all the same
    assert (result["plan"]["family"], result["plan"]["backend"]) == ("t5", "transformers-generic")
    assert "t5" in result["plan"]["specialization_reason"]


def test_a_campaign_shows_what_it_has_so_far(tmp_path: Path) -> None:
    benchmark = BenchmarkConfig.of({"history_dir": str(tmp_path), "output": str(tmp_path / "a.json")})
    campaign = Campaign(benchmark, Target(MODEL, RuntimeConfig.of("demo", {}), {}), Terminal(quiet=True))
    assert campaign.result["lanes"] == {} and campaign.result["comparison"]["verdict"] == "not compared"
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        Campaign(BenchmarkConfig.of({"output": str(tmp_path / "b")}), Target(MODEL, RuntimeConfig.of("demo", {}), {}), Terminal(quiet=True))
