"""The journal of an export that is being written: which files are whole, so that an interrupted one goes on from there.

Lines of JSON, each behind its own checksum; the first says for which weights and which layout. What does not fit, and all
behind it, counts as not written. It refuses to know whether the files still are what they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from ..disk.folder import Folder
from .layout import RawFile
from .manifest import Summed

NAME, LIMIT = "journal", 128 << 20


class Journal:
    """The journal in `folder`, for an export of `files` from the weights that `key` stands for."""

    def __init__(self, folder: Folder, key: str, files: Sequence[RawFile]) -> None:
        self._folder = folder
        self._end = 0
        self.finished: dict[str, Summed] = {}
        """Files that are whole, by path."""
        known = {file.path: file for file in files}
        lines = [_parse(line) for line in (folder.read(NAME, LIMIT) or b"").split(b"\n")]
        self.is_new = lines[0] != {"key": key}
        if self.is_new:
            folder.remove(NAME)
            self._append({"key": key})
            return
        self._end = len(_line({"key": key}))
        for fields in lines[1:]:
            if fields is None or (summed := _summed(fields, known)) is None:
                break
            self.finished[summed.file.path] = summed
            self._end += len(_line(fields))
        folder.truncate(NAME, self._end)

    def add(self, summed: Summed) -> None:
        """One more file is whole, and durable."""
        self._append({"path": summed.file.path, "checksum": summed.checksum, "tensors": summed.tensors})
        self.finished[summed.file.path] = summed

    def _append(self, fields: Mapping[str, Any]) -> None:
        self._folder.append(NAME, self._end, line := _line(fields))
        self._folder.sync(NAME)
        self._end += len(line)


def _line(fields: Mapping[str, Any]) -> bytes:
    text = json.dumps(fields, separators=(",", ":")).encode()
    return xxhash.xxh3_64(text).hexdigest().encode() + b" " + text + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line.partition(b" ")
    if checksum != xxhash.xxh3_64(text).hexdigest().encode():
        return None
    found: dict[str, Any] = json.loads(text)  # ours: the checksum says so
    return found


def _summed(fields: Mapping[str, Any], known: Mapping[str, RawFile]) -> Summed | None:
    file = known.get(str(fields.get("path")))
    if file is None or fields.keys() != {"path", "checksum", "tensors"}:
        return None
    if not isinstance(fields["tensors"], dict) or fields["tensors"].keys() != {place.entry.name for place in file.places}:
        return None
    return Summed(file, fields["checksum"], fields["tensors"])
