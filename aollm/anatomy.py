"""The anatomy of a model: what it is, by its `config.json` and the headers of its files. No weight is read.

It refuses to know how the model would be run: that is the plan's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch

from .checkpoint import Checkpoint, open_checkpoint, read_json
from .disk.base import Disk
from .errors import ModelError, SpecializationError
from .export.manifest import LIMIT, NAME, parse_manifest
from .export.opening import find_export
from .families import TOWERS, unread_quantization
from .families.base import Family, Need, Tower
from .families.quantization import quantization
from .hub import TOKENIZERS
from .inventory import disk_nbytes
from .piece import dtype_of, expert_pieces, pieces_of, step_piece
from .survey import build_family

TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEKKEN = "tekken.json"
"""Mistral's tokenizer, which brings a chat template."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts: so many in each of `layers` layers, of which a token takes `top`."""

    count: int
    top: int
    layers: int


@dataclass(frozen=True, slots=True)
class Sense:
    """A tower: what it takes, `image` or `audio`, and its weights."""

    kind: str
    weights_nbytes: int


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What is None could not be told. `parameters` are all; `active_parameters` those that one token of text is multiplied with:
    neither towers nor experts that it does not take, nor an embedding table that is only looked up. `disk_nbytes` has all files,
    `weights_nbytes` the tensors alone."""

    folder: Path
    architecture: str | None
    model_type: str | None
    tier: str | None
    tier_reason: str
    layers: int | None
    experts: Mixture | None
    hidden: int | None
    vocabulary: int | None
    context: int | None
    dtype: str | None
    quantization: str | None
    parameters: int | None
    active_parameters: int | None
    weights_nbytes: int
    disk_nbytes: int
    kv_nbytes_per_token: int | None
    state_nbytes: int | None
    towers: tuple[Sense, ...]
    tokenizer: str | None
    chat_template: bool
    exported: bool
    files: dict[str, int]
    """Names of the files at the top, with their bytes."""

    def as_dict(self) -> dict[str, Any]:
        """The anatomy as JSON has it."""
        return {**asdict(self), "folder": str(self.folder)}


async def anatomy(folder: Path, disk: Disk) -> Anatomy:
    """What the model in `folder` is. Raises `ModelError` for a folder that holds none, `DiskError` when the drive fails."""
    described = await read_json(folder / "config.json")
    checkpoint = await _headers(folder, disk)
    files = await anyio.to_thread.run_sync(_files, folder)
    settings = await read_json(folder / "tokenizer_config.json") if "tokenizer_config.json" in files else {}
    found = await _native(described, checkpoint)
    if "tier" not in found:
        found |= await anyio.to_thread.run_sync(_generic, described, checkpoint, folder)
    architectures = described.get("architectures")
    kind = described.get("model_type")
    return Anatomy(
        folder=folder, architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        model_type=kind if isinstance(kind, str) else None, quantization=quantization(described),
        parameters=parameters(described, checkpoint), weights_nbytes=checkpoint.nbytes,
        disk_nbytes=await anyio.to_thread.run_sync(disk_nbytes, folder),
        tokenizer=next((name for name in TOKENIZERS if name in files), None),
        chat_template=TEKKEN in files or any(name in files for name in TEMPLATES) or bool(settings.get("chat_template")),
        exported=await find_export(folder, disk) is not None, files=files, **found,
    )  # fmt: skip


def parameters(described: Mapping[str, Any], checkpoint: Checkpoint) -> int | None:
    """How many numbers the weights are; None where they are packed in a way that is not known."""
    if unread_quantization(described) is not None:
        return None
    return sum(_numbers(entry.name, entry.shape, entry.dtype == "U8") for entry in checkpoint.tensors.values())


def active(family: Family) -> int:
    """How many parameters one token of text is multiplied with."""
    found = family.hidden + family.vocabulary * family.hidden  # the last norm and the head
    for step in family.steps:
        found += _needed(step.params)
        if step.experts is not None:
            found += step.experts.top * _needed(step.experts.params(0))
    return found


def _needed(params: Mapping[str, Need]) -> int:
    return sum(_numbers(name, need.shape, need.dtype == torch.uint8) for name, need in params.items())


def _numbers(name: str, shape: Iterable[int], packed: bool) -> int:
    """Parameters in a tensor; of what is packed, two in each byte of the blocks, and none in the scales."""
    if packed and "_scales" in name:
        return 0
    return math.prod(shape) * (2 if packed and "_blocks" in name else 1)


async def _headers(folder: Path, disk: Disk) -> Checkpoint:
    """The checkpoint as its headers have it. Where there is only an export, what its manifest says is believed."""
    try:
        return await open_checkpoint(folder, disk, "published")
    except ModelError:
        if (export := await find_export(folder, disk)) is None:
            raise
    if (nbytes := await disk.size(str(export / NAME))) > LIMIT:
        raise ModelError(f"{export / NAME} has {nbytes} bytes, more than the {LIMIT} that are read of a manifest")
    manifest = parse_manifest(await anyio.Path(export / NAME).read_bytes(), export)
    tensors = {place.entry.name: place.entry for summed in manifest.files for place in summed.file.places}
    files = tuple(str(export / summed.file.path) for summed in manifest.files)
    return Checkpoint(export, tensors, files, sum(entry.extent.nbytes for entry in tensors.values()))


async def _native(described: Mapping[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """What our own layers would be made of; without a `tier`, why they are not."""
    try:
        family, tower = await anyio.to_thread.run_sync(_build, described, checkpoint)
    except SpecializationError as error:
        return {"tier_reason": str(error)}
    mixtures = [step.experts for step in family.steps if step.experts is not None]
    senses = () if tower is None else (
        Sense(tower.kind, sum(step_piece(step, checkpoint, tower.dtype).read_nbytes for step in tower.steps)),
    )  # fmt: skip
    return {
        "tier": "optimized-native", "tier_reason": f"{described['model_type']} is one of our own families", "layers": family.layers,
        "experts": Mixture(mixtures[0].count, max(mixture.top for mixture in mixtures), len(mixtures)) if mixtures else None,
        "hidden": family.hidden, "vocabulary": family.vocabulary, "context": family.context,
        "dtype": str(dtype_of(checkpoint[family.embedding])).removeprefix("torch."), "active_parameters": active(family),
        "kv_nbytes_per_token": family.kv.token_nbytes, "state_nbytes": family.kv.state_nbytes, "towers": senses,
    }  # fmt: skip


def _build(described: Mapping[str, Any], checkpoint: Checkpoint) -> tuple[Family, Tower | None]:
    """Family and tower, once all their tensors are known to be there, in their shapes. Raises `ModelError`."""
    family = build_family(described, checkpoint)
    pieces_of(family, checkpoint)
    expert_pieces(family, checkpoint)
    make = TOWERS.get(str(described.get("model_type")))
    return family, make(described, family.dtype, checkpoint.tensors, {}, ()) if make is not None else None


def _generic(described: Mapping[str, Any], checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """What transformers knows of it. Imports transformers; blocking."""
    from .generic.kind import kind_of, read_config, refusal
    from .generic.plan import kv_token_nbytes, stored_dtype

    kind = kind_of(described)
    if kind is None:
        return {**dict.fromkeys(UNKNOWN), "towers": (), "tier_reason": refusal(described)}
    config = read_config(folder)
    text, dtype = config.get_text_config(decoder=True), stored_dtype(config, checkpoint)
    own = {name: _first(described, keys) for name, keys in NAMES.items()}
    return {
        **dict.fromkeys(UNKNOWN), **own, "tier": "transformers-generic", "towers": (), "dtype": str(dtype).removeprefix("torch."),
        "kv_nbytes_per_token": kv_token_nbytes(text, dtype),
    }  # fmt: skip


NAMES = {
    "layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "hidden": ("hidden_size", "d_model", "n_embd"),
    "vocabulary": ("vocab_size",),
    "context": ("max_position_embeddings", "n_positions"),
}
"""What families call the same thing in their configurations."""
UNKNOWN = (
    "tier",
    "layers",
    "experts",
    "hidden",
    "vocabulary",
    "context",
    "dtype",
    "active_parameters",
    "kv_nbytes_per_token",
    "state_nbytes",
)


def _first(described: Mapping[str, Any], keys: Iterable[str]) -> int | None:
    inner = described.get("text_config")
    parts = (described, inner if isinstance(inner, Mapping) else {})
    return next((part[key] for key in keys for part in parts if type(part.get(key)) is int), None)


def _files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
