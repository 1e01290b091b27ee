"""Which of the two tiers a model runs on, and what is planned there: without a weight.

It refuses to know how tiers are opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from .blueprint import weights_of
from .checkpoint import read_json
from .disk.base import Disk
from .errors import ConfigError, ModelError, SpecializationError
from .families import FAMILIES
from .probe import memory_budget
from .runtime_plan import RuntimePlan
from .settings import RuntimeConfig
from .stores.presets import PRESETS
from .survey import AUTO, Survey, survey

if TYPE_CHECKING:
    from .generic import GenericPlan

RESIDENT = "resident"
"""What transformers' own cache is like."""
NOT_PLANNED = ("not-planned", "as asked for")
"""The state of a runtime whose tier was named, and why it has that one."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """How a model would be run. `found` is what the native tier knows of it; None where it would not be the one."""

    plan: RuntimePlan
    found: Survey | None


async def choose(config: RuntimeConfig, folder: Path, disk: Disk, disk_reason: str) -> Outlook:
    """The tier for the model in `folder` and its plan, as opening a runtime has them before it reads a weight. The weights need
    not be there: then sizes follow from `config.json`.

    Raises what opening raises.
    """
    described = await read_json(folder / "config.json")
    state, why = NOT_PLANNED
    if wants_native(config):
        try:
            found = await survey(config, folder, disk, disk_reason, here=False)
            return Outlook(found.plan, found)
        except SpecializationError as error:
            state, why = await turned_away(config, described, error)
    plan, _ = await plan_generic(config, folder, disk, described, why, state, here=False)
    return Outlook(plan, None)


def wants_native(config: RuntimeConfig) -> bool:
    """Whether the native tier is to be tried."""
    return config.backend != "transformers-generic" and config.use_specialization


async def turned_away(config: RuntimeConfig, described: Mapping[str, Any], error: SpecializationError) -> tuple[str, str]:
    """The state of a runtime that the native tier refused, and why. Raises where the generic one is ruled out."""
    if config.backend == "optimized-native":
        raise error
    kind = described.get("model_type")
    if not await anyio.to_thread.run_sync(_generates, described):
        more = "" if kind is None else f"; and transformers has no model of type {kind!r} that generates text"
        raise ModelError(f"{error}{more}") from error
    return "fallback" if kind in FAMILIES else "not-planned", str(error)


def _generates(described: Mapping[str, Any]) -> bool:
    """Whether transformers has a model that generates text for this `config.json`. Imports transformers; blocking."""
    from .generic.kind import kind_of

    return kind_of(described) is not None


async def plan_generic(
    config: RuntimeConfig, folder: Path, disk: Disk, described: Mapping[str, Any], reason: str, state: str, here: bool = True
) -> tuple[RuntimePlan, GenericPlan]:  # fmt: skip
    """The plan for running the model through transformers, in the words of all plans and in its own; `reason` and `state` say why
    it is not the native tier. Unless weights have to be `here`, sizes may follow from `described`, the `config.json`.

    Raises `ConfigError` for a setting that only the native tier has, `ModelError` for a model that cannot be used, and
    `MemoryBudgetError` where its largest part does not fit.
    """
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
