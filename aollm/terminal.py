"""The terminal: text on stdout, and beside it, on stderr, what is said about the text and a live status below it.

Without a terminal there is no status, no colour and no control sequence. It imports nothing heavy, and refuses to know
what it shows.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

from .errors import AollmError

Row = Sequence[tuple[str, str]]
"""One line: pieces of text, each with the name of a style."""
Rows = Callable[[], Sequence[Row]]

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
INTERRUPTED = 128 + signal.SIGINT
"""The exit code after Ctrl-C."""
PERIOD_S = 0.25
SPINNER = "⠋⠙⠸⠴⠦⠇"
CONTROLS = {code: "�" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""What would let a model's answer, or the name of a file, move the cursor."""


class Terminal:
    """`with Terminal() as terminal`. All methods may be called from any thread."""

    def __init__(self, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = out or sys.stdout or open(os.devnull, "w")  # noqa: SIM115  lives as long as the process
        self._err = err or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        able = os.environ.get("TERM") != "dumb"
        self.interactive = self._out.isatty()
        self.live = able and not quiet and self._err.isatty()
        self._coloured = able and not os.environ.get("NO_COLOR")
        self._lock = threading.RLock()
        self._line_begins = True
        self._rows: Rows | None = None
        self._painted: Sequence[Row] = ()
        self._below = 0
        self._done = threading.Event()
        self._painter = threading.Thread(target=self._paint, name="aollm-terminal", daemon=True)

    def __enter__(self) -> Self:
        if self.live:
            self._painter.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        if self.live:
            self._painter.join()
        self.status(None)

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        for stream in (self._err, self._out):
            try:
                return os.get_terminal_size(stream.fileno()).columns or 80
            except (OSError, ValueError):
                continue
        return 80

    def text(self, text: str) -> None:
        """Write text to stdout as it is, at once. Raises `BrokenPipeError` when nobody reads it any more, `AollmError` when it cannot
        be written."""
        if not text:
            return
        with self._lock:
            self._erase()
            self._put(text.translate(CONTROLS) if self.interactive else text)
            if self.interactive:
                self._line_begins = text.endswith("\n")
            self._draw()

    def line(self, row: Row = ()) -> None:
        """Write one styled line to stdout."""
        with self._lock:
            self._erase()
            self._put(self._styled(row, self.interactive) + "\n")
            self._line_begins = True
            self._draw()

    def say(self, row: Row) -> None:
        """Write one styled line to stderr, unless it is to be quiet."""
        if not self.quiet:
            self._tell(row)

    def error(self, message: str) -> None:
        """Write `aollm: error: message` to stderr, as one line."""
        self._tell([("aollm: error: ", "red"), (" ".join(message.split()), "")])

    def status(self, rows: Rows | None) -> None:
        """Show what `rows` returns, again and again, below the text; nothing with None."""
        with self._lock:
            self._erase()
            self._rows, self._painted = rows, ()
            if rows is not None and self.live:
                self._painted = rows()
                self._draw()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """While modules are imported. Ctrl-C ends the process there and then: libraries swallow the exception.

        Raises `AollmError` where a package is missing.
        """

        def leave(number: int, frame: object) -> None:
            self.status(None)
            os._exit(INTERRUPTED)

        self.status(lambda: [[(f"{spinner()} ", "cyan"), ("loading", "dim")]])
        before = signal.signal(signal.SIGINT, leave)
        try:
            yield
        except ModuleNotFoundError as error:
            raise AollmError(f"{error.name} is not installed: pip install aollm; what else is missing, aollm doctor says") from error
        finally:
            signal.signal(signal.SIGINT, before)
            self.status(None)

    def _put(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())  # where what is buffered goes at the end
            raise AollmError(f"the output cannot be written: {error.strerror}") from error

    def _tell(self, row: Row) -> None:
        with self._lock:
            self._erase()
            self._err.write(("" if self._line_begins else "\n") + self._styled(row, self._err.isatty()) + "\n")
            self._err.flush()
            self._line_begins = True
            self._draw()

    def _paint(self) -> None:
        while not self._done.wait(PERIOD_S):
            rows = self._rows
            painted = rows() if rows is not None else ()  # outside the lock: tokens do not wait for figures
            with self._lock:
                if rows is None or rows is not self._rows:
                    continue
                try:
                    self._erase()
                    self._painted = painted
                    self._draw()
                except OSError:  # the terminal has gone
                    return

    def _draw(self) -> None:
        """Paint the rows below the cursor, and put it back. Index (ESC D) scrolls where there is no line below."""
        if not self._painted or not self.live:
            return
        self._below = len(self._painted) - self._line_begins
        make_room = "\x1bD" * self._below + (f"\x1b[{self._below}A" if self._below else "")
        lines = [f"\r\x1b[K{self._styled(_cut(row, self.width - 1), True)}" for row in self._painted]
        self._err.write(make_room + "\x1b7" + ("" if self._line_begins else "\x1b[B") + "\x1b[B".join(lines) + "\x1b8")
        self._err.flush()

    def _erase(self) -> None:
        """Take the rows away; they are still what is to be painted."""
        if not self._painted or not self.live:
            return
        rows = "\r\x1b[K" if self._line_begins else ""
        self._err.write("\x1b7" + rows + "\x1b[B\r\x1b[K" * self._below + "\x1b8")
        self._err.flush()

    def _styled(self, row: Row, terminal: bool) -> str:
        if not terminal:
            return "".join(text for text, _ in row).rstrip()
        plain = [(text.translate(CONTROLS), style) for text, style in row]
        return "".join(f"\x1b[{STYLES[style]}m{text}\x1b[0m" if style and self._coloured else text for text, style in plain)

    def __repr__(self) -> str:
        return f"<Terminal {self.width} wide, {'live' if self.live else 'plain'}>"


def spinner() -> str:
    """The picture of this moment of something that turns."""
    return SPINNER[int(monotonic() / PERIOD_S) % len(SPINNER)]


def _cut(row: Row, width: int) -> Row:
    """As much of a row as `width` columns hold."""
    left, kept = width, []
    for text, style in row:
        end = 0
        while end < len(text) and (cells := 2 if unicodedata.east_asian_width(text[end]) in "WF" else 1) <= left:
            left -= cells
            end += 1
        kept.append((text[:end].replace("\n", " ").replace("\t", " "), style))
        if end < len(text):
            break
    return kept
