"""Lanes as a picture: what the drive read, when the processor computed and when it waited, over one axis of time.

Colours are of the Okabe-Ito palette, which colour-blind eyes tell apart; waiting is hatched besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .interval import Bar, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#595959"
BAR = 0.82
MAX_READ_ROWS = 4


def require_matplotlib() -> None:
    """Raise `ConfigError` with the line that installs it when matplotlib is missing; does not import it."""
    if find_spec("matplotlib") is None:
        raise ConfigError("drawing needs matplotlib, which is not installed: pip install 'aollm[plots]'")


def draw(interval: Interval, output: Path) -> None:
    """Write the PNG of an interval to `output`. Raises `ConfigError` when matplotlib is missing or the file cannot be written."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows = _rows(interval.reads)
    figure = Figure(figsize=(12, 3.7 + 0.35 * len(rows)), dpi=150, layout="constrained")
    speed, lanes = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 2 + len(rows)])
    _draw_speed(speed, interval)
    _draw_lanes(lanes, interval, rows)
    speed.set_title(title(interval), loc="left", fontsize=12, fontweight="bold")
    save(figure, output)


def save(figure: Figure, output: Path) -> None:
    """Write a figure as a PNG. Raises `ConfigError` when the file cannot be written."""
    try:
        figure.savefig(output, format="png")
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error.strerror}") from error


def title(interval: Interval) -> str:
    """`llama-3.2-3b · one pass in 2.31 s · reads 1.78 GB/s, 98 % of the bound`, as far as it is known."""
    parts = [interval.model] if interval.model else []
    parts.append(f"one pass in {interval.seconds:.3g} s")
    reads = f"reads {interval.bytes_per_second / 1e9:.2f} GB/s"
    parts.append(reads if interval.fraction_of_bound is None else f"{reads}, {interval.fraction_of_bound:.0%} of the bound")
    return "  ·  ".join(parts)


def _draw_speed(axes: Axes, interval: Interval) -> None:
    times, speeds = _speeds(interval.reads, interval.seconds)
    axes.fill_between(times, speeds, step="post", color=BLUE, alpha=0.3, linewidth=0)
    axes.step(times, speeds, where="post", color=BLUE, linewidth=1)
    top = max([*speeds, 1e-3])
    if interval.drive_bytes_per_second is not None:
        drive = interval.drive_bytes_per_second / 1e9
        top = max(top, drive)
        axes.axhline(drive, color=GREY, linestyle="--", linewidth=1)
        told = f"drive alone\n{drive:.2f} GB/s"
        axes.annotate(
            told, (1, drive), (5, 0), ("axes fraction", "data"), "offset points", va="center", color=GREY, fontsize=9, annotation_clip=False
        )
    axes.set_ylim(0, top * 1.15)
    axes.set_ylabel("read speed\n(GB/s)")
    clean(axes)


def _draw_lanes(axes: Axes, interval: Interval, rows: Sequence[Sequence[Bar]]) -> None:
    styles = [("compute", interval.compute, ORANGE, ""), ("stalled", interval.stalls, RED, "//////")]
    for row, bars in enumerate(rows):
        axes.broken_barh(
            [(low, high - low) for low, high, _ in bars], (row - BAR / 2, BAR), facecolor=BLUE, edgecolor="white", linewidth=0.5
        )
    for row, (_, bars, colour, hatch) in enumerate(styles, start=len(rows)):
        spans = [(low, high - low) for low, high, _ in bars]
        if hatch:
            axes.broken_barh(spans, (row - BAR / 2, BAR), facecolor="#F6D5C3", edgecolor=colour, hatch=hatch, linewidth=0.4)
        else:
            axes.broken_barh(spans, (row - BAR / 2, BAR), facecolor=colour, edgecolor="white", linewidth=0.3)
    named = [("reads", interval.reads, (len(rows) - 1) / 2)]
    named += [(name, bars, float(row)) for row, (name, bars, _, _) in enumerate(styles, start=len(rows))]
    axes.set_yticks([at for _, _, at in named], [f"{name}\n{_busy(bars) / interval.seconds:.0%} of the time" for name, bars, _ in named])
    axes.set_ylim(len(rows) + len(styles) - 0.5, -0.5)
    axes.set_xlim(0, interval.seconds)
    axes.set_xlabel("seconds since the pass began")
    clean(axes)


def clean(axes: Axes) -> None:
    """No frame above and to the right, and a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _rows(bars: Sequence[Bar]) -> list[list[Bar]]:
    """Bars in as few rows as let none cover another; beyond `MAX_READ_ROWS` they share the row that is free first."""
    rows: list[list[Bar]] = [[]]
    for bar in bars:
        free = [row for row in rows if not row or row[-1][1] <= bar[0]]
        if free:
            free[0].append(bar)
        elif len(rows) < MAX_READ_ROWS:
            rows.append([bar])
        else:
            min(rows, key=lambda row: row[-1][1]).append(bar)
    return rows


def _speeds(bars: Sequence[Bar], seconds: float) -> tuple[list[float], list[float]]:
    """GB/s over time, in fortieths to four-hundredths of the interval: each read's bytes spread evenly over its duration."""
    count = max(40, min(400, 4 * len(bars)))
    step = seconds / count
    speeds = [0.0] * count
    for low, high, nbytes in bars:
        for column in range(int(low / step), min(int(high / step), count - 1) + 1):
            inside = min(high, (column + 1) * step) - max(low, column * step)
            speeds[column] += max(inside, 0.0) / (high - low) * nbytes / step / 1e9
    return [column * step for column in range(count + 1)], [*speeds, speeds[-1]]


def _busy(bars: Sequence[Bar]) -> float:
    """Seconds in which at least one of the bars is."""
    edges = sorted([(low, 1) for low, _, _ in bars] + [(high, -1) for _, high, _ in bars])
    busy, open_bars = 0.0, 0
    for (at, change), (then, _) in pairwise([*edges, (0.0, 0)]):
        open_bars += change
        busy += (then - at) if open_bars else 0.0
    return busy
