"""Planning without running: `await aollm.plan(model)` tells what a run would keep, read, take and need. No weights are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from .buffers import Ring
from .compute import Compute, processors
from .disk.auto import open_disk
from .forecast import foretell
from .outlook import Outlook, choose
from .port import Port
from .probe import CHUNK, drive_speed, folder_speed
from .reference import describe
from .runtime_plan import RuntimePlan
from .settings import RuntimeConfig


async def plan(model: RuntimeConfig | str | Path, **fields: Any) -> RuntimePlan:
    """How `model` would be run, as `Runtime.open` takes it, with what that foretells of this machine in `predicted`.

    It reads `config.json` and the weights' headers, and measures drive and processor for less than a second. A model that is
    not here yet is known by its configuration and index, which are fetched; the drive is measured with a file that is removed again.
    Raises what opening raises: `ConfigError`, `ModelError`, `MemoryBudgetError` (with what would make it fit), `DiskError`.

    plan = await aollm.plan("demo", memory="1GiB")
    print(plan.ledger, plan.predicted.speeds[0].tokens_per_second)
    """
    return (await look(RuntimeConfig.of(model, fields))).plan


async def look(config: RuntimeConfig) -> Outlook:
    """The plan and what it was made of."""
    folder = await describe(config.model_reference, config.models_dir, config.force_download)
    async with Port() as port:
        disk, reason = open_disk(config.disk_backend, port, folder)
        try:
            outlook = await choose(config, folder, disk, reason)
            if outlook.found is None or outlook.plan.device_memory:
                return outlook
            found, ring = outlook.found, Ring(2 * CHUNK)

            async def probe() -> float | None:
                if not found.streamed:
                    return None
                if not found.checkpoint.files:  # its weights are not here yet
                    return await folder_speed(disk, folder, ring)
                return await drive_speed(disk, found.streamed, ring)

            compute = Compute(port, processors())
            try:
                forecast = await foretell(outlook.plan, found.family, found.pieces, found.experts, compute, probe)
            finally:
                compute.close()
            return replace(outlook, plan=replace(outlook.plan, predicted=None if forecast is None else forecast.prediction()))
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()
