"""The layout of an export: which tensor lies in which raw file, and where.

Judged by names alone, so it is the same for all families: a file for each expert, one for the rest of each layer, one for
all else. In a layer the order is that of need. It reads and writes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..buffers import PAGE, pages
from ..disk.base import Extent
from ..errors import ModelError
from ..tensors import MAX_TENSORS, Checkpoint, TensorEntry

SMALL, LINE = 64 << 10, 64
"""Tensors below `SMALL` bytes begin on a cache line, others on a page."""
BLOCK = 8 << 20
"""Bytes that are read, summed and written at a time."""
REST = "rest.raw"
LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,6})\.", re.ASCII)
EXPERT = re.compile(r"\.experts\.(\d{1,6})\.", re.ASCII)
FUSED = re.compile(r"\.experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj)(?:_blocks|_scales|\.weight)?")
"""All experts' matrices in one tensor; their biases are small, and stay whole in the layer's file."""
ROW = re.compile(r"(.+)\[(?:0|[1-9]\d{0,5})\]", re.ASCII)
STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""What is read as one, in this order."""
STACKED = {part: (stack[0], number) for stack in STACKS for number, part in enumerate(stack)}


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor, as it is elsewhere or here, and the offset in its raw file."""

    entry: TensorEntry
    offset: int

    @property
    def end(self) -> int:
        """The offset just past its last byte."""
        return self.offset + self.entry.extent.nbytes


@dataclass(frozen=True, slots=True)
class RawFile:
    """One file of an export: its path in it, its size in whole pages, and what it holds, by offset."""

    path: str
    nbytes: int
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one tensor that are in a block: where they come from, and where in the block they are."""

    tensor: str
    extent: Extent
    at: int


@dataclass(frozen=True, slots=True)
class Block:
    """`nbytes` of a raw file from `offset`, whole pages; what no part covers is zero."""

    file: RawFile
    offset: int
    nbytes: int
    parts: tuple[Part, ...]

    @property
    def is_last(self) -> bool:
        """Whether the file ends with it."""
        return self.offset + self.nbytes == self.file.nbytes


def lay_out(checkpoint: Checkpoint) -> tuple[RawFile, ...]:
    """The files of an export of `checkpoint`, layer by layer. Raises `ModelError` when it would hold too many tensors."""
    homes: dict[str, list[TensorEntry]] = {}
    for entry in sorted(checkpoint.tensors.values(), key=lambda entry: (os.path.basename(entry.extent.file), entry.extent.offset)):
        for path, part in _homes(checkpoint, entry):
            homes.setdefault(path, []).append(part)
    if (count := sum(map(len, homes.values()))) > MAX_TENSORS:
        raise ModelError(f"{checkpoint.folder}: an export would hold {count} tensors, more than {MAX_TENSORS}; use the published files")
    return tuple(_raw_file(path, entries) for path, entries in sorted(homes.items()))


def blocks(file: RawFile) -> Iterator[Block]:
    """The whole file, cut."""
    for begin in range(0, file.nbytes, BLOCK):
        end = min(begin + BLOCK, file.nbytes)
        parts = []
        for place in file.places:
            low, high = max(begin, place.offset), min(end, place.end)
            if low < high:
                source = place.entry.extent
                parts.append(Part(place.entry.name, Extent(source.file, source.offset + low - place.offset, high - low), low - begin))
        yield Block(file, begin, end - begin, tuple(parts))


def _homes(checkpoint: Checkpoint, entry: TensorEntry) -> Iterator[tuple[str, TensorEntry]]:
    layer = LAYER.search(entry.name)
    if layer is None:
        yield REST, entry
        return
    folder = f"layer-{int(layer[1]):04}"
    fused = FUSED.search(entry.name)
    if fused is not None and fused.end() == len(entry.name) and len(entry.shape) > 1 and 0 < entry.shape[0] < 1_000_000:
        for index in range(entry.shape[0]):
            yield f"{folder}/expert-{index:04}.raw", checkpoint.row(entry.name, index)
    elif (expert := EXPERT.search(entry.name)) is not None:
        yield f"{folder}/expert-{int(expert[1]):04}.raw", entry
    else:
        yield f"{folder}/dense.raw", entry


def _raw_file(path: str, entries: Sequence[TensorEntry]) -> RawFile:
    at, places = 0, []
    for entry, is_small in _in_order(entries, by_need=path != REST):
        unit = LINE if is_small else PAGE
        at = -(-at // unit) * unit
        places.append(Place(entry, at))
        at += entry.extent.nbytes
    return RawFile(path, max(pages(at), PAGE), tuple(places))


def _in_order(entries: Sequence[TensorEntry], by_need: bool) -> list[tuple[TensorEntry, bool]]:
    """The order in the source, but stacks together, and in a layer by need: what attends, what follows, the way down.

    With each, whether it and all that it is stacked with are small.
    """
    firsts: dict[str, int] = {}
    largest: dict[str, int] = {}
    stacks = [_stack(entry.name) for entry in entries]
    for number, (entry, (stack, _)) in enumerate(zip(entries, stacks)):
        firsts.setdefault(stack, number)
        largest[stack] = max(largest.get(stack, 0), entry.extent.nbytes)
    found = []
    for number, (entry, (stack, index)) in enumerate(zip(entries, stacks)):
        is_small = largest[stack] < SMALL
        turn = (_turn(entry.name), not is_small) if by_need else ()
        found.append((turn, firsts[stack], index, number, entry, is_small))
    return [(entry, is_small) for *_, entry, is_small in sorted(found, key=lambda one: one[:4])]


def _stack(name: str) -> tuple[str, int]:
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part in STACKED:
            head, index = STACKED[part]
            return ".".join((*parts[:at], head, *parts[at + 1 :])), index
    return name, 0


def _turn(name: str) -> int:
    if "attn" in name or "input_layernorm" in name:
        return 0
    return 2 if any(part == "w2" or part.startswith("down_proj") for part in name.split(".")) else 1


def row_of(name: str) -> str | None:
    """The tensor that `name` is a row of, None if it is whole."""
    return found[1] if (found := ROW.fullmatch(name)) else None
