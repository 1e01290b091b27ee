"""The programmes that break stores, as many trials as a change is worth; `make soak` runs all of them.

What was counted is kept in .bench/survival, and `python tests/survival/table.py` makes the README's table of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COUNTS = Path(__file__).parents[2] / ".bench" / "survival"
NAMES = ("crashes", "kills", "together", "failures", "power", "tails", "flips", "mutants")


def survive(name: str, folder: Path, *options: str) -> None:
    """Run one programme in a process of its own, which has no threads when it forks."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "survival", name, *options]
    ended = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ended.stdout, ended.stderr[-4000:]
    result = json.loads(ended.stdout)[name]
    assert not result["failures"], "\n".join(result["failures"][:20])
    assert result["trials"]
    COUNTS.mkdir(parents=True, exist_ok=True)
    told = {"programme": name, "options": options, "trials": result["trials"], "failures": 0, "seconds": result["seconds"]}
    (COUNTS / f"{name}.json").write_text(json.dumps(told) + "\n")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_store_survives(name: str, tmp_path: Path) -> None:
    survive(name, tmp_path)


@pytest.mark.needs_root
def test_a_store_survives_a_full_filesystem(tmp_path: Path) -> None:
    survive("full", tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*NAMES, pytest.param("full", marks=pytest.mark.needs_root)])
def test_a_store_survives_all_of_it(name: str, tmp_path: Path) -> None:
    survive(name, tmp_path, "--soak")
