"""The plan: what is kept, what streams and what memory everything may have, from headers alone.

It is arithmetic on sizes, done before a single weight is read, and either the whole run fits or it is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .buffers import Ledger, pages, size
from .device import Chosen
from .errors import MemoryBudgetError
from .experts import Key, slot_nbytes
from .families.base import Family, Tower
from .maths.attention import BLOCK
from .piece import Piece, pinned_nbytes
from .placement import Place, kept_nbytes, named_layers, place, ring_nbytes
from .prediction import Prediction
from .room import device_ledger, land, why_here
from .selector import Selection
from .settings import RuntimeConfig
from .stores.pool import BlockPool
from .stores.presets import PRESETS
from .stores.record import record_nbytes
from .towers import tower_nbytes

CHUNK_ROWS = 512
"""Rows computed at a time: matrix products gain nothing from more."""
KV_SHARE, ACTIVATION_SHARE = 1 / 8, 1 / 16
"""Shares of the memory that go to KV and to rows under way when the caller does not say how many tokens there will be."""
LEAST_RING = 256 << 10
SNAPSHOTS = 64 << 20
"""Bytes of earlier states that a sequence keeps to go back to, if there is room; one it has in any case."""
LEAST_SLOTS = 4
"""Experts that have room in any case: some are read while others are used."""
RUN_NBYTES = 4 << 20
"""Bytes of stored blocks that are read together: what a drive needs to reach its speed."""
LEAST_ROWS, KEPT_LAYERS = 32, 4
"""Rows that a pass has at least, and layers of them that are in memory at once, as fresh keys and values, beside everybody's last block."""
SLACK = 64 << 20
"""For what nobody can count beforehand: thread stacks, the allocator's leftovers, scratch memory of matrix products."""


DISK_CACHE = "disk-cache"
"""The pass that keeps keys and values on disk."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One thing that sets the native tier apart, why it is planned, and what was seen of it in the assembled runtime."""

    id: str
    reason: str
    observed: str | None = None


@dataclass(frozen=True, slots=True)
class RuntimePlan:
    """Sizes in bytes. `placement[i]` is `device`, `host` or `disk` for the i-th piece of a pass."""

    model: str
    family: str
    dtype: str
    vocabulary: int
    memory: int
    ledger: dict[str, int]
    placement: tuple[Place, ...]
    pieces: tuple[str, ...]
    weights_nbytes: int
    pinned_nbytes: int
    streamed_nbytes_per_pass: int
    """Without experts, which are read when rows are routed to them."""
    tower_kept_nbytes: int
    """Rows of images or sounds that are kept for later passes and turns."""
    experts: int
    expert_slots: int
    """Experts that have room in memory at once."""
    expert_slot_nbytes: int
    ring_nbytes: int
    kv_nbytes_per_token: int
    kv_cache_strategy: str
    kv_tokens: int
    """Tokens whose keys and values are in memory at most."""
    kv_ring_nbytes: int
    state_snapshot_nbytes: int
    """What a sequence may keep of earlier recurrent states."""
    max_context_tokens: int
    max_concurrent_requests: int
    max_answers: int
    max_rows: int
    chunk_rows: int
    disk_backend: str
    disk_reason: str
    kv_window_tokens: int | None = None
    """Tokens that every layer sees at most, if the strategy limits them."""
    backend: str = "optimized-native"
    """Or `transformers-generic`: transformers' own modules."""
    specialization_state: str = "planned"
    """`not-planned`, `planned`, `applied` when all passes were seen to hold, or `fallback` from the native tier."""
    specialization_reason: str | None = None
    """Why it is not the native tier."""
    passes: tuple[Pass, ...] = ()
    device: str = "cpu"
    """What computes."""
    device_reason: str = "transformers' modules compute on the processor"
    """Why it is that one; and where it has no memory of its own, what became of what was to be there."""
    device_memory: int = 0
    """What the run may have of the device's memory; 0 where that is the host's."""
    device_ledger: dict[str, int] = field(default_factory=dict)
    landing_nbytes: int = 0
    """Memory of the device through which goes what is not kept there."""
    moved_nbytes_per_pass: int = 0
    """What a pass copies to the device, without experts."""
    selection: Selection | None = None
    """How `kv_cache_strategy` was chosen; None where it was named, and for transformers' modules."""
    predicted: Prediction | None = None
    """What it foretells of this machine; None where nobody measured, and for transformers' modules."""

    @property
    def pinned(self) -> frozenset[int]:
        """Indices of the pieces that are kept in memory, the host's or the device's."""
        return frozenset(index for index, place in enumerate(self.placement) if place != "disk")

    @property
    def kv_nbytes_per_context(self) -> int:
        """Keys and values of one request whose context is full, as they are computed; of its window where there is one."""
        return self.kv_nbytes_per_token * min(self.max_context_tokens, self.kv_window_tokens or self.max_context_tokens)

    @property
    def cache_mode(self) -> str:
        """Who keeps keys and values, and where: `resident-kv`, `disk-kv` or `transformers-dynamic`."""
        if self.backend == "transformers-generic":
            return "transformers-dynamic"
        return "disk-kv" if PRESETS[self.kv_cache_strategy].layout is not None else "resident-kv"

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return {**asdict(self), "kv_nbytes_per_context": self.kv_nbytes_per_context, "cache_mode": self.cache_mode}


def make_plan(
    config: RuntimeConfig, model_type: str, family: Family, pieces: Sequence[Piece], experts: Mapping[Key, Piece],
    tower: tuple[Tower | None, Sequence[Piece]], adapters_nbytes: int, memory: int, in_use: int, disk: tuple[str, str], exported: bool,
    on: Chosen,
) -> RuntimePlan:  # fmt: skip
    """Divide `memory` bytes, of which the process already has `in_use`, and those of the device, which was chosen for a reason.

    Raises `MemoryBudgetError` with the largest parts of the memory that does not suffice.
    """
    device, device_memory = on.device, (config.device_memory or on.free_nbytes) if on.device.apart else 0
    ledger = Ledger(memory)
    ledger.lines["interpreter and libraries"] = in_use
    ledger.lines["slack"] = SLACK
    kv = kv_share(config, family, ledger.free)
    context, kv_tokens = kv.context, kv.tokens
    together = rows_together(tower[0])
    max_rows, chunk_rows = _rows(config, family, kv, together, min(ledger.free, device_memory) if device.apart else ledger.free)
    state = family.kv.state_nbytes
    snapshots = max(state, min(SNAPSHOTS, int(ledger.free * KV_SHARE) // config.max_answers)) if state else 0
    kv_nbytes = history_nbytes(family, kv_tokens, config.max_answers) + kv.ring_nbytes + config.max_answers * snapshots
    activations = (
        max_rows * _row_nbytes(family)
        + family.activation_nbytes(max(chunk_rows, together)) * 5 // 4  # the allocator does not fit them without gaps
        + config.max_answers * family.vocabulary * (family.dtype.itemsize + 8)
    )
    sizes, kept_sizes = [piece.nbytes for piece in pieces], [pinned_nbytes(piece) for piece in pieces]
    in_host, on_device = named_layers(family.layers, config.offload_cpu_layers, config.offload_cpu_policy, config.offload_gpu_layers)
    slot = slot_nbytes(experts)
    slots = min(len(experts), LEAST_SLOTS)
    item, kept_items = tower_nbytes(*tower, context)
    fits = sum(kept_sizes) + kv_nbytes + activations + item + kept_items + adapters_nbytes + slot * slots <= ledger.free
    ring = 0 if fits and in_host is None and not device.apart else max(pages(ring_nbytes(sizes, config.prefetch_depth)), LEAST_RING)
    for name, nbytes in (("stream ring", ring), ("kv", kv_nbytes), ("activations", activations)):
        ledger.lines[name] = nbytes
    if adapters_nbytes:
        ledger.lines["adapters"] = adapters_nbytes
    if tower[0] is not None:
        ledger.lines["towers"] = item + kept_items
    if experts:
        ledger.lines["experts"] = slots * slot
    there = device_ledger(device, device_memory, family, experts.values(), tower, context, activations, adapters_nbytes)
    landing = land(there, kept_sizes, config.prefetch_depth, in_host is not None or on_device is not None)
    ledger.reserve("pinned weights", 0)
    layers = [piece.layer for piece in pieces]
    places = place(layers, kept_sizes, on_device, in_host, there.free if device.apart else None, ledger.free)
    if device.apart:
        there.reserve("weights", kept_nbytes(kept_sizes, places, "device"), "offload_gpu_layers")
    ledger.reserve("pinned weights", kept_nbytes(kept_sizes, places, "host"), "offload_cpu_layers or offload_gpu_layers")
    pinned = frozenset(index for index, at in enumerate(places) if at != "disk")
    table = pages(family.vocabulary * family.hidden * family.dtype.itemsize)
    if len(pinned) == len(pieces) and family.embedding != family.head and slot * (len(experts) - slots) + table <= ledger.free:
        ledger.reserve("pinned embedding", table)
    if experts:
        room = ledger.free if config.expert_memory is None else min(ledger.free, config.expert_memory - slots * slot)
        more = min(len(experts) - slots, max(room, 0) // slot)
        ledger.reserve("experts", more * slot)
        slots += more
    expert_nbytes = sum(piece.read_nbytes for piece in experts.values())
    return RuntimePlan(
        model=config.model_reference, family=model_type, dtype=str(family.dtype).removeprefix("torch."),
        vocabulary=family.vocabulary, memory=memory, ledger=dict(ledger.lines),
        placement=tuple(places), pieces=tuple(piece.label for piece in pieces),
        weights_nbytes=sum(piece.read_nbytes for piece in pieces) + expert_nbytes,
        pinned_nbytes=sum(pieces[index].read_nbytes for index in pinned),
        streamed_nbytes_per_pass=sum(piece.read_nbytes for index, piece in enumerate(pieces) if index not in pinned),
        tower_kept_nbytes=kept_items, experts=len(experts), expert_slots=slots, expert_slot_nbytes=slot,
        ring_nbytes=ring, kv_nbytes_per_token=family.kv.token_nbytes, kv_cache_strategy=config.kv_cache_strategy,
        kv_tokens=kv_tokens, kv_ring_nbytes=kv.ring_nbytes, state_snapshot_nbytes=snapshots, max_context_tokens=context,
        max_concurrent_requests=config.max_concurrent_requests, max_answers=config.max_answers, max_rows=max_rows, chunk_rows=chunk_rows,
        disk_backend=disk[0], disk_reason=disk[1], kv_window_tokens=config.kv_cache_window_tokens,
        passes=tuple(_passes(config, family, places, device.name, tower[0], chunk_rows, exported)),
        device=device.name, device_memory=device_memory, device_ledger=dict(there.lines), landing_nbytes=landing,
        device_reason=why_here(device, on.reason, {name: getattr(config, name) for name in ("offload_gpu_layers", "device_memory")}),
        moved_nbytes_per_pass=sum(piece.nbytes for piece, at in zip(pieces, places, strict=True) if device.apart and at != "device"),
    )  # fmt: skip


def moved(plan: RuntimePlan, strategy: str, max_rows: int, observed: str | None) -> RuntimePlan:
    """The plan of a runtime whose keys and values have moved to where `strategy` keeps them, of which so much was seen."""
    passes = [each for each in plan.passes if each.id != DISK_CACHE]
    if PRESETS[strategy].layout is not None:
        passes.append(Pass(DISK_CACHE, _spills(strategy), observed))
    return replace(plan, kv_cache_strategy=strategy, max_rows=max_rows, passes=tuple(passes))


def _spills(strategy: str) -> str:
    return f"{strategy} writes what does not fit in memory"


@dataclass(frozen=True, slots=True)
class KvShare:
    """What keys and values have: the longest `context`, `tokens` in memory, a ring to read others into, and whether those are on disk."""

    context: int
    tokens: int
    ring_nbytes: int
    on_disk: bool

    def most_rows(self, layers: int) -> int:
        """Rows that a pass may have. Keys and values of two layers' rows have to be in memory beside everybody's last block."""
        return max((self.tokens - min(BLOCK, self.context)) * layers // 16, 32) if self.on_disk else self.tokens


def kv_share(config: RuntimeConfig, family: Family, free: int) -> KvShare:
    """Of `free` bytes, what `config` asks for or, where it says nothing, `KV_SHARE`."""
    kv, preset = family.kv, PRESETS[config.kv_cache_strategy]
    token = max(kv.token_nbytes, 1)
    share = config.kv_cache_memory or int(free * KV_SHARE)
    if preset.layout is None:
        tokens = max(share // token, 1)
        if config.max_context_tokens is None:
            context = min(family.context, tokens)
        else:
            context = config.max_context_tokens
            tokens = max(tokens, context) if config.kv_cache_memory is None else tokens
        return KvShare(context, max(min(context * config.max_concurrent_requests, tokens), 1), 0, False)
    context = config.max_context_tokens or family.context
    record = record_nbytes(preset.codec.payload_nbytes(min(BLOCK, context), kv.row_nbytes, kv.dtype.itemsize))
    ring = (config.prefetch_depth + 1) * max(record, min(RUN_NBYTES, free // 32) // record * record)
    least = min(BLOCK, context) + -(-LEAST_ROWS * KEPT_LAYERS // max(kv.layers, 1))
    tokens = min(share // token, max(context * config.max_concurrent_requests, least))
    if tokens < least:
        if config.kv_cache_memory is not None:
            raise MemoryBudgetError(
                f"kv_cache_memory={size(share)} is too small: a sequence's last block takes {size(least * token)} of this model"
            )
        tokens = least
    return KvShare(context, tokens, ring, True)


def history_nbytes(family: Family, tokens: int, answers: int) -> int:
    """Memory for keys, values and states of `tokens` tokens of `answers` answers."""
    return BlockPool.nbytes(tokens, answers, family.kv.layers, family.kv.row_nbytes) + answers * family.kv.state_nbytes


def rows_together(tower: Tower | None) -> int:
    """Rows that must not be parted: an image's, if they see each other."""
    return tower.rows(torch.empty(tower.largest(1), device="meta")) if tower is not None and tower.both_ways else 0


def _rows(config: RuntimeConfig, family: Family, kv: KvShare, together: int, free: int) -> tuple[int, int]:
    """How many rows a pass may have, and how many of them are computed at a time."""
    chunk = config.dense_projection_chunk_rows or CHUNK_ROWS
    while config.dense_projection_chunk_rows is None and chunk > 32 and family.activation_nbytes(chunk) > free * ACTIVATION_SHARE:
        chunk //= 2
    rows = max(int(free * ACTIVATION_SHARE) // _row_nbytes(family), chunk, config.max_answers)
    rows = max(min(rows, kv.most_rows(family.kv.layers)), config.max_answers + together)
    return (rows // chunk * chunk if rows > chunk else rows), min(chunk, rows)


def _passes(
    config: RuntimeConfig, family: Family, places: Sequence[Place], device: str, tower: Tower | None, chunk_rows: int, exported: bool,
) -> Iterator[Pass]:  # fmt: skip
    if PRESETS[config.kv_cache_strategy].layout is not None:
        yield Pass(DISK_CACHE, _spills(config.kv_cache_strategy))
    if count := places.count("host"):
        more = (config.offload_cpu_layers or 0) > family.layers
        told = f": all {family.layers} layers, of {config.offload_cpu_layers} asked for" if more else ""
        yield Pass("cpu-offload", f"{count} of {len(places)} pieces stay in memory{told}")
    if count := places.count("device"):
        yield Pass("gpu-offload", f"{count} of {len(places)} pieces stay on {device}")
    yield Pass("mlp-chunking", f"a layer runs in chunks of {chunk_rows} rows")
    if any(step.experts is not None for step in family.steps):
        yield Pass("moe-routing", "experts are read when rows were routed to them")
    if family.kv.layers:
        yield Pass("attention-replacement", "a history is folded block by block")
    if tower is not None:
        yield Pass("multimodal-shell", f"it takes parts of type {tower.kind}")
    if exported:
        yield Pass("gds-export-weights", "weights come from an export")


def _row_nbytes(family: Family) -> int:
    """Bytes of one row that live through a pass: its hidden state, a copy while rows are rearranged, and its angles; where it is
    routed, what its experts are given, what they come to, what is computed beside them, and whom it was sent to."""
    row = family.hidden * family.dtype.itemsize
    mixed = max((3 * row + 48 * step.experts.top for step in family.steps if step.experts is not None), default=0)
    return 3 * row + 16 * family.kv.head_dim + mixed
