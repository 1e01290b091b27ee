"""`aollm plan`: what a run would keep, stream and need; from headers alone, and a short measurement of the drive."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import anyio

from ..buffers import Ring, size
from ..disk.auto import open_disk
from ..meter import amount, rate, speed
from ..plan import RuntimePlan
from ..port import Port
from ..probe import CHUNK, drive_speed
from ..reference import find
from ..settings import RuntimeConfig
from ..stores.presets import PRESETS
from ..survey import Survey
from ..terminal import Terminal, spinner
from ..tiers import Choice, choose
from . import runtime_config
from .fetch import fetched


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the plan. Raises `AollmError` when the model cannot be used, or not in this memory."""
    config = runtime_config(options)
    config = anyio.run(fetched, terminal, config)
    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("reading headers and measuring the drive", "dim")]])
    choice, drive = anyio.run(_plan, config)
    terminal.status(None)
    if options.get("json"):
        terminal.text(json.dumps({**choice.plan.as_dict(), "drive_bytes_per_second": drive}) + "\n")
        return 0
    _print(terminal, config, choice, drive)
    return 0


async def _plan(config: RuntimeConfig) -> tuple[Choice, float | None]:
    """The plan, and the drive's speed in bytes per second if anything is to be streamed natively."""
    folder = await find(config.model_reference, config.models_dir, config.force_download)
    async with Port() as port:
        disk, reason = open_disk(config.disk_backend, port, folder)
        try:
            choice = await choose(config, folder, disk, reason)
            streamed = choice.found.streamed if choice.found is not None else []
            return choice, await drive_speed(disk, streamed, Ring(2 * CHUNK)) if streamed else None
        finally:
            await disk.aclose()


def _print(terminal: Terminal, config: RuntimeConfig, choice: Choice, drive: float | None) -> None:
    plan = choice.plan
    terminal.line()
    terminal.line([(f"  {plan.model}", "bold"), (f"  {plan.family}, {plan.dtype}, {amount(plan.weights_nbytes)} of weights", "")])
    terminal.line()
    width = min(terminal.width - 4, 80)
    strip = "".join("█" if place == "host" else "░" for place in plan.placement)
    for at in range(0, len(strip), width):
        terminal.line([(f"  {strip[at : at + width]}", "cyan")])
    streamed = amount(plan.streamed_nbytes_per_pass)
    terminal.line([(f"  █ stays in memory: {amount(plan.pinned_nbytes)}   ░ is read in every pass: {streamed}", "dim")])
    terminal.line()
    for name, nbytes in plan.ledger.items():
        terminal.line([(f"  {name:<28}", ""), (f"{size(nbytes):>12}", "cyan")])
    terminal.line([(f"  {'memory, of at most':<28}", ""), (f"{size(sum(plan.ledger.values())):>12} of {size(plan.memory)}", "cyan")])
    terminal.line()
    for name, value in (*_tier(plan), *_rows(config, plan, choice.found), *_drive(plan, choice.found, drive)):
        terminal.line([(f"  {name:<10}", ""), (value, "cyan")])
    terminal.line()


def _tier(plan: RuntimePlan) -> Iterator[tuple[str, str]]:
    """What answers, why it is not our own layers if it is not, and what is to be seen of those that are."""
    yield "tier", plan.backend
    if plan.specialization_reason is not None:
        yield "", f"{plan.specialization_state}: {plan.specialization_reason}"
    for number, planned in enumerate(plan.passes):
        yield "passes" if not number else "", f"{planned.id}: {planned.reason}"


def _rows(config: RuntimeConfig, plan: RuntimePlan, found: Survey | None) -> Iterator[tuple[str, str]]:
    """What is there besides layers, and how much fits."""
    if found is not None and plan.experts:
        counts, tops = _experts(found)
        yield "experts", f"{plan.expert_slots:,} of {plan.experts:,} have room, {max(tops)} of {max(counts)} are read a layer and token"
    if found is not None and found.tower is not None:
        yield found.tower.kind, f"{amount(sum(piece.read_nbytes for piece in found.tower_pieces))} of weights, read once for each"
    if found is not None and found.adapters.names:
        yield "adapters", ", ".join(found.adapters.names)
    yield "context", f"{plan.max_context_tokens:,} tokens a request"
    yield from zip(("kv cache", ""), _kv(config, plan), strict=True)
    yield "disk", plan.disk_reason


def _drive(plan: RuntimePlan, found: Survey | None, drive: float | None) -> Iterator[tuple[str, str]]:
    """How fast the drive is, and the most tokens that it can serve one request with."""
    if drive is None or found is None:
        streams = plan.streamed_nbytes_per_pass > 0
        yield "drive", "not measured: it is read layer by layer, none ahead" if streams else "nothing is read after opening"
        return
    yield "drive", f"{rate(drive)}, measured now"
    nbytes, alike = float(plan.streamed_nbytes_per_pass), ""
    if plan.expert_slots < plan.experts:
        each = sum(piece.read_nbytes for piece in found.experts.values()) / plan.experts
        nbytes += sum(_experts(found)[1]) * each * (1 - plan.expert_slots / plan.experts)
        alike = " if all experts are asked for alike"
    yield "at best", f"{speed(drive / nbytes)} for one request, by the drive{alike}; requests share each pass"


def _experts(found: Survey) -> tuple[list[int], list[int]]:
    """How many experts each layer with experts has, and how many of them a token takes."""
    mixtures = [step.experts for step in found.family.steps if step.experts is not None]
    return [mixture.count for mixture in mixtures], [mixture.top for mixture in mixtures]


def _kv(config: RuntimeConfig, plan: RuntimePlan) -> tuple[str, str]:
    """What keeps keys and values, and how many of them where."""
    preset = PRESETS[plan.kv_cache_strategy]
    kept_by = "transformers" if plan.backend == "transformers-generic" else plan.kv_cache_strategy
    first = f"{kept_by}, {config.kv_cache_lifecycle}: {amount(plan.kv_nbytes_per_token)} a token, {plan.kv_tokens:,} tokens in memory"
    if preset.layout is None:
        return f"{first} for all requests together", "nothing of it is written to disk"
    window = config.kv_cache_window_tokens
    kept = f"blocks of the last {window:,} tokens of a request go to" if window else "whole blocks go to"
    coded = "" if not preset.codec.representation else f" as {preset.codec.representation}"
    quota = f", {size(config.kv_cache_max_bytes)} at most" if config.kv_cache_max_bytes else ""
    return first, f"{kept} {config.cache_dir / preset.root}{coded}{quota}"
