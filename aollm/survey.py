"""What is known of a model before its first weight is read: its folder, text, family, pieces, and the plan for running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from torch.nn import functional

from .adapters import Adapters, load_adapters
from .checkpoint import Checkpoint, open_checkpoint, read_json
from .disk.base import Disk, Extent
from .errors import ModelError, SpecializationError
from .experts import Key
from .families import FAMILIES, TOWERS
from .families.base import Family, Tower
from .plan import RuntimePlan, make_plan
from .probe import memory_budget
from .settings import RuntimeConfig
from .text import Text
from .weights import Piece, check_shape, dtype_of, expert_pieces, pieces_of, step_piece

PROBED = 256
"""Experts that are enough to measure the drive with."""
EMBEDDING = "embed_tokens.weight"


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
    plan: RuntimePlan

    @property
    def streamed(self) -> list[Extent]:
        """What is read again and again: the pieces that are not kept, or else experts where not all have room."""
        pieces = [piece for index, piece in enumerate(self.pieces) if index not in self.plan.pinned]
        if not pieces and self.plan.expert_slots < self.plan.experts:
            pieces = list(islice(self.experts.values(), PROBED))
        return [extent for piece in pieces for extent, _ in piece.reads]


async def survey(config: RuntimeConfig, folder: Path, disk: Disk, reason: str) -> Survey:
    """Read the headers in `folder` through `disk`, which was chosen for `reason`, and plan.

    Raises `ModelError` for a model that cannot be used, `MemoryBudgetError` for one that cannot be run in the memory given.
    """
    described = await read_json(folder / "config.json")
    text = await anyio.to_thread.run_sync(Text.load, folder)
    checkpoint = await open_checkpoint(folder, disk)
    family = await anyio.to_thread.run_sync(build_family, described, checkpoint)
    pieces = await anyio.to_thread.run_sync(pieces_of, family, checkpoint)
    experts = await anyio.to_thread.run_sync(expert_pieces, family, checkpoint)
    tower = await build_tower(described, family.dtype, checkpoint, text) if config.multimodal else None
    tower_pieces = [] if tower is None else [step_piece(step, checkpoint, tower.dtype) for step in tower.steps]
    adapters = await anyio.to_thread.run_sync(_adapters, config, family, checkpoint)
    if tower is not None:
        await anyio.to_thread.run_sync(_without_memory)
    memory, in_use = memory_budget(config.memory)
    plan = make_plan(
        config, str(described["model_type"]), family, pieces, experts, (tower, tower_pieces), adapters.nbytes,
        memory, in_use, (disk.name, reason), checkpoint.fingerprint is not None,
    )  # fmt: skip
    return Survey(text, checkpoint, family, pieces, experts, adapters, tower, tower_pieces, plan)


def build_family(config: Mapping[str, Any], checkpoint: Checkpoint) -> Family:
    """The family that `config.json` names, with the dtype of the stored weights."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise SpecializationError(f"config.json: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}")
    if (quantization := config.get("quantization_config")) and kind != "gpt_oss":
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
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
