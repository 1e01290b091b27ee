"""What a file holds decides what is drawn of it: a pass's lanes, a run's curves, or a history."""

from __future__ import annotations

import json
from pathlib import Path

from .curves import draw_curves
from .interval import load
from .plot import draw, require_matplotlib
from .timeline import draw_history


def picture(path: Path, output: Path) -> None:
    """Draw `path` as a PNG. Raises `ConfigError` for a file that cannot be read, drawn or written."""
    require_matplotlib()
    if path.is_dir() or path.name.endswith(".jsonl"):
        draw_history(path if path.is_dir() else path.parent, output)
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        found = None  # the reader of intervals says what is wrong with it
    if isinstance(found, dict) and found.get("bench") == "profile":
        draw_curves(found, output, str(path))
    else:
        draw(load(path), output)
