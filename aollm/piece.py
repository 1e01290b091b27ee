"""Pieces: what of a model is read, moved and computed with at a time.

A piece is what one step runs on, or a block of the head's rows. Its tensors are views of the memory that the drive read
into: stacked tensors lie one behind the other, and each lands where file offset and address agree modulo the disk's
alignment, so that nothing is copied on the way. It refuses to know when pieces are read, and where they are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from .buffers import PAGE, Arena, pages
from .checkpoint import Checkpoint, TensorEntry
from .device import Memory
from .disk.base import Disk, Extent, Priority
from .errors import CheckpointError, ModelError, SpecializationError
from .families.base import Family, Need, Params, Step
from .trace import Event, EventName, Trace

LINE = 64
"""Bytes of a cache line."""
DTYPES: dict[str, torch.dtype] = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class Param:
    """Where a parameter lies in its piece's memory, as what it is stored, and as what it is computed with."""

    offset: int
    stored: torch.dtype
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of reading: `nbytes` of memory, filled by `reads`, seen as `params`."""

    label: str
    layer: int
    nbytes: int
    reads: tuple[tuple[Extent, int], ...]
    params: Mapping[str, Param]
    step: Step | None
    """The step that runs on it; None for a block of the head."""
    first_row: int = 0
    """The first vocabulary row of a block of the head."""

    @property
    def read_nbytes(self) -> int:
        """Bytes that come from the drive."""
        return sum(extent.nbytes for extent, _ in self.reads)


def pieces_of(family: Family, checkpoint: Checkpoint) -> tuple[Piece, ...]:
    """All pieces of a pass in running order: the steps of each layer, then the head in blocks of rows.

    Raises `CheckpointError` for a tensor that is missing or has another shape than `config.json` says.
    """
    steps = [step_piece(step, checkpoint, family.dtype) for step in family.steps]
    most = max(piece.read_nbytes for piece in steps)
    table = checkpoint[family.head]
    check_shape(table, (family.vocabulary, family.hidden))
    row = table.extent.nbytes // family.vocabulary
    blocks = max(1, -(-table.extent.nbytes // most))
    rows = -(-family.vocabulary // blocks)
    heads = [
        _head_piece(table, first, min(rows, family.vocabulary - first), row, family.hidden) for first in range(0, family.vocabulary, rows)
    ]
    return (*steps, *heads)


def step_piece(step: Step, checkpoint: Checkpoint, dtype: torch.dtype) -> Piece:
    """The layout of one step's weights, those of its experts left out."""
    return _piece(f"layer {step.layer} {step.name}" if step.layer >= 0 else step.name, step, step.params, checkpoint, dtype)


def expert_pieces(family: Family, checkpoint: Checkpoint) -> dict[tuple[int, int], Piece]:
    """The experts of all layers, by layer and number; one read each where their tensors lie side by side."""
    return {
        (step.layer, number): _piece(f"layer {step.layer} expert {number}", step, step.experts.params(number), checkpoint, family.dtype)
        for step in family.steps
        if step.experts is not None
        for number in range(step.experts.count)
    }


def views(piece: Piece, memory: Arena | Memory, at: int) -> Params:
    """The parameters of a piece whose bytes are at offset `at`."""
    return Params(
        {name: memory.tensor(at + param.offset, param.stored, param.shape).to(param.dtype) for name, param in piece.params.items()}
    )


def _piece(label: str, step: Step, needs: Mapping[str, Need], checkpoint: Checkpoint, dtype: torch.dtype) -> Piece:
    groups = [(name, need, [_entry(checkpoint, tensor, need) for tensor in need.tensors]) for name, need in needs.items()]
    params: dict[str, Param] = {}
    reads: list[tuple[Extent, int]] = []
    end = 0
    for name, need, entries in sorted(groups, key=lambda group: (group[2][0].extent.file, group[2][0].extent.offset)):
        offset = _aligned(end, entries[0].extent, reads[-1] if reads else None)
        params[name] = Param(offset, _stacked_dtype(entries, need, dtype), need.shape, need.dtype or dtype)
        for entry in entries:
            _append(reads, entry.extent, offset)
            offset += entry.extent.nbytes
        end = offset
    return Piece(label, step.layer, pages(end), tuple(reads), params, step)


def _entry(checkpoint: Checkpoint, tensor: str, need: Need) -> TensorEntry:
    return checkpoint[tensor] if need.row is None else checkpoint.row(tensor, need.row)


def pinned_nbytes(piece: Piece) -> int:
    """Bytes of memory that a piece takes when it is moved by less than a cache line."""
    return pages(piece.nbytes + LINE)


def shift_of(piece: Piece) -> int:
    """By how much a piece is moved, so that its largest parameter begins with a cache line."""
    largest = max(piece.params.values(), key=lambda param: math.prod(param.shape))
    return -largest.offset % LINE


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """The torch dtype of a tensor; `SpecializationError` for other kinds of floating-point numbers, `ModelError` for what is none."""
    if entry.dtype not in DTYPES:
        error = SpecializationError if entry.dtype.startswith("F") else ModelError
        raise error(f"{entry.name} is stored as {entry.dtype}; weights of {', '.join(DTYPES)} can be streamed")
    return DTYPES[entry.dtype]


def check_shape(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    """Raise `CheckpointError` unless `entry` has `shape`."""
    if entry.shape != shape:
        raise CheckpointError(
            f"{entry.name} has shape {list(entry.shape)}, config.json asks for {list(shape)}; the two belong to different models"
        )


async def read_piece(
    piece: Piece, arena: Arena, at: int, event: EventName | None, disk: Disk, trace: Trace, priority: Priority = Priority.SOON
) -> None:  # fmt: skip
    """Read a piece to offset `at` of `arena`; `event` is what else than a read it is noted as."""
    start = perf_counter()
    extents = [extent for extent, _ in piece.reads]
    buffers = [arena.bytes[at + offset : at + offset + extent.nbytes] for extent, offset in piece.reads]
    span = await disk.read_into(extents, buffers, priority)
    nbytes = piece.read_nbytes
    trace.add(Event("safetensor_pread", span.start, span.end, piece.layer, nbytes=nbytes, path="safetensor-io", label=piece.label))
    if event is not None:
        trace.add(Event(event, start, perf_counter(), piece.layer, nbytes=nbytes, label=piece.label))


def _head_piece(table: TensorEntry, first: int, rows: int, row_nbytes: int, hidden: int) -> Piece:
    extent = Extent(table.extent.file, table.extent.offset + first * row_nbytes, rows * row_nbytes)
    offset = _aligned(0, extent, None)
    param = Param(offset, dtype_of(table), (rows, hidden), dtype_of(table))
    return Piece(f"head from row {first}", -1, pages(offset + extent.nbytes), ((extent, offset),), {"head": param}, None, first)


def _stacked_dtype(entries: Sequence[TensorEntry], need: Need, dtype: torch.dtype) -> torch.dtype:
    """The dtype that all of a parameter's tensors are stored as: the model's, but for norms, biases and what a family names a
    dtype for, which are converted on arrival."""
    first, found = entries[0], dtype_of(entries[0])
    if sum(entry.shape[0] for entry in entries if entry.shape) != need.shape[0] or any(
        entry.shape[1:] != need.shape[1:] for entry in entries
    ):
        names = " + ".join(f"{entry.name} {list(entry.shape)}" for entry in entries)
        raise CheckpointError(f"{names} do not make up {list(need.shape)}, which config.json asks for; the two belong to different models")
    if (found == torch.uint8) != (need.dtype == torch.uint8):
        raise ModelError(f"{first.name} is stored as {first.dtype}, which is not what config.json says of its quantization")
    mixed = any(entry.dtype != first.dtype for entry in entries)
    if mixed or (found != dtype and len(need.shape) > 1 and need.dtype is None):
        raise SpecializationError(
            f"{first.name} is stored as {first.dtype} where others are not; weights of mixed dtypes are not supported"
        )
    return found


def _aligned(end: int, extent: Extent, before: tuple[Extent, int] | None) -> int:
    """The first address from `end` on at which `extent` can be read in place; right behind `before` if it follows it in the file."""
    if before is not None and before[0].file == extent.file and before[0].end == extent.offset:
        return before[1] + before[0].nbytes
    residue = extent.offset % PAGE
    return pages(end) + (residue if residue % 8 == 0 else 0)


def _append(reads: list[tuple[Extent, int]], extent: Extent, offset: int) -> None:
    """Add a read, joined to the one before it where both follow each other in file and memory."""
    if reads:
        last, at = reads[-1]
        if last.file == extent.file and last.end == extent.offset and at + last.nbytes == offset:
            reads[-1] = Extent(last.file, last.offset, last.nbytes + extent.nbytes), at
            return
    reads.append((extent, offset))
