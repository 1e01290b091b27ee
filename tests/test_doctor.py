"""The checkup: what each check says of what it finds, and the command that runs them all."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from aollm.checkup.check import Check, State
from aollm.checkup.packages import EXTRAS, Requirement, check_extras, check_packages, parse, required
from aollm.checkup.processor import check_device, check_gds, check_memory_speed, check_threads, check_torch, quota
from aollm.checkup.storage import (
    check_cache_root,
    check_drive,
    check_free_disk,
    check_models_folder,
    check_weights_drive,
    filesystem,
    weights_in,
)
from aollm.checkup.system import check_files, check_io_uring, check_load, check_locked, check_memory, check_swap
from aollm.cli import main
from aollm.probe import existing

PROGRAM = [sys.executable, "-m", "aollm", "doctor"]
GIB = 1 << 30
ROOT = str(Path(__file__).parent.parent)


def advised(check: Check, state: State, *found: str) -> bool:
    """It has that state, says these things, and what to do unless all is well."""
    return check.state == state and all(part in check.found for part in found) and (check.state == "ok" or bool(check.advice))


LINES = [
    "torch>=2.11",
    "numpy>=2.0 ",
    'kvikio-cu13>=26.10; sys_platform == "linux" and extra == "gds"',
    'trio>=0.32; extra == "trio"',
    'x>=1; sys_platform == "no"',
]


def test_requirements_are_read_from_metadata() -> None:
    assert list(parse(LINES)) == [
        Requirement("torch", "2.11", None), Requirement("numpy", "2.0", None), Requirement("kvikio-cu13", "26.10", "gds"),
        Requirement("trio", "0.32", "trio"),
    ]  # fmt: skip
    own = required()
    assert own is not None and {"torch", "anyio", "pydantic"} <= {each.name for each in own if each.extra is None}
    assert {each.extra for each in own} - {None, "test", "docs", "lint", "peers"} == EXTRAS.keys()


@pytest.mark.parametrize(
    ("have", "state", "found"),
    [
        ({"torch": "2.11.0+cpu", "numpy": "2.0"}, "ok", "all 2 as required"),
        ({"torch": "2.11.0rc1", "numpy": "10"}, "ok", "torch 2.11.0rc1"),
        ({"torch": "2.9.1", "numpy": "2.1"}, "problem", "torch is 2.9.1, 2.11 or newer is needed"),
        ({"numpy": "1.26"}, "problem", "missing: torch; numpy is 1.26, 2.0 or newer is needed"),
    ],
)
def test_packages(have: dict[str, str], state: State, found: str) -> None:
    assert advised(check_packages(list(parse(LINES)), have.get), state, found)


@pytest.mark.parametrize(
    ("have", "state", "found"),
    [
        ({"kvikio-cu13": "26.10", "trio": "1"}, "ok", "gds, trio"),
        ({"trio": "0.32"}, "ok", "trio; not installed: gds (reads straight into a GPU's memory)"),
        ({"trio": "0.31"}, "warning", "trio is 0.31, 0.32 or newer is needed"),
    ],
)
def test_extras(have: dict[str, str], state: State, found: str) -> None:
    assert advised(check_extras([each for each in parse(LINES)], have.get), state, found)


def test_what_is_not_installed_is_not_known() -> None:
    assert advised(check_packages(None), "unknown", "not installed, only found")


@pytest.mark.parametrize(
    ("check", "state", "found"),
    [
        (check_threads(8, 8, None), "ok", "8 for 8 processors"),
        (check_threads(64, 64, 2.0), "warning", "64 for 64 processors, of which 2 are granted"),
        (check_threads(2, 2, 8.0), "ok", "2 for 2 processors"),
        (check_threads(1, 8, None), "warning", "1 for 8"),
        (check_memory(8 * GIB, 16 * GIB), "ok", "8.00 GiB free of 16.00 GiB"),
        (check_memory(GIB, 16 * GIB), "warning", "1.00 GiB free"),
        (check_swap(0, 0), "ok", "none"),
        (check_swap(100 << 20, 8 * GIB), "ok", "100.0 MiB used"),
        (check_swap(GIB, 8 * GIB), "warning", "1.00 GiB used of 8.00 GiB"),
        (check_load(0.5, 2), "ok", "0.50 for 2"),
        (check_load(1.6, 2), "warning", "1.60 for 2"),
        (check_files(1024, 1 << 20), "ok", "1,024 at a time, 1,048,576 at most"),
        (check_files(1024, 1024), "warning", "1,024"),
        (check_files(resource.RLIM_INFINITY, resource.RLIM_INFINITY), "ok", "no limit"),
        (check_io_uring(None), "ok", "works"),
        (check_io_uring("EPERM: Operation not permitted"), "ok", "not available (EPERM: Operation not permitted)"),
        (check_memory_speed(512 << 20), "unknown", "not measured"),
    ],
)
def test_what_is_found_and_what_is_made_of_it(check: Check, state: State, found: str) -> None:
    assert advised(check, state, found) or (check.state == state == "unknown" and found in check.found)


def test_locked_memory_matters_to_old_kernels_alone() -> None:
    assert check_locked(65536, "6.1.0-x") is None and check_locked(65536, "5.12") is None
    old, enough = check_locked(65536, "5.10.0-28-amd64"), check_locked(8 << 20, "5.4")
    assert old is not None and advised(old, "warning", "65.5 kB may be locked")
    assert enough is not None and advised(enough, "ok")


def test_the_processor_as_torch_has_it() -> None:
    check = check_torch()
    assert torch.__version__ in check.found and check.figures["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert check_device().figures["devices"] == [] or torch.cuda.is_available()
    speed = check_memory_speed(64 * GIB).figures["bytes_per_second"]
    assert 1e8 < speed < 1e13


@pytest.mark.parametrize(
    ("limits", "expected"), [(("max 100000", "150000 100000"), 1.5), (("50000 100000", "max 100000"), 0.5), (("", "x"), None)]
)
def test_the_quota_of_control_groups(limits: tuple[str, str], expected: float | None, tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    own.write_text("1:cpu:/other\n0::/above/mine\n")
    for name, limit in zip(("above/mine", "above"), limits):
        (groups / name).mkdir(parents=True, exist_ok=True)
        (groups / name / "cpu.max").write_text(limit)
    assert quota(groups, own) == expected
    assert quota(groups, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("module", "state", "found"),
    [
        (None, "ok", "kvikio is not installed"),
        ("def get(name): return 'CompatMode.OFF'\ndef is_compat_mode_preferred(): return False", "ok", "compatibility mode OFF"),
        (
            "def get(name): return 'CompatMode.AUTO'\ndef is_compat_mode_preferred(): return True",
            "warning",
            "it reads through the processor",
        ),
        ("raise OSError('libcufile.so.0: cannot open')", "warning", "cannot be asked (libcufile.so.0: cannot open)"),
    ],
)
def test_gds(module: str | None, state: State, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("kvikio", "kvikio.defaults"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    if module is not None:
        (tmp_path / "kvikio").mkdir()
        (tmp_path / "kvikio" / "__init__.py").write_text("__version__ = '26.10'\nfrom . import defaults\n")
        (tmp_path / "kvikio" / "defaults.py").write_text(module)
        monkeypatch.syspath_prepend(tmp_path)
    assert advised(check_gds(), state, found)
    assert ("kvikio" in sys.modules) == (module is not None and "raise" not in module)
    for name in ("kvikio", "kvikio.defaults"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def mounts(folder: Path, kind: str) -> str:
    point = str(folder).replace(" ", "\\040")
    return (
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 22 0:26 / {point} rw shared:9 master:1 - {kind} server:/x rw\nnot a line of it\n"
    )


def test_the_kind_of_a_filesystem(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    (folder / "inner").mkdir(parents=True)
    text = mounts(folder, "nfs4")
    assert [filesystem(path, text) for path in (folder, folder / "inner", tmp_path)] == ["nfs4", "nfs4", "ext4"]
    (tmp_path / "a folder longer").mkdir()
    assert filesystem(tmp_path / "a folder longer", text) == "ext4"
    assert filesystem(folder, text + mounts(folder, "xfs")) == "xfs"
    assert filesystem(folder, "") is None


@pytest.mark.parametrize(
    ("kind", "mode", "state", "found"),
    [
        ("ext4", 0o700, "ok", "on ext4, mode 0700"),
        ("tmpfs", 0o700, "warning", "on tmpfs"),
        ("nfs4", 0o700, "warning", "on nfs4"),
        ("fuse.sshfs", 0o700, "warning", "on fuse.sshfs"),
        ("nfsd", 0o755, "warning", "mode 0755: others may look into it"),
        ("ext4", 0o770, "problem", "can be altered by other users"),
        ("tmpfs", 0o777, "problem", "can be altered by other users"),
    ],
)
def test_the_cache_folder(kind: str, mode: int, state: State, found: str, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    check = check_cache_root(folder, mounts(tmp_path, kind))
    assert advised(check, state, found), check
    assert check.figures["mode"] == f"{mode:04o}" and list(folder.iterdir()) == []


def test_a_cache_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert advised(check_cache_root(tmp_path / "file", ""), "problem", "is not a folder")
    assert advised(check_cache_root(tmp_path / "file" / "inner", ""), "problem", "is not a folder")
    unwritable = check_cache_root(Path("/proc/none"), "")
    assert advised(unwritable, "problem", "no file can be made in /proc") and unwritable.advice == "name another with --cache-dir"
    missing = check_cache_root(tmp_path / "a" / "b", "")
    assert advised(missing, "ok", "made when it is needed") and existing(tmp_path / "a" / "b") == tmp_path
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be entered; root, who may enter any, is somebody else meanwhile."""
    folder = tmp_path / "locked"
    (folder / "inner").mkdir(parents=True)
    tmp_path.chmod(0o755)
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(1234)
    try:
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize("below", ["", "inner", "inner/cache", "none"])
def test_folders_below_one_that_may_not_be_entered(locked: Path, below: str) -> None:
    folder = locked / below
    check = check_cache_root(folder, "")
    assert advised(check, "problem", "no file can be made in") and str(check.advice).endswith(", or change its mode")
    assert advised(check_models_folder(folder, ""), "problem", "is not a folder that this user may")


def test_links_to_nowhere_are_no_folders(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("gone")
    for folder in (link, link / "inner"):
        assert existing(folder) == link
        assert advised(check_cache_root(folder, ""), "problem", "link is not a folder")
        assert advised(check_models_folder(folder, ""), "problem", "link is not a folder")


@pytest.mark.needs_root
def test_a_cache_folder_of_somebody_else(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    os.chown(folder, 1234, 1234)
    assert advised(check_cache_root(folder, ""), "problem", "belongs to another user (number 1234)")


def test_rooms_and_models(tmp_path: Path) -> None:
    usage = os.statvfs(tmp_path)
    check = check_free_disk(tmp_path / "later")
    assert check.figures["total"] == usage.f_blocks * usage.f_frsize and check.figures["free"] <= check.figures["total"]
    assert advised(check_models_folder(tmp_path, mounts(tmp_path, "cifs")), "warning", "on cifs")
    assert advised(check_models_folder(tmp_path, mounts(tmp_path, "ramfs")), "warning", "on ramfs")


async def test_the_drive_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    told = list[str]()
    direct, speed = await check_drive(tmp_path / "not there yet", told.append, 96 << 20)
    assert (direct.name, speed.name, list(tmp_path.iterdir())) == ("direct reads", "drive", [])
    assert speed.figures["nbytes"] in range(8 << 20, (96 << 20) + 1, 8 << 20)
    assert speed.figures["written_bytes_per_second"] > 0
    assert speed.figures["read_bytes_per_second"] is None or speed.figures["read_bytes_per_second"] > 1e6
    assert told[0].startswith("writing 0 B of 96.0 MiB") and told[-1].startswith("reading ")


async def test_a_drive_without_room_or_leave_is_not_measured(tmp_path: Path) -> None:
    (check,) = await check_drive(tmp_path, print, 1 << 50)
    assert advised(check, "unknown", "not measured: ") and "are needed" in check.found
    (check,) = await check_drive(Path("/proc"), print, 0)
    assert advised(check, "problem", "/proc cannot be written")


async def test_weights_that_are_here_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--m" / "snapshots" / "a"
    snapshot.mkdir(parents=True)
    (snapshot / "small.safetensors").write_bytes(bytes(1 << 20))
    assert weights_in(tmp_path) == [] and (await check_weights_drive([], print)).state == "unknown"
    (snapshot / "large.safetensors").write_bytes(bytes(96 << 20))
    assert weights_in(tmp_path) == [(str(snapshot / "large.safetensors"), 96 << 20)]
    check = await check_weights_drive(weights_in(tmp_path), print)
    assert advised(check, "ok", "large.safetensors")
    gone = await check_weights_drive([(str(snapshot / "gone"), 1 << 30)], print)
    assert advised(gone, "problem", "gone")


NAMES = [
    "packages", "extras", "settings", "torch", "threads", "device", "GDS", "memory", "swap", "load", "memory speed", "cache folder",
    "free disk", "direct reads", "drive", "models folder", "io_uring", "open files",
]  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    start = time.perf_counter()
    code = main(["doctor", "--json", "--cache-dir", str(folder), "--models-dir", str(tmp_path)])
    took = time.perf_counter() - start
    found = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in found["checks"] if check["name"] not in ("drive", "weights", "locked memory", "direct reads")] == [
        name for name in NAMES if name not in ("drive", "direct reads")
    ]
    states = [check["state"] for check in found["checks"]]
    assert {state: states.count(state) for state in ("ok", "warning", "problem", "unknown")} == {
        state: found[state] for state in ("ok", "warning", "problem", "unknown")
    }
    assert code == int(found["problem"] > 0) and list(folder.iterdir()) == []
    assert all(check["advice"] for check in found["checks"] if check["state"] in ("warning", "problem"))
    (packages,) = [check for check in found["checks"] if check["name"] == "packages"]
    assert packages["figures"]["torch"]["installed"] == version("torch")
    assert took < 60  # twelve seconds are what its parts may take; a machine may be busy


def test_problems_are_told_and_end_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AOLLM_RUNTIME__MEMORY", "3 apples")
    monkeypatch.setenv("AOLLM_CONFIG_FILE", str(tmp_path / "empty.toml"))
    (tmp_path / "empty.toml").touch()
    assert main(["doctor", "--cache-dir", "/proc/none", "--models-dir", str(tmp_path), "--quiet"]) == 1
    shown = capsys.readouterr()
    assert shown.err == "" and "\x1b" not in shown.out and max(map(len, shown.out.splitlines())) <= 80
    assert re.search(r"^problem  settings       memory: a size such as '3GiB'", shown.out, re.MULTILINE)
    assert re.search(r"^problem  cache folder   /proc/none", shown.out, re.MULTILINE)
    assert "→ name another with --cache-dir" in shown.out
    assert re.search(r"^2 problems", shown.out.splitlines()[-1])


def test_a_folder_that_is_none_is_bad_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--cache-dir", ""]) == 2
    assert "cache_dir: the path of a folder" in capsys.readouterr().err


def test_packages_that_are_missing_are_named() -> None:
    program = [sys.executable, "-S", *PROGRAM[1:]]
    found = subprocess.run(program, capture_output=True, text=True, env={"PYTHONPATH": ROOT}, timeout=60)
    if "not installed, only found" in found.stdout:
        pytest.skip("aollm is not installed beside its source")
    assert (found.returncode, found.stderr) == (1, "")
    assert re.search(r"^problem  packages       missing: .*anyio", found.stdout, re.MULTILINE)
    assert "not looked at: packages come first" in found.stdout


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    with subprocess.Popen([*PROGRAM, "--cache-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"free disk" in line:  # the drive comes next
                process.send_signal(signal.SIGINT)
                break
        rest, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, b"")
    assert b"io_uring" not in rest and list(tmp_path.iterdir()) == []


def test_nobody_reads(tmp_path: Path) -> None:
    with subprocess.Popen([*PROGRAM, "--cache-dir", str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE and list(tmp_path.iterdir()) == []
