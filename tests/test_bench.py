"""The benchmark: its figures come from events as they should, its command line answers in JSON, its pictures are pictures."""

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

from aollm.bench.__main__ import main
from aollm.bench.card import card
from aollm.bench.curves import points_of
from aollm.bench.drive import Drive
from aollm.bench.figures import lateness_ms
from aollm.bench.history import LOG, record
from aollm.bench.interval import interval_of, load
from aollm.bench.overlap import Work
from aollm.bench.passes import passes_of
from aollm.bench.plot import title
from aollm.bench.probe import Probe
from aollm.bench.probe import Work as Probed
from aollm.bench.yardstick import Yardstick
from aollm.demo import MODEL
from aollm.disk.memory import MemoryDisk
from aollm.settings import RuntimeConfig
from aollm.trace import Event, Trace

PNG = b"\x89PNG\r\n\x1a\n"
LAYERS = 6
WORK = ["demo", "--requests", "3", "--tokens", "6", "--rounds", "2", "--prompt-tokens", "16", "--offload-cpu-layers", "0"]


def two_passes() -> list[Event]:
    """Two passes of 4 s over one kept piece and one streamed piece, which is read ahead once too often."""
    events = [
        Event("safetensor_pread", 0.5, 0.9, 0, nbytes=70, label="kept"),
        Event("safetensor_pread", 1.0, 2.0, 1, nbytes=100, label="a"),
    ]
    for start in (2.0, 6.0):
        events += [
            Event("stall", start, start + 0.5, label="embedding"),
            Event("compute", start + 0.5, start + 1.5, 0, rows=3, label="kept"),
            Event("stall", start + 1.5, start + 2, label="load"),
            Event("compute", start + 2, start + 3.5, 1, rows=3, label="a"),
            Event("safetensor_pread", start + 1, start + 4, 1, nbytes=100, path="safetensor-io", label="a"),
        ]
    return events


def test_passes_are_told_from_events() -> None:
    first, second = passes_of(two_passes(), end=10.0)
    assert (first.start, first.end, first.seconds, first.rows) == (2.0, 6.0, 4.0, 3)
    assert (first.compute_s, first.stall_s, first.nbytes) == (2.5, 1.0, 170)  # the kept piece was read once, before
    assert (second.end, second.compute_s, second.stall_s, second.nbytes) == (10.0, 2.5, 1.0, 100)


def test_a_pass_without_a_next_one_ends_with_its_last_computation() -> None:
    assert passes_of(two_passes())[-1].end == 9.5
    assert passes_of([]) == []


def test_an_interval_clips_what_reaches_out_of_it() -> None:
    interval = interval_of(two_passes(), 4.0, 5.5)
    assert interval.reads == ((0.0, 1.5, 50),)
    assert interval.compute == ((0.0, 1.5, 0),)
    assert interval.bytes_per_second == pytest.approx(50 / 1.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of a small run on the bundled model, none of whose layers is kept, and the folder of its files."""
    folder = tmp_path_factory.mktemp("bench")
    assert main(["overlap", *WORK, "--output", str(folder / "result.json"), "--lanes", str(folder / "lanes.png")]) == 0
    return json.loads((folder / "result.json").read_text()), folder


def test_overlap_reports_every_figure(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    for name in (
        "seconds_per_pass", "drive_bytes_per_second", "disk_seconds_per_pass", "compute_seconds_per_pass", "bound_seconds_per_pass",
        "tokens_per_second", "first_token_seconds", "first_token_bound_seconds", "memory_nbytes",
    ):  # fmt: skip
        assert result[name] > 0, name
    assert (result["bench"], result["model"], result["requests"], result["rounds"]) == ("overlap", "demo", 3, 2)
    assert result["limiter"] in ("disk", "compute")
    assert len(result["by_round"]) == 2 and len(result["drive_probes"]) == 3
    late = result["loop_lateness_ms"]
    assert 0 <= late["p50"] <= late["p99"] <= late["max"] and late["beats"] > 0
    if sys.platform == "linux":
        assert result["peak_rss_nbytes"] > 0 and 0 <= result["io_cpu_share"] <= 6
    assert {"cpu", "cores", "memory_nbytes", "python", "torch"} <= result["machine"].keys()
    assert str(Path.home()) not in json.dumps(result)


def test_overlap_counts_what_is_streamed(measured: tuple[dict[str, Any], Path]) -> None:
    result, _ = measured
    assert result["bytes_per_pass"] == result["plan"]["streamed_nbytes_per_pass"] == result["plan"]["weights_nbytes"]
    assert result["plan"]["pinned_nbytes"] == 0
    assert 3 * 2 <= result["tokens_made"] <= 3 * 2 * 6
    assert 1 <= result["decode_passes"] <= 2 * 5
    assert all(rows <= 3 for each in result["by_round"] for rows in each["pass_rows"])


def test_overlap_shares_add_up(measured: tuple[dict[str, Any], Path]) -> None:
    for each in measured[0]["by_round"]:
        assert 0 < each["fraction_of_bound"] < 1.5
        assert 0 <= each["stall_share"] <= 1 and -0.05 <= each["other_share"] <= 1
        assert each["bound_seconds_per_pass"] == max(each["disk_seconds_per_pass"], each["compute_seconds_per_pass"])


@pytest.mark.parametrize(
    ("late_s", "found", "told"),
    [
        ([], None, "event loop late  not told"),
        ([0.003, 0.001, 0.002], {"p50": 2, "p99": 3, "max": 3, "beats": 3}, "median 2.00 ms, 99 % within 3.00 ms, at most 3.00 ms"),
    ],
)
def test_lateness_is_of_beats_that_came(
    late_s: list[float], found: dict[str, float] | None, told: str, measured: tuple[dict[str, Any], Path]
) -> None:
    late = lateness_ms(late_s)
    assert late == (found if found is None else pytest.approx(found))
    assert told in card(measured[0] | {"loop_lateness_ms": late})


def test_overlap_finds_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = tmp_path / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(MODEL)
    (tmp_path / "models--org--model" / "refs").mkdir()
    (tmp_path / "models--org--model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", "/nonexistent")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    work = ["overlap", "org/model", "--tokens", "3", "--rounds", "1", "--output", "/dev/full"]
    assert main([*work, "--models-dir", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    result = json.loads(shown.out)  # which is printed though no file has it
    assert (result["model"], result["decode_passes"]) == ("model", 2) and str(tmp_path) not in shown.out
    assert shown.err.endswith("/dev/full cannot be written: No space left on device; the result is on stdout\n")
    monkeypatch.setenv("AOLLM_RUNTIME__MODELS_DIR", str(tmp_path))
    assert Work("org/model").config.models_dir == tmp_path  # what is not given is as configured


class SlowToClose(MemoryDisk):
    """A disk that waits before it closes."""

    async def aclose(self) -> None:
        await anyio.sleep(0.001)
        await super().aclose()


async def test_a_disk_is_closed_by_whoever_is_cancelled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disks: list[SlowToClose] = []

    def opened(*_: object) -> tuple[SlowToClose, str]:
        disks.append(SlowToClose({}))
        return disks[-1], "as asked"

    monkeypatch.setattr("aollm.bench.drive.open_disk", opened)
    monkeypatch.setattr("aollm.bench.probe.open_disk", opened)
    config = RuntimeConfig.of("demo", {"cache_dir": tmp_path})
    probe = Probe(Probed("plan", config))
    for cancelled in (Drive(MODEL, "auto").probe, lambda: probe.plan(config, MODEL)):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await cancelled()
        assert scope.cancelled_caught and disks.pop().closed and not disks


async def test_a_probe_without_a_yardstick_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room for a yardstick")

    monkeypatch.setattr(Yardstick, "of", full)
    with pytest.raises(MemoryError, match="no room for a yardstick"):
        await Probe(Probed("plan", RuntimeConfig.of("demo", {"cache_dir": tmp_path}))).run()
    assert not [thread for thread in threading.enumerate() if thread.name == "aollm-compute"]


def test_overlap_draws_the_last_pass(measured: tuple[dict[str, Any], Path]) -> None:
    result, folder = measured
    assert (folder / "lanes.png").read_bytes().startswith(PNG)
    interval = load(folder / "result.json")
    assert interval.model == "demo" and len(interval.compute) >= 2 * LAYERS
    assert title(interval).startswith("demo") and title(interval).endswith("of the bound")
    assert interval.seconds == pytest.approx(result["by_round"][-1]["pass_seconds"][-1], abs=1e-5)


def test_overlap_prints_one_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"DISK_BACKEND": "portable", "PREFETCH_DEPTH": "5", "KV_CACHE_STRATEGY": "paged"}.items():
        monkeypatch.setenv(f"AOLLM_RUNTIME__{name}", value)
    typed = ["--prefetch-depth", "3", "--device", "cpu"]
    assert main(["overlap", "demo", "--tokens", "3", "--rounds", "1", *typed]) == 0  # all of it fits in memory
    shown = capsys.readouterr()
    result = json.loads(shown.out.splitlines()[-1])
    assert result["bytes_per_pass"] == result["plan"]["streamed_nbytes_per_pass"] == 0
    assert result["limiter"] == "compute" and result["interrupted"] is False
    assert [result[name] for name in ("disk_backend", "prefetch_depth", "kv_cache_strategy")] == ["portable", 3, "paged"]
    assert [result["plan"][name] for name in ("disk_backend", "device", "kv_cache_strategy")] == ["portable", "cpu", "paged"]
    assert "overlap: demo" in shown.err and "of it reached" in shown.err


def test_plot_draws_a_trace(tmp_path: Path) -> None:
    trace = Trace()
    for event in two_passes():
        trace.add(event)
    trace.save(tmp_path / "trace.json")
    assert load(tmp_path / "trace.json").seconds == pytest.approx(3.5)
    assert main(["plot", str(tmp_path / "trace.json"), "--output", str(tmp_path / "lanes.png")]) == 0
    assert (tmp_path / "lanes.png").read_bytes().startswith(PNG)


BAD = {
    "no JSON": "{",
    "not an object": "[1]",
    "another object": "{}",
    "no passes": '{"traceEvents": []}',
    "no event": '{"traceEvents": [1]}',
    "an event without a time": '{"traceEvents": [{"name": "a", "cat": "compute"}]}',
    "a time that is none": '{"lanes": {"seconds": NaN, "reads": [], "compute": [], "stalls": []}}',
    "no time at all": '{"lanes": {"seconds": 0, "reads": [], "compute": [], "stalls": []}}',
    "a bar that is none": '{"lanes": {"seconds": 1, "reads": [[0]], "compute": [], "stalls": []}}',
    "backward bars": '{"lanes": {"seconds": 1, "reads": [[1, 0, 5]], "compute": [], "stalls": []}}',
    "no text": b"\xff\xfe\x00",
    "missing": None,
}


@pytest.mark.parametrize("kind", BAD)
def test_plot_refuses_a_bad_file_in_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, content = tmp_path / "bad.json", BAD[kind]
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["plot", str(path), "--output", str(tmp_path / "lanes.png")]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "bad.json" in shown.err
    assert not (tmp_path / "lanes.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["overlap", "demo", "--memory", "much"], 2, "memory"),
        (["overlap", "demo", "--offload-cpu-layers", "-1"], 2, "offload_cpu_layers"),
        *((["overlap", "demo", f"--{name}", "no/such/folder/result.file"], 2, f"{name}: no/such/folder") for name in ("output", "lanes")),
        *((["overlap", "demo", f"--{name}", "/"], 2, f"{name}: / cannot be written") for name in ("output", "lanes")),
        (["overlap", "no-such-model"], 1, "no-such-model"),
        (["overlap", "demo", "--memory", "1MiB"], 1, "too small"),
        (["overlap", "demo", "--device", "cuda:99"], 2, "device: there is no cuda:99"),
        (["overlap", "demo", "--prefetch-depth", "0"], 2, "prefetch_depth"),
        (["overlap", "demo", "--backend", "transformers-generic"], 1, "demo runs on transformers-generic"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and said in shown.err


@pytest.mark.parametrize("arguments", [["overlap"], ["--probe-runtime", "--model"]], ids=["overlap", "probe"])
def test_weights_that_lead_nowhere_are_one_line(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    assert main([*arguments, str(folder)]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "safetensors" in shown.err


@pytest.mark.parametrize("arguments", [["overlap"], ["overlap", "demo", "--tokens", "1"], ["plot", "trace.json"], ["sing"]])
def test_bad_use_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["overlap", "demo", "--lanes", str(tmp_path / "lanes.png")]) == 2
    assert "pip install 'aollm[plots]'" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from aollm.bench.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as ended: print(ended.code, sorted({'torch', 'matplotlib', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "overlap" in found.stdout and found.stdout.endswith("0 []\n")


def point(**figures: list[float]) -> dict[str, Any]:
    rows = [dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)]
    return {"requests": rows}


RESULT: dict[str, Any] = {
    "bench": "profile", "model": "demo", "profile": "quick", "began": "2026-01-01T00:00:00+00:00", "lanes": {
        "prompt-scaling": {"result": {"points": {
            "512": {"tokens": 512, **point(ttft_seconds=[0.08, 0.09])}, "32": {"tokens": 32, **point(ttft_seconds=[0.01, 0.02])},
        }}},
        "session-growth": {"result": {"points": {"1": {"turn": 1, **point(ttft_seconds=[0.01])}}}},
        "output-scaling": {"result": None},
    },
}  # fmt: skip


def test_plot_draws_the_curves_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    assert main(["plot", str(tmp_path / "a.json"), "--output", str(tmp_path / "curves.png")]) == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert points_of(RESULT, "prompt-scaling", "tokens", "ttft_seconds") == [(32, [10, 20]), (512, [80, 90])]
    assert points_of(RESULT, "output-scaling", "tokens", "pass_seconds") == []


def test_plot_draws_a_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = {"seconds": 0.005, "count": 9, "yardstick": "operations", "yardstick_seconds": 0.001, "drive_bytes_per_second": None}
    for number in range(5):
        key = {"model": "demo", "profile": "quick", "backend": "optimized-native"} if number != 1 else {"model": "other"}
        record(tmp_path, key, {"warm/decode": value, **({"cold/cold-cpu": value} if number > 2 else {})}, {})
    with open(tmp_path / LOG, "a") as file:
        file.write('{"schema": 99}\n{"sch')
    for path in (tmp_path, tmp_path / LOG):
        assert main(["plot", str(path), "--output", str(tmp_path / "history.png")]) == 0
        assert (tmp_path / "history.png").read_bytes().startswith(PNG)
        assert "newer version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lanes": {}}, "no lane with a curve"),
        ({"lanes": []}, "damaged"),
        ({"lanes": {"prompt-scaling": {"result": {"points": {"1": {"tokens": 1}}}}}}, "damaged"),
        ({"began": None}, "damaged"),
    ],
)
def test_plot_refuses_a_result_that_cannot_be_drawn(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(RESULT | change))
    assert main(["plot", str(tmp_path / "bad.json"), "--output", str(tmp_path / "a.png")]) == 2
    assert said in capsys.readouterr().err
    (tmp_path / "history").mkdir()
    assert main(["plot", str(tmp_path / "history"), "--output", str(tmp_path / "a.png")]) == 2
    assert "no two runs" in capsys.readouterr().err and not (tmp_path / "a.png").exists()
