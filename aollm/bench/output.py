"""Where a result goes: stdout, and a file besides, which is tried before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StoreError


def writable(path: Path, option: str = "output") -> None:
    """Raise `ConfigError` unless a file can be written at `path`: better now than after the run. Leaves nothing behind."""
    existed = path.exists()
    try:
        with open(path, "a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}") from None


def write(path: Path, line: str) -> None:
    """Put `line` in the file at `path`. Raises `StoreError`."""
    try:
        path.write_text(line)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; the result is on stdout") from None


def tell(result: dict[str, Any], path: Path | None) -> None:
    """Print `result` as one line, and write it to `path` too; it is printed whatever becomes of the file. Raises `StoreError`."""
    line = json.dumps(result) + "\n"
    try:
        if path is not None:
            write(path, line)
    finally:
        print(line, end="", flush=True)
