"""The examination: all checks of this machine, one after the other, in the order in which they are told."""

from __future__ import annotations

import resource
from collections.abc import AsyncIterator
from pathlib import Path

import anyio.to_thread
import psutil
import torch

from ..compute import processors
from ..disk.uring import probe
from ..errors import ConfigError
from ..inventory import downloads
from ..probe import existing, free_memory, same_drive
from ..settings import GenerationConfig, RuntimeConfig
from .check import Check
from .processor import check_device, check_gds, check_memory_speed, check_threads, check_torch, quota
from .storage import Tell, check_cache_root, check_drive, check_free_disk, check_models_folder, check_weights_drive, weights_in
from .system import check_files, check_io_uring, check_load, check_locked, check_memory, check_swap

MOUNTS = Path("/proc/self/mountinfo")


async def examine(cache_dir: Path, models_dir: Path | None, load: float, tell: Tell) -> AsyncIterator[Check]:
    """All that is to be found out about the machine. `load` is that of before; `tell` is told what is being done."""
    tell("looking at the processor")
    yield check_torch()
    yield check_threads(torch.get_num_threads(), processors(), quota())
    yield await anyio.to_thread.run_sync(check_device)
    yield await anyio.to_thread.run_sync(check_gds)
    tell("looking at memory")
    swap = psutil.swap_memory()
    yield check_memory(free_memory(), int(psutil.virtual_memory().total))
    yield check_swap(int(swap.used), int(swap.total))
    yield check_load(load, processors())
    yield await anyio.to_thread.run_sync(check_memory_speed, free_memory())
    tell("looking at folders")
    mounts = await anyio.to_thread.run_sync(lambda: MOUNTS.read_text() if MOUNTS.exists() else "")
    root = await anyio.to_thread.run_sync(check_cache_root, cache_dir, mounts)
    yield root
    if root.state != "problem":
        yield await anyio.to_thread.run_sync(check_free_disk, cache_dir)
        for check in await check_drive(cache_dir, tell):
            yield check
    models = downloads(models_dir)
    yield await anyio.to_thread.run_sync(check_models_folder, models, mounts)
    if await anyio.to_thread.run_sync(_apart, cache_dir, models):
        yield await check_weights_drive(await anyio.to_thread.run_sync(weights_in, models), tell)
    yield check_io_uring(await anyio.to_thread.run_sync(probe))
    yield check_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    if (locked := check_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])) is not None:
        yield locked


def settled(cache_dir: str | None, models_dir: str | None) -> tuple[Check, RuntimeConfig]:
    """Whether settings of the environment and of aollm.toml can be used, and those that a run would have; the defaults where they
    cannot. Raises `ConfigError` for folders that are none."""
    given = {name: value for name, value in (("cache_dir", cache_dir), ("models_dir", models_dir)) if value is not None}
    plain = RuntimeConfig.of(RuntimeConfig.model_validate({"model_reference": ""}), given)
    try:
        config = RuntimeConfig.of("", given)
        GenerationConfig.of(None, {})
    except ConfigError as error:
        return Check("settings", "problem", str(error), "mend it there: runs refuse it"), plain
    said = {**RuntimeConfig.said(), **GenerationConfig.said()}
    told = "all defaults" if not said else f"{len(said)} of your own: {', '.join(sorted(said))}"
    return Check("settings", "ok", told, None, {name: str(each.source) for name, each in said.items()}), config


def _apart(cache_dir: Path, models: Path) -> bool:
    """Whether models are on another drive than KV."""
    return not same_drive(cache_dir, [str(existing(models))])
