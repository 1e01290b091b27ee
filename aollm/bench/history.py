"""Runs of the benchmark, kept: a payload file for each, and a log with one line for each, which is only ever appended to.

A line is JSON with its `schema`. A line cut short by a crash is passed over, and so are lines that a newer version wrote:
both stay in the file, and are told. It refuses to know what the values mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..errors import ConfigError, StoreError

SCHEMA = 1
LOG = "summary.jsonl"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One run: when it was (UTC, ISO 8601), what it is comparable with, and its values by name."""

    id: str
    time: str
    key: dict[str, Any]
    values: dict[str, dict[str, Any]]

    @property
    def digest(self) -> str:
        """Of the key: runs are comparable when it is the same."""
        return digest(self.key)


def digest(key: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of everything in `key`."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def usable(folder: Path, records: bool) -> None:
    """Raise `ConfigError` unless `folder`, or what it will be made in, is a folder and, if the run `records`, can be written.
    Leaves nothing behind."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    try:
        if not there.is_dir():
            raise NotADirectoryError(0, "it is not a folder")
        if records:
            with TemporaryDirectory(prefix=".", dir=there):
                pass
    except OSError as error:
        told = "name another one by --history-dir, or give --no-record-history" if there.is_dir() else "name a folder by --history-dir"
        raise ConfigError(f"history_dir: {there} cannot be used: {error.strerror}; {told}") from None


def load(folder: Path, say: Say) -> list[Entry]:
    """All runs in the log of `folder`, the oldest first. `say` is told of lines that are passed over.

    Raises `StoreError` for a log that is there and cannot be read.
    """
    path = folder / LOG
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            if (schema := found["schema"]) > SCHEMA:
                say(f"{path}:{number} was written by a newer version (schema {schema}; this one knows {SCHEMA}): it is left alone")
                continue
            entries.append(_entry(found))
        except (ValueError, KeyError, TypeError, AttributeError):
            cut = " (cut short at the end of the file)" if number == len(lines) else ""
            say(f"{path}:{number} is damaged{cut}: it is passed over")
    return entries


def record(folder: Path, key: dict[str, Any], values: dict[str, dict[str, Any]], payload: dict[str, Any]) -> Entry:
    """Write a run's payload, then its line; nothing of it stays when that fails. Raises `StoreError` with the system's reason."""
    now = datetime.now(UTC)
    entry = Entry(f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(3)}", now.isoformat(timespec="seconds"), key, values)
    told = {"schema": SCHEMA, "id": entry.id, "time": entry.time, "key": key, "digest": entry.digest, "values": values}
    path = folder / f"{entry.id}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps({"schema": SCHEMA, "id": entry.id, **payload}).encode() + b"\n")
        try:
            _append(folder / LOG, json.dumps({**told, "payload": path.name}).encode() + b"\n")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        _sync(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be written: {error.strerror or error}") from error
    return entry


def _entry(found: dict[str, Any]) -> Entry:
    key, values = found["key"], found["values"]
    if not isinstance(key, dict) or not all(map(_comparable, values.values())):
        raise ValueError("no run")
    return Entry(str(found["id"]), str(found["time"]), key, values)


def _comparable(value: dict[str, Any]) -> bool:
    """Whether a value can be held against another one; `KeyError` where something is missing."""
    speed = value["drive_bytes_per_second"]
    numbers = (value["seconds"], value["yardstick_seconds"], *([] if speed is None else [speed]))
    return isinstance(value["yardstick"], str) and all(type(number) in (int, float) and 0 < number < inf for number in numbers)


def _write(path: Path, data: bytes) -> None:
    """Write a whole file or none: beside it first, then under its name."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _append(path: Path, line: bytes) -> None:
    """Add a line to the end, on a line of its own; a line that does not fit is taken back. One process at a time."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        end = os.fstat(fd).st_size
        torn = end and os.pread(fd, 1, end - 1) != b"\n"
        left = memoryview((b"\n" if torn else b"") + line)
        try:
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        except OSError:
            os.ftruncate(fd, end)
            raise
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
