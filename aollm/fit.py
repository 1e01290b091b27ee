"""Fit: where a plan does not fit, the smallest changes that would make it fit, each by itself. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .buffers import size
from .errors import MemoryBudgetError
from .runtime_plan import RuntimePlan
from .settings import RuntimeConfig

STEP = 1 << 20
"""Memory is told to this many bytes."""
LEAST_CONTEXT = 256
MOST_MEMORY = 1 << 44

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
        told = ", or ".join(f"{name}={size(value) if name in ('memory', 'device_memory') else value}" for name, value in changes.items())
        raise MemoryBudgetError(f"{error}; it would fit with {told}" if told else str(error), changes) from error


def _changes(attempt: Attempt, config: RuntimeConfig, memory: int, context: int) -> Iterator[tuple[str, Any]]:
    """Setting and value of each change that does: the least memory, then the largest values below those of today."""

    def fits(nbytes: int, **changed: Any) -> bool:
        try:
            attempt(config.model_copy(update=changed), nbytes)
        except MemoryBudgetError:
            return False
        return True

    if (steps := _first(lambda steps: fits(steps * STEP), memory // STEP, MOST_MEMORY // STEP)) is not None:
        yield "memory", steps * STEP
    there = (config.device_memory or 0) // STEP
    if (steps := _first(lambda steps: fits(memory, device_memory=steps * STEP), there, MOST_MEMORY // STEP)) is not None:
        yield "device_memory", steps * STEP
    for name, now, least in (
        ("prefetch_depth", config.prefetch_depth, 1),
        ("max_concurrent_requests", config.max_concurrent_requests, 1),
        ("max_context_tokens", config.max_context_tokens or context, LEAST_CONTEXT),
    ):
        fewer = partial(_fits_with, fits, memory, name, now)
        if (less := _first(fewer, 0, now - least)) is not None:
            yield name, now - less
    if config.multimodal and fits(memory, multimodal=False):
        yield "multimodal", False


def _fits_with(fits: Callable[..., bool], memory: int, name: str, now: int, less: int) -> bool:
    return fits(memory, **{name: now - less})


def _first(holds: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number above `low`, up to `high`, for which `holds`, which holds for all above it; None if there is none."""
    if high <= low or not holds(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
