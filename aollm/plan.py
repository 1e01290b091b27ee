"""The plan: what is kept, what streams and what memory everything may have, from headers alone.

It is arithmetic on sizes, done before a single weight is read, and either the whole run fits or it is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .buffers import Ledger, pages
from .families.base import Family
from .placement import band, ring_nbytes, spread
from .settings import MAX_ANSWERS, RuntimeConfig
from .stores.pool import BlockPool
from .weights import Piece, pinned_nbytes

CHUNK_ROWS = 512
"""Rows computed at a time: matrix products gain nothing from more."""
KV_SHARE, ACTIVATION_SHARE = 1 / 8, 1 / 16
"""Shares of the memory that go to KV and to rows under way when the caller does not say how many tokens there will be."""
LEAST_RING = 256 << 10
SLACK = 64 << 20
"""For what nobody can count beforehand: thread stacks, the allocator's leftovers, scratch memory of matrix products."""


@dataclass(frozen=True, slots=True)
class RuntimePlan:
    """Sizes in bytes. `placement[i]` is `host` or `disk` for the i-th piece of a pass."""

    model: str
    family: str
    dtype: str
    vocabulary: int
    memory: int
    ledger: dict[str, int]
    placement: tuple[str, ...]
    pieces: tuple[str, ...]
    weights_nbytes: int
    pinned_nbytes: int
    streamed_nbytes_per_pass: int
    ring_nbytes: int
    kv_nbytes_per_token: int
    kv_tokens: int
    max_context_tokens: int
    max_concurrent_requests: int
    max_answers: int
    max_rows: int
    chunk_rows: int
    disk_backend: str
    disk_reason: str

    @property
    def pinned(self) -> frozenset[int]:
        """Indices of the pieces that are kept in memory."""
        return frozenset(index for index, place in enumerate(self.placement) if place == "host")

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)


def make_plan(
    config: RuntimeConfig, model_type: str, family: Family, pieces: Sequence[Piece], memory: int, in_use: int, disk: tuple[str, str]
) -> RuntimePlan:
    """Divide `memory` bytes, of which the process already has `in_use`. Raises `MemoryBudgetError` with the largest parts."""
    ledger = Ledger(memory)
    ledger.lines["interpreter and libraries"] = in_use
    ledger.lines["slack"] = SLACK
    context, kv_tokens = _tokens(config, family, ledger.free)
    max_rows, chunk_rows = _rows(config, family, kv_tokens, ledger.free)
    kv_nbytes = BlockPool.nbytes(kv_tokens, _answers(config), family.kv.layers, family.kv.row_nbytes)
    activations = (
        max_rows * _row_nbytes(family)
        + family.activation_nbytes(chunk_rows) * 5 // 4  # the allocator does not fit them without gaps
        + _answers(config) * family.vocabulary * (family.dtype.itemsize + 8)
    )
    sizes, kept_sizes = [piece.nbytes for piece in pieces], [pinned_nbytes(piece) for piece in pieces]
    kept = None if config.offload_cpu_layers is None else band(family.kv.layers, config.offload_cpu_layers, config.offload_cpu_policy)
    fits = sum(kept_sizes) + kv_nbytes + activations <= ledger.free
    ring = 0 if fits and kept is None else max(pages(ring_nbytes(sizes, config.prefetch_depth)), LEAST_RING)
    for name, nbytes in (("stream ring", ring), ("kv", kv_nbytes), ("activations", activations)):
        ledger.lines[name] = nbytes
    if kept is None:
        ledger.reserve("pinned weights", 0)
        pinned = spread(kept_sizes, ledger.free)
    else:
        pinned = frozenset(index for index, piece in enumerate(pieces) if piece.layer in kept)
    ledger.reserve("pinned weights", sum(kept_sizes[index] for index in pinned))
    table = pages(family.vocabulary * family.hidden * family.dtype.itemsize)
    if len(pinned) == len(pieces) and family.embedding != family.head and table <= ledger.free:
        ledger.reserve("pinned embedding", table)
    return RuntimePlan(
        model=config.model_reference, family=model_type, dtype=str(family.dtype).removeprefix("torch."),
        vocabulary=family.vocabulary, memory=memory, ledger=dict(ledger.lines),
        placement=tuple("host" if index in pinned else "disk" for index in range(len(pieces))),
        pieces=tuple(piece.label for piece in pieces),
        weights_nbytes=sum(piece.read_nbytes for piece in pieces),
        pinned_nbytes=sum(pieces[index].read_nbytes for index in pinned),
        streamed_nbytes_per_pass=sum(piece.read_nbytes for index, piece in enumerate(pieces) if index not in pinned),
        ring_nbytes=ring, kv_nbytes_per_token=family.kv.token_nbytes, kv_tokens=kv_tokens, max_context_tokens=context,
        max_concurrent_requests=config.max_concurrent_requests, max_answers=_answers(config), max_rows=max_rows, chunk_rows=chunk_rows,
        disk_backend=disk[0], disk_reason=disk[1],
    )  # fmt: skip


def _tokens(config: RuntimeConfig, family: Family, free: int) -> tuple[int, int]:
    """The longest context, and how many tokens of KV all requests have together."""
    share = max(int(free * KV_SHARE) // family.kv.token_nbytes, 1)
    if config.max_context_tokens is None:
        context = min(family.context, share)
        return context, min(context * config.max_concurrent_requests, share)
    context = config.max_context_tokens
    return context, max(context, min(context * config.max_concurrent_requests, share))


def _rows(config: RuntimeConfig, family: Family, kv_tokens: int, free: int) -> tuple[int, int]:
    """How many rows a pass may have, and how many of them are computed at a time."""
    chunk = config.dense_projection_chunk_rows or CHUNK_ROWS
    while config.dense_projection_chunk_rows is None and chunk > 32 and family.activation_nbytes(chunk) > free * ACTIVATION_SHARE:
        chunk //= 2
    rows = max(int(free * ACTIVATION_SHARE) // _row_nbytes(family), chunk, _answers(config))
    rows = min(rows, max(kv_tokens, _answers(config)))
    return rows, min(chunk, rows)


def _answers(config: RuntimeConfig) -> int:
    """Answers that may be in the making at once: one a request, or one request's many."""
    return max(config.max_concurrent_requests, MAX_ANSWERS)


def _row_nbytes(family: Family) -> int:
    """Bytes of one row that live through a pass: its hidden state, a copy while rows are rearranged, and its angles."""
    return 3 * family.hidden * family.dtype.itemsize + 16 * family.kv.head_dim
