"""The programmes that break stores, as many trials as a change is worth; `make soak` runs all of them.

What was counted is kept in .bench/survival, and `python tests/survival/table.py` makes the README's table of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

COUNTS = Path(__file__).parents[2] / ".bench" / "survival"
NAMES = ("crashes", "kills", "together", "failures", "power", "tails", "flips", "mutants")
FULL = pytest.param("full", marks=pytest.mark.needs_root)
Survive = Callable[..., None]


@pytest.fixture(scope="module")
def survive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survive]:
    """Runs a programme, in a process that has no threads when it forks; one process for all that have the same options."""
    folder = tmp_path_factory.mktemp("survival")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    running: dict[tuple[str, ...], subprocess.Popen[str]] = {}

    def run(name: str, *options: str) -> None:
        if options not in running:
            command = [sys.executable, "-m", "survival", "--asked", *options]
            running[options] = subprocess.Popen(
                command, env=environment, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said
            )
        process = running[options]
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        while name not in (told := json.loads(process.stdout.readline() or "null") or {name: None}):
            pass  # what another test did not wait for
        said.seek(0)
        assert told[name], said.read()[-4000:]
        keep(name, options, told[name])

    with tempfile.TemporaryFile("w+") as said:
        yield run
        for process in running.values():
            process.communicate()
            assert process.returncode == 0


def keep(name: str, options: tuple[str, ...], result: dict[str, Any]) -> None:
    assert not result["failures"], "\n".join(result["failures"][:20])
    assert result["trials"]
    COUNTS.mkdir(parents=True, exist_ok=True)
    told = {"programme": name, "options": options, "trials": result["trials"], "failures": 0, "seconds": result["seconds"]}
    (COUNTS / f"{name}.json").write_text(json.dumps(told) + "\n")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*NAMES, FULL])
def test_a_store_survives(survive: Survive, name: str) -> None:
    survive(name)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*NAMES, FULL])
def test_a_store_survives_all_of_it(survive: Survive, name: str) -> None:
    survive(name, "--soak")
