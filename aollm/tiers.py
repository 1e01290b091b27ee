"""The two tiers, opened: our own layers, streamed, or transformers' own modules.

Each puts an engine together and says what it is. A tier that cannot be opened leaves nothing behind. It refuses to know how
requests are made and heard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread
import torch

from .adapters import Adapters
from .buffers import Arena, Ring
from .checkpoint import Checkpoint, open_checkpoint, read_json
from .compute import Compute
from .disk.base import Disk
from .embedding import Embedding
from .engine import Engine, Limits
from .errors import ConfigError, ModelError, SpecializationError
from .experts import ExpertCache
from .families import FAMILIES
from .families.base import Family, Tower
from .kv import open_cache
from .passes import Assembled, validated
from .plan import RuntimePlan
from .port import Port
from .probe import CHUNK, drive_speed, memory_budget
from .request import Request
from .settings import RuntimeConfig
from .stores.cache import Cache
from .survey import Survey, survey
from .sweep import Model
from .text import Text
from .towers import Towers
from .trace import Trace
from .weights import Weights, check_shape, dtype_of

if TYPE_CHECKING:
    from .generic import GenericPlan


class Carousel(Protocol):
    """What serves requests until it is cancelled."""

    passes: int

    def submit(self, request: Request) -> None: ...
    def wake(self) -> None: ...
    def close(self) -> None: ...
    async def run(self) -> None: ...

    @property
    def riders(self) -> int: ...
    @property
    def waiting(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Tier:
    """What answers requests, and what it was put together from."""

    plan: RuntimePlan
    text: Text
    engine: Carousel
    tower: Tower | None = None
    adapters: Adapters | None = None
    cache: Cache | None = None
    drive_bytes_per_second: float | None = None


@dataclass(frozen=True, slots=True)
class Means:
    """What both tiers work with."""

    config: RuntimeConfig
    folder: Path
    disk: Disk
    compute: Compute
    port: Port
    trace: Trace


async def open_native(means: Means, found: Survey, cleanup: AsyncExitStack) -> Tier:
    """The native tier for a model that was surveyed; `cleanup` takes what gives everything back.

    Raises `SpecializationError` when one of its passes does not hold.
    """
    family, plan, disk, trace, compute = found.family, found.plan, means.disk, means.trace, means.compute
    weights = Weights(found.pieces, plan.pinned, plan.ring_nbytes, disk, trace)
    experts = ExpertCache(found.experts, plan.expert_slots, plan.expert_slot_nbytes, disk, trace)
    cleanup.callback(experts.forget)
    cache = await open_cache(means.config, plan, means.folder, family, found.checkpoint, disk, trace)
    cleanup.callback(cache.pool.forget)
    cleanup.push_async_callback(shielded, cache.aclose)
    drive = await drive_speed(disk, found.streamed, weights.ring if weights.streamed else Ring(2 * CHUNK)) if found.streamed else None
    cleanup.callback(weights.forget)
    await weights.pin()
    norm = await _read_norm(family, found.checkpoint, disk)
    embedding = Embedding(found.checkpoint[family.embedding], family, weights, disk, compute, trace)
    cleanup.callback(embedding.forget)
    if "pinned embedding" in plan.ledger:
        await embedding.pin()
    model = Model(family, weights, experts, norm, cache, found.adapters, plan.chunk_rows, trace, means.port.post)
    towers = Towers(found.tower_pieces, plan.tower_kept_nbytes, disk, compute, trace)
    cleanup.callback(towers.forget)
    plan = await validated(Assembled(means.config, plan, model, found.tower, found.tower_pieces, found.checkpoint, disk, compute))
    limits = Limits(plan.max_rows, plan.max_concurrent_requests, plan.max_answers, plan.max_context_tokens)
    engine = Engine(model, embedding, towers, compute, limits)
    return Tier(plan, found.text, engine, found.tower, found.adapters, cache, drive)


async def open_generic(means: Means, described: Mapping[str, Any], reason: str, state: str, cleanup: AsyncExitStack) -> Tier:
    """The generic tier for the model in `means.folder`, and why it is this one."""
    from . import generic  # transformers' modules are imported only where they are used

    config = means.config
    plan, own = await _plan_generic(config, means.folder, means.disk, described, reason, state)
    text = await anyio.to_thread.run_sync(Text.load, means.folder)
    with anyio.CancelScope(shield=True):
        loaded = await anyio.to_thread.run_sync(generic.load, means.folder, own, config.cache_dir)
        cleanup.push_async_callback(shielded, lambda: anyio.to_thread.run_sync(loaded.close))
    engine = generic.Generic(loaded, means.compute, generic.Limits(config.max_concurrent_requests, config.max_answers))
    return Tier(plan, text, engine)


@dataclass(frozen=True, slots=True)
class Choice:
    """How a model would be run. `found` is what the native tier knows of it; None where it would not be the one."""

    plan: RuntimePlan
    found: Survey | None


async def choose(config: RuntimeConfig, folder: Path, disk: Disk, disk_reason: str) -> Choice:
    """The tier for the model in `folder` and its plan, as opening a runtime has them before it reads a weight.

    Raises what opening raises.
    """
    described = await read_json(folder / "config.json")
    state, why = NOT_PLANNED
    if wants_native(config):
        try:
            found = await survey(config, folder, disk, disk_reason)
            return Choice(found.plan, found)
        except SpecializationError as error:
            state, why = await turned_away(config, described, error)
    plan, _ = await _plan_generic(config, folder, disk, described, why, state)
    return Choice(plan, None)


NOT_PLANNED = ("not-planned", "as asked for")
"""The state of a runtime whose tier was named, and why it has that one."""


def wants_native(config: RuntimeConfig) -> bool:
    """Whether the native tier is to be tried."""
    return config.backend != "transformers-generic" and config.use_specialization


async def turned_away(config: RuntimeConfig, described: Mapping[str, Any], error: SpecializationError) -> tuple[str, str]:
    """The state of a runtime that the native tier refused, and why. Raises where the generic one is ruled out."""
    if config.backend == "optimized-native":
        raise error
    kind = described.get("model_type")
    if not await anyio.to_thread.run_sync(_generates, described):
        raise ModelError(f"{error}; and transformers has no model of type {kind!r} that generates text") from error
    return "fallback" if kind in FAMILIES else "not-planned", str(error)


def _generates(described: Mapping[str, Any]) -> bool:
    """Whether transformers has a model that generates text for this `config.json`. Imports transformers; blocking."""
    from .generic.kind import kind_of

    return kind_of(described) is not None


async def _plan_generic(
    config: RuntimeConfig, folder: Path, disk: Disk, described: Mapping[str, Any], reason: str, state: str
) -> tuple[RuntimePlan, GenericPlan]:  # fmt: skip
    from . import generic

    _check(config, reason)
    checkpoint = await open_checkpoint(folder, disk)
    memory, in_use = memory_budget(config.memory)

    def plan() -> GenericPlan:
        return generic.make_plan(
            folder, described, checkpoint, memory, in_use, answers=config.max_answers, context=config.max_context_tokens,
            kv_nbytes=config.kv_cache_memory,
        )  # fmt: skip

    own = await anyio.to_thread.run_sync(plan)
    return _as_runtime_plan(own, config, described, reason, state), own


def _as_runtime_plan(own: GenericPlan, config: RuntimeConfig, described: Mapping[str, Any], reason: str, state: str) -> RuntimePlan:
    """A generic plan in the words of all plans."""
    return RuntimePlan(
        model=config.model_reference, family=str(described.get("model_type")), dtype=own.dtype, vocabulary=own.vocabulary,
        memory=own.memory, ledger=own.ledger, placement=tuple(own.placement.values()), pieces=tuple(own.placement),
        weights_nbytes=own.weights_nbytes, pinned_nbytes=own.pinned_nbytes, streamed_nbytes_per_pass=own.streamed_nbytes_per_pass,
        tower_kept_nbytes=0, experts=0, expert_slots=0, expert_slot_nbytes=0, ring_nbytes=0,
        kv_nbytes_per_token=own.kv_nbytes_per_token, kv_cache_strategy="resident", kv_tokens=own.kv_tokens, kv_ring_nbytes=0,
        state_snapshot_nbytes=0, max_context_tokens=own.max_context_tokens, max_concurrent_requests=config.max_concurrent_requests,
        max_answers=config.max_answers, max_rows=own.chunk_rows or own.max_context_tokens,
        chunk_rows=own.chunk_rows or own.max_context_tokens, disk_backend="transformers", disk_reason="transformers reads the weights",
        backend="transformers-generic", specialization_state=state, specialization_reason=reason,
    )  # fmt: skip


def _check(config: RuntimeConfig, reason: str) -> None:
    """What was asked for and only the native tier can do is refused, not left out."""
    wanted = {
        "adapter_dir": config.adapter_dir is not None,
        "kv_cache_strategy": config.kv_cache_strategy != "resident",
        "offload_cpu_layers": config.offload_cpu_layers is not None,
        "dense_projection_chunk_rows": config.dense_projection_chunk_rows is not None,
        "expert_memory": config.expert_memory is not None,
    }
    if names := [name for name, asked in wanted.items() if asked]:
        raise ConfigError(f"{names[0]}: only the native tier can do that, and this model runs through transformers ({reason})")


async def _read_norm(family: Family, checkpoint: Checkpoint, disk: Disk) -> torch.Tensor:
    entry = checkpoint[family.norm]
    check_shape(entry, (family.hidden,))
    arena = Arena(entry.extent.nbytes, huge=False)
    await disk.read_into([entry.extent], [arena.bytes[: entry.extent.nbytes]])
    return arena.tensor(0, dtype_of(entry), entry.shape).to(family.dtype)


async def shielded(close: Callable[[], Awaitable[None]]) -> None:
    """Close something even while being cancelled."""
    with anyio.CancelScope(shield=True):
        await close()
