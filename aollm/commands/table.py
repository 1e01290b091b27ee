"""A table: rows below the one that names the columns."""

from __future__ import annotations

from collections.abc import Sequence

from ..terminal import Terminal


def print_table(terminal: Terminal, rows: Sequence[tuple[str, ...]]) -> None:
    """Rows below the first, which names the columns; numbers to the right, the last column as long as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        cells = [
            text.rjust(width) if rows[-1][column][:1].isdigit() and column > 1 else text.ljust(width)
            for column, (text, width) in enumerate(zip(row[:-1], widths, strict=False))
        ]
        terminal.line([("  ".join(cells) + "  ", "" if number else "dim"), (row[-1], "yellow")])
