"""A history of the benchmark as a picture: how each subject went from run to run, against the first one of its kind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigError, StoreError
from .comparison import SUBJECTS, judge
from .history import LOG, Entry, load
from .plot import BLUE, GREY, ORANGE, RED, clean, save

GREEN = "#009E73"
STYLES = ((BLUE, "o-"), (ORANGE, "s-"), (GREEN, "^-"), (RED, "v--"))


def draw_history(folder: Path, output: Path) -> None:
    """Write the PNG: one panel for each kind of run that is there at least twice, the newest kind first. Raises `ConfigError`."""
    from matplotlib.figure import Figure

    try:
        entries = load(folder, lambda text: print(f"aollm.bench: {text}", file=sys.stderr))
    except StoreError as error:
        raise ConfigError(str(error)) from error
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.digest, []).append(entry)
    shown = sorted((runs for runs in kinds.values() if len(runs) > 1), key=lambda runs: runs[-1].time, reverse=True)[:4]
    if not shown:
        raise ConfigError(f"{folder / LOG} has no two runs of the same kind to draw")
    figure = Figure(figsize=(9, 3.6 * len(shown) + 0.4), dpi=150, layout="constrained")
    for axes, runs in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        for subject, (colour, style) in zip(SUBJECTS, STYLES, strict=True):
            found = [(number, judged.change) for number, run in enumerate(runs) if (judged := judge(subject, run.values, runs[:1]))]
            if found:
                changes = [100 * change for _, change in found]
                axes.plot([at for at, _ in found], changes, style, color=colour, linewidth=1.4, markersize=5, label=subject.name)
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(runs)), _names(runs), fontsize=8)
        axes.set_ylabel("longer than the first run\n(%, against the yardstick)")
        key = runs[-1].key
        axes.set_title(
            f"{key.get('model')}  ·  {key.get('profile')} profile  ·  {key.get('backend')}  ·  {len(runs)} runs",
            loc="left", fontsize=11, fontweight="bold",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=9, labelcolor=GREY, loc="center left", bbox_to_anchor=(1.0, 0.5))
        clean(axes)
    save(figure, output)


def _names(runs: Sequence[Entry]) -> list[str]:
    """Day and minute of each run, as far as there is room."""
    step = -(-len(runs) // 10)
    return [run.time[5:16].replace("T", "\n") if number % step == 0 else "" for number, run in enumerate(runs)]
