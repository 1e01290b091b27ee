"""A run of the benchmark as curves: how requests grow with prompts, answers and conversations.

Colours are those of the lanes (see `plot`); lines differ in marker and dash besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .plot import BLUE, GREY, ORANGE, RED, clean, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[float, list[float]]]
"""Where a point stands on the axis, and what each of its requests took."""


def draw_curves(result: Mapping[str, Any], output: Path, source: str) -> None:
    """Write the PNG. Raises `ConfigError` when nothing was measured that has a curve, or `source` is not what it says."""
    from matplotlib.figure import Figure

    try:
        panels = [
            ("prompt tokens", "first token (ms)", [("prompts", points_of(result, "prompt-scaling", "tokens", "ttft_seconds"), BLUE, "o-")]),
            ("answer tokens", "a token (ms)", [("answers", points_of(result, "output-scaling", "tokens", "pass_seconds"), ORANGE, "s-")]),
            (
                "turn of a conversation", "first token (ms)",
                [
                    ("kept open", points_of(result, "session-growth", "turn", "ttft_seconds"), BLUE, "o-"),
                    ("reopened, from disk", points_of(result, "reopen-session-growth", "turn", "ttft_seconds"), RED, "^--"),
                ],
            ),
        ]  # fmt: skip
        title = f"{result['model']}  ·  {result['profile']} profile  ·  {result['began'][:10]}"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{source} is damaged or not of aollm's making: {type(error).__name__}: {error}") from error
    panels = [panel for panel in panels if any(points for _, points, _, _ in panel[2])]
    if not panels:
        raise ConfigError(f"{source} has no lane with a curve: prompts, answers and conversations were not measured")
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 4.2), dpi=150, layout="constrained")
    for axes, (across, up, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        _draw(axes, across, up, lines)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    save(figure, output)


def _draw(axes: Axes, across: str, up: str, lines: list[tuple[str, Points, str, str]]) -> None:
    """Medians as a line, each request as a dot."""
    for name, points, colour, style in lines:
        if not points:
            continue
        middles = [median(values) for _, values in points]
        axes.plot([at for at, _ in points], middles, style, color=colour, linewidth=1.6, markersize=5, label=f"{name}: median")
        dots = [(at, value) for at, values in points for value in values]
        axes.scatter(
            [at for at, _ in dots], [value for _, value in dots], s=14, color=colour, alpha=0.35, linewidths=0, label="each request"
        )
    ticks = sorted({at for _, points, _, _ in lines for at, _ in points})
    if ticks[-1] > 8 * ticks[0]:  # lengths double from one to the next
        axes.set_xscale("log", base=2)
        axes.minorticks_off()
    axes.set_xticks(ticks, [f"{at:.0f}" for at in ticks])
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=GREY)
    clean(axes)


def points_of(result: Mapping[str, Any], lane: str, axis: str, figure: str) -> Points:
    """The points of a lane by what is on the axis, in milliseconds; none of a lane that was not measured."""
    return sorted(_found(result, lane, axis, figure))


def _found(result: Mapping[str, Any], lane: str, axis: str, figure: str) -> Iterator[tuple[float, list[float]]]:
    measured = (result["lanes"].get(lane) or {}).get("result") or {}
    for point in measured.get("points", {}).values():
        values = [float(request[figure]) * 1e3 for request in point["requests"] if request[figure] is not None]
        if values:
            yield float(point[axis]), values
