"""`aollm plan`: what a run would keep, stream and need; from headers alone, and a short measurement of the drive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import anyio

from ..buffers import Ring, size
from ..disk.auto import open_disk
from ..meter import amount, rate, speed
from ..plan import RuntimePlan
from ..port import Port
from ..probe import drive_speed
from ..reference import find
from ..settings import RuntimeConfig
from ..stores.presets import PRESETS
from ..survey import survey
from ..terminal import Terminal, spinner
from . import runtime_config
from .fetch import fetched


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the plan. Raises `AollmError` when the model cannot be used, or not in this memory."""
    config = runtime_config(options)
    config = anyio.run(fetched, terminal, config)
    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("reading headers and measuring the drive", "dim")]])
    plan, drive = anyio.run(_plan, config)
    terminal.status(None)
    if options.get("json"):
        terminal.text(json.dumps({**plan.as_dict(), "drive_bytes_per_second": drive}) + "\n")
        return 0
    _print(terminal, config, plan, drive)
    return 0


async def _plan(config: RuntimeConfig) -> tuple[RuntimePlan, float | None]:
    """The plan, and the drive's speed in bytes per second if anything is to be streamed."""
    folder = await find(config.model_reference, config.models_dir, config.force_download)
    async with Port() as port:
        disk, reason = open_disk(config.disk_backend, port, folder)
        try:
            found = await survey(config, folder, disk, reason)
            streamed = [extent for index, piece in enumerate(found.pieces) if index not in found.plan.pinned for extent, _ in piece.reads]
            return found.plan, await drive_speed(disk, streamed, Ring(found.plan.ring_nbytes)) if streamed else None
        finally:
            await disk.aclose()


def _print(terminal: Terminal, config: RuntimeConfig, plan: RuntimePlan, drive: float | None) -> None:
    streamed = plan.streamed_nbytes_per_pass
    terminal.line()
    terminal.line([(f"  {plan.model}", "bold"), (f"  {plan.family}, {plan.dtype}, {amount(plan.weights_nbytes)} of weights", "")])
    terminal.line()
    width = min(terminal.width - 4, 80)
    strip = "".join("█" if place == "host" else "░" for place in plan.placement)
    for at in range(0, len(strip), width):
        terminal.line([(f"  {strip[at : at + width]}", "cyan")])
    terminal.line([(f"  █ stays in memory: {amount(plan.pinned_nbytes)}   ░ is read in every pass: {amount(streamed)}", "dim")])
    terminal.line()
    for name, nbytes in plan.ledger.items():
        terminal.line([(f"  {name:<28}", ""), (f"{size(nbytes):>12}", "cyan")])
    terminal.line([(f"  {'memory, of at most':<28}", ""), (f"{size(sum(plan.ledger.values())):>12} of {size(plan.memory)}", "cyan")])
    terminal.line()
    terminal.line([("  context   ", ""), (f"{plan.max_context_tokens:,} tokens a request", "cyan")])
    for name, value in zip(("kv cache", ""), _kv(config, plan), strict=True):
        terminal.line([(f"  {name:<10}", ""), (value, "cyan")])
    terminal.line([("  disk      ", ""), (plan.disk_reason, "cyan")])
    if drive is not None:
        terminal.line([("  drive     ", ""), (f"{rate(drive)}, measured now", "cyan")])
        terminal.line(
            [("  at best   ", ""), (f"{speed(drive / streamed)} for one request, by the drive; requests share each pass", "cyan")]
        )
    else:
        terminal.line([("  drive     ", ""), ("nothing is read after opening", "cyan")])
    terminal.line()


def _kv(config: RuntimeConfig, plan: RuntimePlan) -> tuple[str, str]:
    """What keeps keys and values, and how many of them where."""
    preset, a_token = PRESETS[plan.kv_cache_strategy], amount(plan.kv_nbytes_per_token)
    first = f"{plan.kv_cache_strategy}, {config.kv_cache_lifecycle}: {a_token} a token, {plan.kv_tokens:,} tokens in memory"
    if preset.layout is None:
        return f"{first} for all requests together", "nothing of it is written to disk"
    window = config.kv_cache_window_tokens
    kept = f"blocks of the last {window:,} tokens of a request go to" if window else "whole blocks go to"
    coded = "" if not preset.codec.representation else f" as {preset.codec.representation}"
    quota = f", {size(config.kv_cache_max_bytes)} at most" if config.kv_cache_max_bytes else ""
    return first, f"{kept} {config.cache_dir / preset.root}{coded}{quota}"
