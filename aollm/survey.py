"""What is known of a model before its first weight is read: its folder, text, family, pieces, and the plan for running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import anyio.to_thread
import torch
from torch.nn import functional

from .adapters import Adapters, load_adapters
from .blueprint import EMBEDDING, weights_of
from .buffers import Ring
from .checkpoint import Checkpoint, read_json
from .device import Device, choose_device
from .disk.base import Disk, Extent
from .errors import DiskError, MemoryBudgetError, ModelError, SpecializationError
from .experts import Key
from .families import FAMILIES, TOWERS, unread_quantization
from .families.base import Family, Tower
from .fit import fitted
from .piece import Piece, check_shape, dtype_of, expert_pieces, pieces_of, step_piece
from .probe import drive_speed, free_disk, memory_budget, same_drive
from .runtime_plan import KV_SHARE, SLACK, RuntimePlan, make_plan
from .selector import Inputs, Selection, select
from .settings import RuntimeConfig
from .stores.presets import PRESETS
from .text import Text

AUTO = "auto"
"""The strategy of those who leave it to the selector."""
GLANCE = 4 << 20
"""Bytes that are read at a time to see whether a drive is slow."""
PROBED = 256
"""Pieces that are enough to measure the drive with."""


@dataclass(frozen=True, slots=True)
class Survey:
    """A model, and how it would be run."""

    text: Text
    checkpoint: Checkpoint
    family: Family
    pieces: Sequence[Piece]
    experts: Mapping[Key, Piece]
    adapters: Adapters
    tower: Tower | None
    tower_pieces: Sequence[Piece]
    config: RuntimeConfig
    """As asked for, with the strategy that was chosen where it was `auto`."""
    plan: RuntimePlan
    plan_of: Callable[[RuntimeConfig], RuntimePlan]
    """The plan for the same model run otherwise."""
    device: Device

    async def without(self, reason: str) -> Survey | None:
        """The same with the next strategy in the selector's chain, as the one planned cannot be opened for `reason`; None where
        there is none. Raises `MemoryBudgetError` where that does not fit."""
        following = self.plan.selection.without(reason) if self.plan.selection is not None else None
        if following is None:
            return None
        config, plan = await anyio.to_thread.run_sync(_selected, self.config, following, self.plan_of)
        return replace(self, config=config, plan=plan)

    @property
    def streamed(self) -> list[Extent]:
        """Some of what is read again and again, from all over the model: pieces that are not kept, or else experts where not all
        have room."""
        pieces = [piece for index, piece in enumerate(self.pieces) if index not in self.plan.pinned]
        if not pieces and self.plan.expert_slots < self.plan.experts:
            pieces = list(self.experts.values())
        return [extent for piece in Random().sample(pieces, min(len(pieces), PROBED)) for extent, _ in piece.reads]


async def survey(config: RuntimeConfig, folder: Path, disk: Disk, reason: str, here: bool = True, on: Device | None = None) -> Survey:
    """Read the headers in `folder` through `disk`, which was chosen for `reason`, and plan.

    Unless weights have to be `here`, they may be known by a blueprint. `on`: the device, in the place of the one that is set.
    Raises `ModelError` for a model that cannot be used, `MemoryBudgetError` for one that cannot be run in the memory given,
    `ConfigError` for a device that is not there.
    """
    described = await read_json(folder / "config.json")
    text = await anyio.to_thread.run_sync(Text.load, folder)
    checkpoint = await weights_of(folder, disk, described, here)
    family = await anyio.to_thread.run_sync(build_family, described, checkpoint)
    pieces = await anyio.to_thread.run_sync(pieces_of, family, checkpoint)
    experts = await anyio.to_thread.run_sync(expert_pieces, family, checkpoint)
    tower = await build_tower(described, family.dtype, checkpoint, text) if config.multimodal else None
    tower_pieces = [] if tower is None else [step_piece(step, checkpoint, tower.dtype) for step in tower.steps]
    adapters = await anyio.to_thread.run_sync(_adapters, config, family, checkpoint)
    if tower is not None:
        await anyio.to_thread.run_sync(_without_memory)
    chosen = choose_device(config.device, on)
    memory, in_use = memory_budget(config.memory)

    def attempt(config: RuntimeConfig, memory: int) -> RuntimePlan:
        towers = (tower, tower_pieces) if config.multimodal else (None, [])
        return make_plan(
            config, str(described["model_type"]), family, pieces, experts, towers, adapters.nbytes,
            memory, in_use, (disk.name, reason), checkpoint.fingerprint is not None, chosen,
        )  # fmt: skip

    def plan_of(config: RuntimeConfig) -> RuntimePlan:
        return fitted(attempt, config, memory, family.context)

    if config.kv_cache_strategy == AUTO:
        selection = await _selection(config, family, memory - in_use - SLACK, disk, pieces, checkpoint)
        config, plan = await anyio.to_thread.run_sync(_selected, config, selection, plan_of)
    else:
        plan = await anyio.to_thread.run_sync(plan_of, config)
    return Survey(text, checkpoint, family, pieces, experts, adapters, tower, tower_pieces, config, plan, plan_of, chosen.device)


async def _selection(
    config: RuntimeConfig, family: Family, free: int, disk: Disk, pieces: Sequence[Piece], checkpoint: Checkpoint
) -> Selection:  # fmt: skip
    """The strategy that fits what is measured, with `free` bytes to divide. The drive is read only where something would be written."""
    room = await anyio.to_thread.run_sync(free_disk, config.cache_dir)
    inputs = Inputs(
        free, config.kv_cache_memory or max(int(free * KV_SHARE), 0), family.kv.token_nbytes,
        config.max_context_tokens or family.context, config.max_context_tokens is not None, config.max_concurrent_requests,
        config.kv_cache_lifecycle == "persistent", None, room, config.kv_cache_window_tokens,
    )  # fmt: skip
    selection = select(config.strategy_selector_profile, inputs)
    extents = [extent for piece in pieces for extent, _ in piece.reads]
    if PRESETS[selection.choice].layout is None or sum(extent.nbytes for extent in extents) < 8 * GLANCE:
        return selection  # a few bytes say nothing of a drive
    if not await anyio.to_thread.run_sync(same_drive, config.cache_dir, checkpoint.files):
        return selection
    try:
        drive = await drive_speed(disk, extents, Ring(2 * GLANCE), 8 * GLANCE)
    except DiskError:  # whoever reads the weights will say so
        return selection
    return select(config.strategy_selector_profile, replace(inputs, drive_bytes_per_second=drive))


def _selected(
    config: RuntimeConfig, selection: Selection, plan_of: Callable[[RuntimeConfig], RuntimePlan]
) -> tuple[RuntimeConfig, RuntimePlan]:  # fmt: skip
    """The first of the chain that fits the memory, and its plan. Raises the first one's `MemoryBudgetError` where none does."""
    first: MemoryBudgetError | None = None
    following: Selection | None = selection
    while following is not None:
        window = following.window_tokens if PRESETS[following.strategy].windowed else None
        named = config.model_copy(update={"kv_cache_strategy": following.strategy, "kv_cache_window_tokens": window})
        try:
            return named, replace(plan_of(named), selection=following)
        except MemoryBudgetError as error:
            first = first or error
            following = following.without(str(error))
    assert first is not None
    raise first


def build_family(config: Mapping[str, Any], checkpoint: Checkpoint) -> Family:
    """The family that `config.json` names, with the dtype of the stored weights."""
    kind = config.get("model_type")
    if kind is None:
        raise SpecializationError("config.json names no model_type; download it again, from where the model was published")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SpecializationError(f"config.json: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}")
    if (method := unread_quantization(config)) is not None:
        raise SpecializationError(f"config.json: weights quantized by {method!r} are not read here")
    entry = next((checkpoint[name] for name in checkpoint.tensors if name.endswith(EMBEDDING)), None)
    if entry is None:
        raise ModelError(f"the checkpoint has no embedding table (…{EMBEDDING}); it is not a whole model")
    family = FAMILIES[kind](config, dtype_of(entry), entry.name.removesuffix(EMBEDDING))
    check_shape(checkpoint[family.embedding], (family.vocabulary, family.hidden))
    return family


async def build_tower(config: Mapping[str, Any], dtype: torch.dtype, checkpoint: Checkpoint, text: Text) -> Tower | None:
    """What takes the model's images or sounds, if it takes any."""
    make = TOWERS.get(str(config.get("model_type")))
    if make is None:
        return None
    file = checkpoint.folder / "preprocessor_config.json"
    given = await read_json(file) if await anyio.to_thread.run_sync(file.exists) else {}
    return make(config, dtype, checkpoint.tensors, given, text.newlines())


def _adapters(config: RuntimeConfig, family: Family, checkpoint: Checkpoint) -> Adapters:
    loaded = {} if config.adapter_dir is None else load_adapters(config.adapter_dir)
    return Adapters(loaded, family, checkpoint)


def _without_memory() -> None:
    """Have torch load what it needs for tensors that take no memory, on which towers are tried: 75 MB of modules, to be counted."""
    x = torch.empty(1, 1, device="meta")
    functional.layer_norm(functional.linear(x, x), (1,))
