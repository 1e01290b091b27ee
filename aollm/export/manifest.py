"""The manifest of an export: its files, their tensors and the checksums of both, as JSON and back.

It comes from strangers, so nothing is believed before sizes, places and names agree with each other and with the format;
no name leads out of the folder. It refuses to know whether the files are there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import xxhash

from ..buffers import PAGE
from ..disk.base import Extent
from ..errors import CheckpointError
from ..tensors import AGAIN, MAX_TENSORS, PICKLES, TENSOR_NAME, TensorEntry, check_tensor, parse_json
from .layout import LINE, SMALL, Place, RawFile, row_of

FORMAT, VERSION = "aollm-gds-export", 1
NAME, LIMIT = "manifest.json", 64 << 20
FILE_PATH = re.compile(r"rest\.raw|layer-\d{4,6}/(?:dense|expert-\d{4,6})\.raw", re.ASCII)
CHECKSUM = re.compile(r"[0-9a-f]{32}")
FINGERPRINT = re.compile(r"[0-9a-f]{64}")
MAX_NBYTES = 1 << 50


@dataclass(frozen=True, slots=True)
class Summed:
    """A raw file with the checksums of all its bytes and of each tensor's."""

    file: RawFile
    checksum: str
    tensors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an export holds, and the fingerprint of the weights that it was made from."""

    source: str
    files: tuple[Summed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all its files."""
        return sum(summed.file.nbytes for summed in self.files)


def write_manifest(manifest: Manifest) -> bytes:
    """The text that `parse_manifest` takes."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "source": manifest.source,
        "files": {summed.file.path: {"nbytes": summed.file.nbytes, "checksum": summed.checksum} for summed in manifest.files},
        "tensors": {name: fields for summed in manifest.files for name, fields in describe(summed).items()},
    }
    return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1).encode() + b"\n"


def describe(summed: Summed) -> dict[str, dict[str, Any]]:
    """The tensors of one file, as the manifest lists them."""
    return {
        place.entry.name: {
            "dtype": place.entry.dtype, "shape": list(place.entry.shape), "file": summed.file.path, "offset": place.offset,
            "nbytes": place.entry.extent.nbytes, "checksum": summed.tensors[place.entry.name],
        }
        for place in summed.file.places
    }  # fmt: skip


def parse_manifest(data: bytes, folder: Path) -> Manifest:
    """The manifest of the export in `folder`; its tensors' extents are in the raw files there.

    Raises `CheckpointError`, and nothing else, for all that `write_manifest` would not have written.
    """
    try:
        fields = parse_json(data)
        if fields.get("format") != FORMAT:
            raise ValueError(f"its format is {short(fields.get('format'))}, not {FORMAT}")
        if fields.get("version") != VERSION or fields["version"] is True:
            raise CheckpointError(
                f"{folder / NAME} has version {short(fields.get('version'))}, and this program knows {VERSION}; "
                "export the model again: aollm export MODEL --force"
            )
        own = fields.pop("checksum", None)
        if fields.keys() != {"format", "version", "source", "files", "tensors"}:
            raise ValueError("it does not consist of format, version, source, files, tensors and checksum")
        if own != _checksum(fields):
            raise ValueError("it does not have the checksum that it says: it was altered, or cut")
        return Manifest(_text(fields["source"], FINGERPRINT, "source"), _files(fields["files"], fields["tensors"], folder))
    except ValueError as error:
        raise CheckpointError(f"{folder / NAME}: {error}; {AGAIN}, or make the export again: aollm export MODEL --force") from error


def _files(files: object, tensors: object, folder: Path) -> tuple[Summed, ...]:
    if not isinstance(files, dict) or not isinstance(tensors, dict) or not files:
        raise ValueError("files and tensors do not map names to descriptions")
    if max(len(files), len(tensors)) > MAX_TENSORS:
        raise ValueError(f"it lists {len(files)} files and {len(tensors)} tensors, more than {MAX_TENSORS}")
    sizes = {path: _file(path, fields) for path, fields in files.items()}
    held: dict[str, list[tuple[Place, str]]] = {path: [] for path in files}
    for name, fields in tensors.items():
        path, place, checksum = _tensor(name, fields, folder)
        if path not in held:
            raise ValueError(f"tensor {name} is in {path}, which is not among its files")
        held[path].append((place, checksum))
    if twice := [name for name in tensors if row_of(name) in tensors]:
        raise ValueError(f"tensor {row_of(twice[0])} is listed whole and by rows")
    return tuple(_summed(path, *sizes[path], held[path]) for path in sorted(files))


def _file(path: str, fields: object) -> tuple[int, str]:
    if path.endswith(PICKLES):
        raise ValueError(f"it names {short(path)}: pickles can run code when loaded, and are refused")
    if not FILE_PATH.fullmatch(path):
        raise ValueError(f"it names {short(path)}, which is not the path of a file in an export")
    if not isinstance(fields, dict) or fields.keys() != {"nbytes", "checksum"}:
        raise ValueError(f"{path} is not described by nbytes and checksum alone")
    nbytes = _number(fields["nbytes"], f"{path}: nbytes", PAGE)
    if not nbytes:
        raise ValueError(f"{path} has no bytes")
    return nbytes, _text(fields["checksum"], CHECKSUM, f"{path}: checksum")


def _tensor(name: str, fields: object, folder: Path) -> tuple[str, Place, str]:
    if not TENSOR_NAME.fullmatch(row_of(name) or name):
        raise ValueError(f"{short(name)} cannot be the name of a tensor")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "file", "offset", "nbytes", "checksum"}:
        raise ValueError(f"tensor {name} is not described by dtype, shape, file, offset, nbytes and checksum alone")
    path = fields["file"]
    if not isinstance(path, str):
        raise ValueError(f"tensor {name} is in file {short(path)}")
    dtype, shape, nbytes = check_tensor(name, fields["dtype"], fields["shape"], str(folder / NAME))
    if _number(fields["nbytes"], f"tensor {name}: nbytes") != nbytes:
        raise ValueError(f"tensor {name} has shape {list(shape)} of {dtype}, {nbytes} bytes, but says {fields['nbytes']}")
    offset = _number(fields["offset"], f"tensor {name}: offset", LINE if nbytes < SMALL else PAGE)
    entry = TensorEntry(name, dtype, shape, Extent(str(folder / path), offset, nbytes))
    return path, Place(entry, offset), _text(fields["checksum"], CHECKSUM, f"tensor {name}: checksum")


def _summed(path: str, nbytes: int, checksum: str, held: Sequence[tuple[Place, str]]) -> Summed:
    places = sorted((place for place, _ in held), key=lambda place: (place.offset, place.end))
    at = 0
    for place in places:
        if place.offset < at:
            raise ValueError(f"tensor {place.entry.name}, at byte {place.offset} of {path}, overlaps the one before it, which ends at {at}")
        at = place.end
    if at > nbytes:
        raise ValueError(f"tensor {places[-1].entry.name} ends at byte {at} of {path}, which has {nbytes}")
    return Summed(RawFile(path, nbytes, tuple(places)), checksum, {place.entry.name: value for place, value in held})


def _number(value: object, what: str, unit: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_NBYTES or value % unit:
        raise ValueError(f"{what} is {short(value)}, not a whole number{f' of {unit} bytes' if unit > 1 else ''}, or too large")
    return value


def _text(value: object, form: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise ValueError(f"{what} is {short(value)}, not what it should look like")
    return value


def _checksum(fields: Mapping[str, Any]) -> str:
    try:
        return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
