"""The two tiers, opened: our own layers, streamed, or transformers' own modules.

Each puts an engine together and says what it is. A tier that cannot be opened leaves nothing behind. It refuses to know how
requests are made and heard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import anyio
import anyio.to_thread
import torch

from .adaptation import Adaptation
from .adapters import Adapters
from .berths import Berths
from .buffers import Arena, Ring
from .checkpoint import Checkpoint
from .compute import Compute
from .disk.base import Disk
from .embedding import Embedding
from .engine import Engine, Limits
from .errors import AollmError, DiskError, MemoryBudgetError, SpecializationError, StoreError
from .experts import ExpertCache
from .families.base import Family, Tower
from .forecast import Forecast, foretell
from .kv import open_cache, open_home
from .outlook import plan_generic
from .passes import Assembled, validated, writes
from .piece import check_shape, dtype_of
from .port import Port
from .probe import CHUNK, drive_speed
from .request import Request
from .runtime_plan import RuntimePlan, rows_together
from .settings import RuntimeConfig
from .stores.cache import Cache
from .stores.home import Home
from .stores.presets import PRESETS
from .survey import Survey
from .sweep import Model
from .text import Text
from .towers import Towers
from .trace import Trace
from .weights import Weights


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
    forecast: Forecast | None = None
    adaptation: Adaptation | None = None


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
    found, cache = await _open_cache(means, found)
    cleanup.callback(cache.pool.forget)
    cleanup.push_async_callback(shielded, cache.aclose)
    config, family, plan, disk, trace, compute = found.config, found.family, found.plan, means.disk, means.trace, means.compute
    device = found.device
    weights = Weights(found.pieces, plan.placement, plan.ring_nbytes, plan.landing_nbytes, device, disk, trace)
    cleanup.callback(weights.forget)
    experts = ExpertCache(found.experts, plan.expert_slots, plan.expert_slot_nbytes, disk, trace, device)
    cleanup.callback(experts.forget)
    berths = Berths.of(device, found.experts.values(), trace)
    if berths is not None:
        cleanup.callback(berths.forget)
    drive, forecast = await _measured(means, found, weights)
    await weights.pin()
    norm = await compute.run(device.put, await _read_norm(family, found.checkpoint, disk))
    await compute.run(found.adapters.place, device.put)
    embedding = Embedding(found.checkpoint[family.embedding], family, weights, disk, compute, trace)
    cleanup.callback(embedding.forget)
    if "pinned embedding" in plan.ledger:
        await embedding.pin()
    model = Model(family, weights, experts, norm, cache, found.adapters, plan.chunk_rows, trace, means.port.post, device, berths)
    towers = Towers(found.tower_pieces, plan.tower_kept_nbytes, disk, compute, trace, device)
    cleanup.callback(towers.forget)
    plan = replace(plan, predicted=None if forecast is None else forecast.prediction())
    plan = await validated(Assembled(config, plan, model, found.tower, found.tower_pieces, found.checkpoint, disk, compute))
    limits = Limits(plan.max_rows, plan.max_concurrent_requests, plan.max_answers, plan.max_context_tokens)
    engine = Engine(model, embedding, towers, compute, limits)

    async def open_elsewhere(config: RuntimeConfig) -> Home:
        return await open_home(config, plan, means.folder, family, found.checkpoint, disk, trace)

    least_rows = plan.max_answers + rows_together(found.tower)
    adaptation = Adaptation(config, plan, engine, cache, disk, trace, open_elsewhere, least_rows)
    engine.between, engine.note = adaptation.between, adaptation.note
    return Tier(plan, found.text, engine, found.tower, found.adapters, cache, drive, forecast, adaptation)


async def _measured(means: Means, found: Survey, weights: Weights) -> tuple[float | None, Forecast | None]:
    """How fast the drive is, and the forecast: none of a device, of which nothing is measured."""
    ring = weights.ring if weights.streamed else Ring(2 * CHUNK)

    async def probe() -> float | None:
        return await drive_speed(means.disk, found.streamed, ring) if found.streamed else None

    forecast: Forecast | None = None
    if not found.plan.device_memory:
        forecast = await foretell(found.plan, found.family, found.pieces, found.experts, means.compute, probe)
    return await probe() if forecast is None else forecast.drive_bytes_per_second, forecast


async def _open_cache(means: Means, found: Survey) -> tuple[Survey, Cache]:
    """The cache as it is planned or, where the selector chose it and it cannot be opened, as the next in its chain would be, with
    what is planned then. Raises the first one's error."""
    first: AollmError | None = None
    while True:
        try:
            return found, await _cache_of(means, found)
        except (StoreError, DiskError, MemoryBudgetError) as error:
            first = first or error
            try:
                following = await found.without(str(error))
            except MemoryBudgetError:
                following = None
            if following is None:
                raise first from None
            found = following


async def _cache_of(means: Means, found: Survey) -> Cache:
    """The cache as it is planned; one that the selector chose is seen to take a block before a weight is read."""
    cache = await open_cache(found.config, found.plan, means.folder, found.family, found.checkpoint, means.disk, means.trace)
    if found.plan.selection is None or cache.records is None:
        return cache
    try:
        await writes(cache.records, found.config.cache_dir / PRESETS[found.config.kv_cache_strategy].root, means.disk)
    except BaseException as error:
        await shielded(cache.aclose)
        cache.pool.forget()
        if isinstance(error, SpecializationError):
            raise StoreError(str(error)) from error
        raise
    return cache


async def open_generic(means: Means, described: Mapping[str, Any], reason: str, state: str, cleanup: AsyncExitStack) -> Tier:
    """The generic tier for the model in `means.folder`, and why it is this one."""
    from . import generic  # transformers' modules are imported only where they are used

    config = means.config
    plan, own = await plan_generic(config, means.folder, means.disk, described, reason, state)
    text = await anyio.to_thread.run_sync(Text.load, means.folder)
    with anyio.CancelScope(shield=True):
        loaded = await anyio.to_thread.run_sync(generic.load, means.folder, own, config.cache_dir)
        cleanup.push_async_callback(shielded, lambda: anyio.to_thread.run_sync(loaded.close))
    engine = generic.Generic(loaded, means.compute, generic.Limits(config.max_concurrent_requests, config.max_answers))
    return Tier(plan, text, engine)


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
