"""The two tiers, opened: our own layers, streamed, or transformers' own modules.

Each puts an engine together and says what it is. A tier that cannot be opened leaves nothing behind. It refuses to know how
requests are made and heard.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import anyio
import anyio.to_thread
import torch

from .adaptation import Adaptation
from .adapters import Adapters
from .berths import Berths
from .blueprint import weights_of
from .buffers import Arena, Ring
from .checkpoint import Checkpoint, read_json
from .compute import FOREIGN, Compute
from .disk.base import Disk
from .embedding import Embedding
from .engine import Engine, Limits
from .errors import AollmError, ConfigError, DiskError, MemoryBudgetError, ModelError, SpecializationError, StoreError
from .experts import ExpertCache
from .families import FAMILIES
from .families.base import Family, Tower
from .forecast import Forecast, foretell
from .kv import open_cache, open_home
from .passes import Assembled, validated, writes
from .piece import check_shape, dtype_of
from .port import Port
from .probe import CHUNK, drive_speed, memory_budget
from .request import Request
from .runtime_plan import RuntimePlan, rows_together
from .settings import RuntimeConfig
from .stores.cache import Cache
from .stores.home import Home
from .stores.presets import PRESETS
from .survey import AUTO, Survey, survey
from .sweep import Model
from .text import Text
from .towers import Towers
from .trace import Trace
from .weights import Weights

if TYPE_CHECKING:
    from .generic import GenericPlan

RESIDENT = "resident"
"""What transformers' own cache is like."""


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
    engine.between = adaptation.between
    return Tier(plan, found.text, engine, found.tower, found.adapters, cache, drive, forecast, adaptation)


async def _measured(means: Means, found: Survey, weights: Weights) -> tuple[float | None, Forecast | None]:
    """How fast the drive is, and the forecast: none of a device, of which nothing is measured."""
    ring = weights.ring if weights.streamed else Ring(2 * CHUNK)

    async def probe() -> float | None:
        return await drive_speed(means.disk, found.streamed, ring) if found.streamed else None

    if not found.plan.device_memory:
        with suppress(*FOREIGN, ModelError):  # a step that cannot be run does not hold what is checked later
            forecast = await foretell(found.plan, found.family, found.pieces, found.experts, means.compute, probe)
            return forecast.drive_bytes_per_second, forecast
    return await probe(), None


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
    """The tier for the model in `folder` and its plan, as opening a runtime has them before it reads a weight. The weights need
    not be there: then sizes follow from `config.json`.

    Raises what opening raises.
    """
    described = await read_json(folder / "config.json")
    state, why = NOT_PLANNED
    if wants_native(config):
        try:
            found = await survey(config, folder, disk, disk_reason, here=False)
            return Choice(found.plan, found)
        except SpecializationError as error:
            state, why = await turned_away(config, described, error)
    plan, _ = await _plan_generic(config, folder, disk, described, why, state, here=False)
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
    config: RuntimeConfig, folder: Path, disk: Disk, described: Mapping[str, Any], reason: str, state: str, here: bool = True
) -> tuple[RuntimePlan, GenericPlan]:  # fmt: skip
    from . import generic

    _check(config, reason)
    checkpoint = await weights_of(folder, disk, described, here)
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
        kv_nbytes_per_token=own.kv_nbytes_per_token, kv_cache_strategy=RESIDENT, kv_tokens=own.kv_tokens, kv_ring_nbytes=0,
        state_snapshot_nbytes=0, max_context_tokens=own.max_context_tokens, max_concurrent_requests=config.max_concurrent_requests,
        max_answers=config.max_answers, max_rows=own.chunk_rows or own.max_context_tokens,
        chunk_rows=own.chunk_rows or own.max_context_tokens, disk_backend="transformers", disk_reason="transformers reads the weights",
        backend="transformers-generic", specialization_state=state, specialization_reason=reason,
    )  # fmt: skip


def _check(config: RuntimeConfig, reason: str) -> None:
    """What was asked for and only the native tier can do is refused, not left out."""
    wanted = {
        "adapter_dir": config.adapter_dir is not None,
        "kv_cache_strategy": PRESETS[RESIDENT if config.kv_cache_strategy == AUTO else config.kv_cache_strategy].layout is not None,
        "kv_cache_window_tokens": config.kv_cache_window_tokens is not None,
        "strategy_selector_profile": config.strategy_selector_profile == "bounded-window",
        "kv_cache_lifecycle": config.kv_cache_lifecycle == "persistent",
        "device": config.device not in ("auto", "cpu"),
        "device_memory": config.device_memory is not None,
        "offload_cpu_layers": config.offload_cpu_layers is not None,
        "offload_gpu_layers": config.offload_gpu_layers is not None,
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
