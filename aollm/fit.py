"""Fit: where a plan does not fit, the smallest changes that would make it fit, each by itself. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .errors import MemoryBudgetError
from .runtime_plan import RuntimePlan
from .settings import RuntimeConfig
from .stores.presets import PRESETS

STEP = 1 << 20
"""Memory is told to this many bytes."""
WAVER = 4
"""Steps by which the interpreter's own memory may be more in the next run."""
LEAST_CONTEXT = 256
MOST_MEMORY = 1 << 44
ON_DISK = "paged"
"""What keeps keys and values that memory has no room for."""

Attempt = Callable[[RuntimeConfig, int], RuntimePlan]
"""Makes the plan for a configuration in so many bytes, or raises `MemoryBudgetError`."""


def fitted(attempt: Attempt, config: RuntimeConfig, memory: int, context: int) -> RuntimePlan:
    """The plan in `memory` bytes, for histories of `context` tokens if the configuration does not say otherwise.

    Raises `MemoryBudgetError` that says, beside what is missing, which single changes would do; `changes` has them by setting.
    """
    try:
        return attempt(config, memory)
    except MemoryBudgetError as error:
        changes = dict(_changes(attempt, config, memory, context))
        told = ", or ".join(f"{name}={_typed(value) if name.endswith('memory') else value}" for name, value in changes.items())
        raise MemoryBudgetError(f"{error}; it would fit with {told}" if told else str(error), changes) from error


def _changes(attempt: Attempt, config: RuntimeConfig, memory: int, context: int) -> Iterator[tuple[str, Any]]:
    """Setting and value of each change that does: the least memory, then the largest values below those of today."""

    def fits(nbytes: int, **changed: Any) -> bool:
        try:
            attempt(config.model_copy(update=changed), nbytes)
        except MemoryBudgetError:
            return False
        return True

    def fewer(name: str, now: int, least: int, unit: int) -> int | None:
        return _first(lambda less: fits(memory, **{name: now - less * unit}), 0, (now - least) // unit)

    if (steps := _first(lambda steps: fits(steps * STEP), memory // STEP, MOST_MEMORY // STEP)) is not None:
        yield "memory", (steps + WAVER) * STEP
    there = (config.device_memory or 0) // STEP
    if (steps := _first(lambda steps: fits(memory, device_memory=steps * STEP), there, MOST_MEMORY // STEP)) is not None:
        yield "device_memory", steps * STEP
    for name, now, least, unit in (
        ("prefetch_depth", config.prefetch_depth, 1, 1),
        ("max_concurrent_requests", config.max_concurrent_requests, 1, 1),
        ("max_context_tokens", config.max_context_tokens or context, LEAST_CONTEXT, 1),
        ("offload_cpu_layers", config.offload_cpu_layers or 0, 0, 1),
        ("offload_gpu_layers", config.offload_gpu_layers or 0, 0, 1),
        ("kv_cache_memory", config.kv_cache_memory or STEP, STEP, STEP),
        ("expert_memory", config.expert_memory or STEP, STEP, STEP),
    ):
        if (less := fewer(name, now, least, unit)) is not None:
            yield name, now - less * unit
    if PRESETS[config.kv_cache_strategy].layout is None and fits(memory, kv_cache_strategy=ON_DISK):
        yield "kv_cache_strategy", ON_DISK
    if config.multimodal and fits(memory, multimodal=False):
        yield "multimodal", False


def _typed(nbytes: int) -> str:
    """A size as it is typed: read again, it is no less than this one."""
    return f"{-(-nbytes // STEP)}MiB"


def _first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number above `low`, up to `high`, for which `holds`, which holds for all above it; None if there is none."""
    if high <= low or not holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
