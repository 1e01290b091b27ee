"""What is known of a model before its first weight is read: its folder, text, family, pieces, and the plan for running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import psutil

from .checkpoint import Checkpoint, open_checkpoint, read_json
from .demo import MODEL as DEMO
from .disk.base import Disk
from .errors import ModelError
from .families import FAMILIES
from .families.base import Family
from .plan import RuntimePlan, make_plan
from .probe import free_memory
from .settings import RuntimeConfig
from .text import Text
from .weights import Piece, check_shape, dtype_of, pieces_of

ALIASES: dict[str, Path] = {"demo": DEMO}


@dataclass(frozen=True, slots=True)
class Survey:
    """A model, and how it would be run."""

    text: Text
    checkpoint: Checkpoint
    family: Family
    pieces: Sequence[Piece]
    plan: RuntimePlan


async def survey(config: RuntimeConfig, folder: Path, disk: Disk, reason: str) -> Survey:
    """Read the headers in `folder` through `disk`, which was chosen for `reason`, and plan.

    Raises `ModelError` for a model that cannot be used, `MemoryBudgetError` for one that cannot be run in the memory given.
    """
    described = await read_json(folder / "config.json")
    text = await anyio.to_thread.run_sync(Text.load, folder)
    checkpoint = await open_checkpoint(folder, disk)
    family = build_family(described, checkpoint)
    pieces = pieces_of(family, checkpoint)
    in_use = psutil.Process().memory_info().rss
    memory = config.memory or in_use + int(free_memory() * 0.9)
    plan = make_plan(config, str(described["model_type"]), family, pieces, memory, in_use, (disk.name, reason))
    return Survey(text, checkpoint, family, pieces, plan)


def locate(reference: str) -> Path:
    """The folder of a model's reference; `ModelError` when there is none."""
    try:
        folder = ALIASES.get(reference) or Path(reference).expanduser()
        found, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{reference[:200]!r} is not a path that can be looked up ({error}); give the folder of a model") from error
    if not found:
        what = "is a file, not a folder" if exists else "does not exist"
        raise ModelError(f"{reference} {what}; give the folder of a model (config.json and *.safetensors), or one of: {', '.join(ALIASES)}")
    return folder


def build_family(config: Mapping[str, Any], checkpoint: Checkpoint) -> Family:
    """The family that `config.json` names, with the dtype of the stored weights."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ModelError(f"config.json: model_type {kind!r} is not known; known are {', '.join(FAMILIES)}")
    entry = next((checkpoint[name] for name in checkpoint.tensors if name.endswith("embed_tokens.weight")), None)
    if entry is None:
        raise ModelError("the checkpoint has no embedding table (…embed_tokens.weight); it is not a whole model")
    family = FAMILIES[kind](config, dtype_of(entry))
    check_shape(checkpoint[family.embedding], (family.vocabulary, family.hidden))
    return family
