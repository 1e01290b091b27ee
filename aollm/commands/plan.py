"""`aollm plan`: what a run would keep, stream and need; from headers alone, and a short measurement of the drive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import psutil

from ..buffers import Ring, size
from ..checkpoint import open_checkpoint, read_json
from ..disk.auto import open_disk
from ..meter import amount, rate, speed
from ..plan import RuntimePlan, make_plan
from ..port import Port
from ..probe import drive_speed, free_memory
from ..runtime import PROBE_NBYTES, build_family, locate
from ..settings import RuntimeConfig
from ..terminal import Terminal, spinner
from ..text import Text
from ..weights import first_of, pieces_of
from . import runtime_config


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the plan. Raises `AollmError` when the model cannot be used, or not in this memory."""
    config = runtime_config(options)
    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("reading headers and measuring the drive", "dim")]])
    try:
        plan, drive = anyio.run(_plan, config)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised
    terminal.status(None)
    if options.get("json"):
        terminal.text(json.dumps({**plan.as_dict(), "drive_bytes_per_second": drive}) + "\n")
        return 0
    _print(terminal, plan, drive)
    return 0


async def _plan(config: RuntimeConfig) -> tuple[RuntimePlan, float | None]:
    """The plan, and the drive's speed in bytes per second if anything is to be streamed."""
    folder = locate(config.model_reference)
    described = await read_json(folder / "config.json")
    await anyio.to_thread.run_sync(Text.load, folder)  # a run has it in memory, and fails without it
    port = Port()
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(port.pump)
            try:
                found = await _measured(config, folder, described, port)
            finally:
                port.stop()
    finally:
        port.close()
    return found


async def _measured(config: RuntimeConfig, folder: Path, described: Mapping[str, Any], port: Port) -> tuple[RuntimePlan, float | None]:
    disk, reason = open_disk(config.disk_backend, port, folder)
    try:
        checkpoint = await open_checkpoint(folder, disk)
        family = build_family(described, checkpoint)
        pieces = pieces_of(family, checkpoint)
        in_use = psutil.Process().memory_info().rss
        memory = config.memory or in_use + int(free_memory() * 0.9)
        plan = make_plan(config, str(described["model_type"]), family, pieces, memory, in_use, (disk.name, reason))
        streamed = [extent for index, piece in enumerate(pieces) if index not in plan.pinned for extent, _ in piece.reads]
        return plan, await drive_speed(disk, streamed, Ring(plan.ring_nbytes), PROBE_NBYTES) if streamed else None
    finally:
        await disk.aclose()


def _print(terminal: Terminal, plan: RuntimePlan, drive: float | None) -> None:
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
    terminal.line([("  context   ", ""), (f"{plan.max_context_tokens} tokens a request, {plan.kv_tokens} in all", "cyan")])
    terminal.line([("  disk      ", ""), (plan.disk_reason, "cyan")])
    if drive is not None:
        terminal.line([("  drive     ", ""), (f"{rate(drive)}, measured now", "cyan")])
        terminal.line(
            [("  at best   ", ""), (f"{speed(drive / streamed)} for one request, by the drive; requests share each pass", "cyan")]
        )
    else:
        terminal.line([("  drive     ", ""), ("nothing is read after opening", "cyan")])
    terminal.line()
