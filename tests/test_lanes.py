"""Lanes as pictures: which part of the time each column shows as busy."""

import pytest

from aollm.lanes import blocks, last_passes, merged, picture
from aollm.trace import Event


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], []),
        ([(1, 2), (3, 4)], [(1, 2), (3, 4)]),
        ([(3, 4), (1, 3)], [(1, 4)]),
        ([(1, 5), (2, 3), (6, 20)], [(1, 5), (6, 10)]),
        ([(-5, 1), (0, 2)], [(0, 2)]),
        ([(11, 12), (-2, -1)], []),
    ],
)
def test_merged(spans: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    assert merged(spans, 0, 10) == expected


@pytest.mark.parametrize(
    ("spans", "expected"),
    [([], "    "), ([(0, 4)], "████"), ([(1, 2.5)], " █▄ "), ([(0.97, 1)], "▁   "), ([(0, 0.5), (3, 3.25), (3.5, 4)], "▄  ▆")],
)
def test_blocks(spans: list[tuple[float, float]], expected: str) -> None:
    assert blocks(spans, 0, 4, 4) == expected


def test_last_passes_begin_with_the_first_piece() -> None:
    events = [Event("compute", float(at), at + 0.5, label="layer 0" if at % 2 == 0 else "layer 1") for at in range(9)]
    assert last_passes(events, "layer 0", 2) == (4.0, 6.0, 8.0)
    assert last_passes(events[:4], "layer 0", 2) == (0.0, 2.0)
    assert last_passes(events[:2], "layer 0", 2) == ()


def test_picture() -> None:
    events = [Event("safetensor_pread", 0, 1), Event("compute", 1, 2), Event("compute", 3, 4), Event("layer_load", 0, 4)]
    rows = ["".join(text for text, _ in row) for row in picture(events, (0, 2, 4), 4)]
    assert rows[1:] == ["  reads   █     25%", "  compute  █ █  50%", "  stalls         0%"]
