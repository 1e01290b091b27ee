"""The one record header: what a stored block is, where it belongs, and whether its bytes are still those that were stored.

A record is a page with its header, then its payload in whole pages, so that both ends can be read and written past the
page cache. The checksums cover identity, position, generation and payload: a whole block in the wrong place, of another
model or of an earlier lap is as wrong as a torn one. All-zero bytes are never valid.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from ..buffers import PAGE, pages
from ..disk.base import Extent
from ..errors import StoreError

MAGIC = b"aoKV"
VERSION = 1
HEADER = struct.Struct("<4sHBB16s16sQQiIIIQ24sQQ")
"""magic, version, kind, 0, identity, block, generation, sequence, layer, index, rows, 0, payload bytes, codec's own, both checksums"""
HEADER_NBYTES = HEADER.size  # 120


class DamageError(StoreError):
    """What is stored is not what was stored."""


class Kind(IntEnum):
    """What a record holds; 0 is left to bytes that were never written."""

    HEAD = 1
    COMMIT = 2
    DROP = 3
    MARK = 4
    KV = 5
    STATE = 6


@dataclass(frozen=True, slots=True)
class Header:
    """What a record says of itself. `identity`: of model, tokenizer and format. `block`: digest of all tokens up to the
    block's end. `generation`: of the volume. `sequence`: never given twice in a volume. `extra`: at most 24 bytes of the codec's."""

    kind: Kind
    identity: bytes
    block: bytes
    generation: int
    sequence: int
    layer: int = -1
    index: int = 0
    rows: int = 0
    nbytes: int = 0
    extra: bytes = b""

    def pack(self, payload_sum: int) -> bytes:
        """The header's `HEADER_NBYTES` bytes."""
        front = HEADER.pack(
            MAGIC, VERSION, self.kind, 0, self.identity, self.block, self.generation, self.sequence, self.layer, self.index, self.rows,
            0, self.nbytes, self.extra.ljust(24, b"\0"), payload_sum, 0,
        )[:-8]  # fmt: skip
        return front + xxhash.xxh3_64_intdigest(front).to_bytes(8, "little")


@dataclass(frozen=True, slots=True)
class Place:
    """A stored record: the header that has to be found there, and its whole pages (`extent.file` is an absolute path)."""

    header: Header
    extent: Extent


def record_nbytes(payload_nbytes: int) -> int:
    """Bytes of a record on disk: a page for the header, and the payload's whole pages."""
    return PAGE + pages(payload_nbytes)


def payload_sum(parts: Iterable[bytes | memoryview]) -> int:
    """The checksum of a payload that lies in several parts."""
    total = xxhash.xxh3_64()
    for part in parts:
        total.update(part)
    return total.intdigest()


def unpack(page: bytes | memoryview) -> tuple[Header, int]:
    """The header at the start of `page` and its payload's checksum; `StoreError` says what is wrong with it."""
    raw = bytes(page[:HEADER_NBYTES])
    if len(raw) < HEADER_NBYTES:
        raise DamageError("checksum: a header is cut short")
    if raw[:4] != MAGIC:
        raise DamageError("checksum: no record begins here")
    if int.from_bytes(raw[-8:], "little") != xxhash.xxh3_64_intdigest(raw[:-8]):
        raise DamageError("checksum: a header was damaged")
    _, version, kind, _, identity, block, generation, sequence, layer, index, rows, _, nbytes, extra, check, _ = HEADER.unpack(raw)
    if version > VERSION:
        raise StoreError(f"newer version: this record has format version {version}, this program knows up to {VERSION}")
    try:
        known = Kind(kind)
    except ValueError:
        raise DamageError(f"checksum: a record of unknown kind {kind}") from None
    return Header(known, identity, block, generation, sequence, layer, index, rows, nbytes, extra), check


def verify(page: bytes | memoryview, payload: Iterable[bytes | memoryview], wanted: Header) -> Header:
    """The header as stored, if it is `wanted` (but for `extra`) and its payload is whole; else `StoreError`."""
    found, check = unpack(page)
    for name in ("kind", "identity", "block", "generation", "sequence", "layer", "index", "rows", "nbytes"):
        if getattr(found, name) != getattr(wanted, name):
            raise DamageError(f"checksum: another record is in its place ({name} {getattr(found, name)!r}, not {getattr(wanted, name)!r})")
    if payload_sum(payload) != check:
        raise DamageError("checksum: a payload was damaged")
    return found
