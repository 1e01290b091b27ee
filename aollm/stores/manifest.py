"""The manifest: a volume's log of which blocks are stored, as records that follow each other without gaps.

A HEAD says what the volume is; then come COMMIT (a block and where its records lie), DROP and MARK. A record that is
torn at the end is cut; one that is damaged with good ones behind it is told apart. Bytes in, nodes out: it refuses to
know files.
"""

from __future__ import annotations

import os.path
import re
import struct
from dataclasses import dataclass, field
from typing import Literal

from ..buffers import PAGE
from ..disk.base import Extent
from ..errors import StoreError
from .identity import Identity, canonical, strict_json, texts
from .node import DIGEST_NBYTES, ID_NBYTES, Node, digest
from .record import HEADER_NBYTES, MAGIC, Header, Kind, Place, payload_sum, record_nbytes, unpack

VERSION = 1
MAX_PAYLOAD = 4 << 20
MAX_ROWS = 1 << 16
END = 1 << 63
FRONT = struct.Struct("<16sQd?HHH")
"""Of a COMMIT: parent, used, stored at, pinned, then how many file names, places and states."""
PLACE = struct.Struct("<HiIIQQQ")
"""Which file name, layer, rows, pages, offset, sequence, payload bytes."""
USE = struct.Struct("<Q?")
"""A MARK: used, pinned."""
FILE_NAME = re.compile(rb"\w[\w.\-]{0,199}", re.ASCII)
RESERVED = (b"manifest", b"LOCK")


@dataclass(frozen=True, slots=True)
class Head:
    """What all records of a volume share: its folder and identity, the epoch `generation`, and the shape of what it holds."""

    folder: str
    identity: Identity
    generation: int
    format: str
    block_tokens: int
    layers: int

    def begin(self, sequence: int) -> bytes:
        """The record that every manifest begins with."""
        told = {"version": VERSION, "format": self.format, "block_tokens": self.block_tokens, "layers": self.layers}
        return self._record(Kind.HEAD, bytes(DIGEST_NBYTES), sequence, canonical({**told, "identity": dict(self.identity.parts)}))

    def commit(self, node: Node, sequence: int) -> bytes:
        """`node` is stored; `ValueError` for one whose records do not belong to this volume and to it."""
        names: dict[str, int] = {}
        parts = [self._place(node, place, Kind.KV, names) for place in node.places]
        parts += [self._place(node, place, Kind.STATE, names) for place in node.states]
        front = FRONT.pack(node.parent, node.used, node.stored_at, node.pinned, len(names), len(node.places), len(node.states))
        texts = [len(raw := name.encode("ascii")).to_bytes(1, "little") + raw for name in names]
        record = self._record(Kind.COMMIT, node.digest, sequence, b"".join((front, *texts, node.ids, *parts)), node.index, node.rows)
        try:
            _node(self, *_record(record, 0))  # what could not be read again would end the manifest
        except StoreError as error:
            raise ValueError(f"{node!r} cannot be written down: {error}") from error
        return record

    def drop(self, digest: bytes, sequence: int) -> bytes:
        """The block is not stored any more."""
        return self._record(Kind.DROP, digest, sequence, b"")

    def mark(self, digest: bytes, used: int, pinned: bool, sequence: int) -> bytes:
        """The block was used, pinned or unpinned."""
        return self._record(Kind.MARK, digest, sequence, USE.pack(used, pinned))

    def _record(self, kind: Kind, block: bytes, sequence: int, payload: bytes, index: int = 0, rows: int = 0) -> bytes:
        header = Header(kind, self.identity.digest, block, self.generation, sequence, -1, index, rows, len(payload))
        return header.pack(payload_sum([payload])) + payload

    def _place(self, node: Node, place: Place, kind: Kind, names: dict[str, int]) -> bytes:
        header, extent = place.header, place.extent
        folder, name = os.path.split(extent.file)
        belongs = header.identity == self.identity.digest and header.generation == self.generation and header.kind == kind
        if not belongs or folder != self.folder or header.block != node.digest or header.index != node.index:
            raise ValueError(f"{place} is not a record of {node!r} in {self.folder}")
        pages = extent.nbytes // PAGE
        file = names.setdefault(name, len(names))
        return PLACE.pack(file, header.layer, header.rows, pages, extent.offset, header.sequence, header.nbytes)


@dataclass(slots=True)
class Parsed:
    """What a manifest says: its live nodes in order, how many of its bytes are good, and what is wrong with the rest.

    `tail`: what follows was never finished. `middle`: good records follow the damage. `last` is the sequence of the last
    record, `sequence` the highest that was seen anywhere.
    """

    head: Head | None = None
    nodes: dict[bytes, Node] = field(default_factory=dict)
    records: int = 0
    good_nbytes: int = 0
    last: int = -1
    sequence: int = 0
    damage: Literal["tail", "middle"] | None = None


def parse(data: bytes, folder: str, identity: bytes | None = None) -> Parsed:
    """Read the manifest `data` of the volume in `folder`; with `identity`, one of another identity is damage.

    Raises `StoreError` for a newer version, and nothing else.
    """
    parsed = Parsed()
    while parsed.good_nbytes < len(data):
        try:
            header, payload = _record(data, parsed.good_nbytes)
            _apply(parsed, header, payload, folder, identity)
        except StoreError as error:
            if str(error).startswith("newer version"):
                raise StoreError(f"{folder}: {error}; update aollm, or purge the cache") from error
            parsed.damage = "middle" if _follows(data, parsed) else "tail"
            break
        parsed.records += 1
        parsed.good_nbytes += HEADER_NBYTES + header.nbytes
    return parsed


def _record(data: bytes, at: int) -> tuple[Header, bytes]:
    header, check = unpack(data[at : at + HEADER_NBYTES])
    start = at + HEADER_NBYTES
    if header.nbytes > min(MAX_PAYLOAD, len(data) - start):
        raise StoreError("checksum: a record is cut short")
    payload = data[start : start + header.nbytes]
    if payload_sum([payload]) != check:
        raise StoreError("checksum: a payload was damaged")
    return header, payload


def _follows(data: bytes, parsed: Parsed) -> bool:
    """Whether a good record of the same volume begins past the damage; its sequence counts as seen."""
    at, found = parsed.good_nbytes, False
    while (at := data.find(MAGIC, at + 1)) >= 0:
        try:
            header, _ = _record(data, at)
        except StoreError as error:
            if str(error).startswith("newer version"):
                raise StoreError(f"{parsed.head.folder if parsed.head else 'a manifest'}: {error}; update aollm") from error
            continue
        if parsed.head is None or header.generation == parsed.head.generation:
            parsed.sequence = max(parsed.sequence, header.sequence)
            found = True
    return found


def _apply(parsed: Parsed, header: Header, payload: bytes, folder: str, identity: bytes | None) -> None:
    if parsed.head is None:
        parsed.head = _head(header, payload, folder, identity)
    elif (header.identity, header.generation) != (parsed.head.identity.digest, parsed.head.generation):
        raise StoreError("checksum: a record of another volume")
    elif not parsed.last < header.sequence < END:
        raise StoreError("checksum: a record is there a second time")
    elif header.kind == Kind.COMMIT:
        node = parsed.nodes[header.block] = _node(parsed.head, header, payload)
        parsed.sequence = max(parsed.sequence, node.used, *(place.header.sequence for place in (*node.places, *node.states)))
    elif header.kind == Kind.DROP and not payload:
        parsed.nodes.pop(header.block, None)
    elif header.kind == Kind.MARK and len(payload) == USE.size and (use := USE.unpack(payload))[0] < END:
        parsed.sequence = max(parsed.sequence, use[0])
        if (marked := parsed.nodes.get(header.block)) is not None:
            marked.used, marked.pinned = use
    else:
        raise StoreError("checksum: a record that a manifest does not have")
    parsed.last = header.sequence
    parsed.sequence = max(parsed.sequence, header.sequence)


def _head(header: Header, payload: bytes, folder: str, identity: bytes | None) -> Head:
    if header.kind != Kind.HEAD:
        raise StoreError("checksum: a manifest without its head")
    told = strict_json(payload)
    version, format, block_tokens, layers = (told.get(name) for name in ("version", "format", "block_tokens", "layers"))
    if isinstance(version, int) and version > VERSION:
        raise StoreError(f"newer version: this manifest has version {version}, this program knows up to {VERSION}")
    if version != VERSION or not isinstance(format, str) or type(block_tokens) is not int or type(layers) is not int:
        raise StoreError("checksum: a head of another shape")
    found = Identity(texts(told.get("identity")))
    if found.digest != header.identity or identity not in (None, header.identity) or not 0 < block_tokens <= MAX_ROWS or layers < 0:
        raise StoreError("checksum: a head of another identity")
    return Head(folder, found, header.generation, format, block_tokens, layers)


def _node(head: Head, header: Header, payload: bytes) -> Node:
    """The node that a COMMIT tells of, every length checked against the payload's before it is used."""
    wrong = StoreError("checksum: a commit of another shape")
    if not 0 < header.rows <= head.block_tokens or len(payload) < FRONT.size:
        raise wrong
    parent, used, stored_at, pinned, files, places, states = FRONT.unpack_from(payload)
    at, names = FRONT.size, []
    for _ in range(files):
        end = at + 1 + (payload[at] if at < len(payload) else 0)
        if not FILE_NAME.fullmatch(name := payload[at + 1 : end]) or name.startswith(RESERVED):
            raise wrong
        names.append(os.path.join(head.folder, name.decode("ascii")))
        at = end
    ids = payload[at : at + header.rows * ID_NBYTES]
    at += header.rows * ID_NBYTES
    if len(payload) - at != (places + states) * PLACE.size or digest(parent, ids) != header.block or used >= END:
        raise wrong
    node = Node(header.block, parent, header.index, ids, (), (), used, stored_at, pinned)
    rows = enumerate(PLACE.iter_unpack(payload[at:]))
    found = [_place(head, node, row, names, Kind.KV if number < places else Kind.STATE) for number, row in rows]
    node.places, node.states = tuple(found[:places]), tuple(found[places:])
    return node


def _place(head: Head, node: Node, row: tuple[int, ...], names: list[str], kind: Kind) -> Place:
    file, layer, rows, pages, offset, sequence, nbytes = row
    whole = record_nbytes(nbytes) <= pages * PAGE and not offset % PAGE and offset + pages * PAGE <= END
    if file >= len(names) or not whole or sequence >= END:
        raise StoreError("checksum: a place of another shape")
    header = Header(kind, head.identity.digest, node.digest, head.generation, sequence, layer, node.index, rows, nbytes)
    return Place(header, Extent(names[file], offset, pages * PAGE))
