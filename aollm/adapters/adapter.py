"""Adapter: one folder as PEFT saves it, checked and read.

The folder may come from a stranger: its header has to account for every byte of its file, its tensors have to be what its
config says, and pickles are not opened. It refuses to know the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Self

import torch
import xxhash
from torch import Tensor

from ..checkpoint import HEADER_LIMIT, TensorEntry, parse_header
from ..errors import CheckpointError, ModelError
from ..piece import DTYPES
from ..tensors import AGAIN, PICKLES, guard, parse_json
from .lora import Lora

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 4 << 20
CONVERT = "peft.PeftModel.from_pretrained(base, folder).save_pretrained(new_folder, safe_serialization=True)"
HALF = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")
STRANGE: Mapping[str, str] = {
    "lora_embedding_": "it adapts the embedding table, which is not supported; train it on linear modules",
    "lora_magnitude_vector": "it is a DoRA, which scales the rows of the merged weights, and here nothing is merged",
    "modules_to_save": "it holds whole modules of its own, which would have to take the place of the base's",
    ".bias": "biases of adapters are not supported",
}


@dataclass(frozen=True, slots=True)
class Pair:
    """What is added to one module's product: scale · (x downᵀ) upᵀ, with down [R, in] and up [out, R]."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA: what it adds to the products of which modules, by the names that they had where it was trained."""

    folder: Path
    lora: Lora
    modules: Mapping[str, Pair]

    @property
    def digest(self) -> str:
        """What tells it from other adapters: a hash of all that it adds."""
        found = xxhash.xxh3_128()
        for module, pair in sorted(self.modules.items()):
            found.update(f"{module} {pair.scale} {tuple(pair.down.shape)} {tuple(pair.up.shape)}".encode())
            for half in (pair.down, pair.up):
                found.update(half.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `adapter_config.json` and `adapter_model.safetensors`, blocking.

        Raises `ModelError` for a folder that is no LoRA adapter, or one of a kind that is not supported, and
        `CheckpointError` for tensors that are missing, damaged, or not what its config says.
        """
        lora = _read_config(folder)
        file = folder / TENSORS
        try:
            _check_file(folder)
            with file.open("rb") as opened:
                entries = _header(opened, file)
                halves = _halves(entries.values(), file)
                _check(halves, lora, file)
                modules = {
                    module: Pair(_read(opened, pair["A"]), _read(opened, pair["B"]), lora.scale_of(module))
                    for module, pair in halves.items()
                }
        except OSError as error:
            raise ModelError(f"{file} cannot be read: {error}; check the path, or download it again") from error
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return cls(folder, lora, modules)

    def __repr__(self) -> str:
        return f"<Adapter {self.folder.name}: {len(self.modules)} modules, trained on {self.lora.base}>"


def _read_config(folder: Path) -> Lora:
    file = folder / CONFIG
    try:
        guard(folder, CONFIG)
        with file.open("rb") as opened:
            if len(data := opened.read(CONFIG_LIMIT + 1)) > CONFIG_LIMIT:
                raise ValueError(f"it is larger than {CONFIG_LIMIT} bytes")
        return Lora.parse(parse_json(data))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}; give the folder of a LoRA adapter as PEFT saves it") from error
    except ValueError as error:
        raise ModelError(f"{file} cannot be used: {error}") from error


def _check_file(folder: Path) -> None:
    guard(folder, TENSORS)
    if not (folder / TENSORS).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.name.startswith("adapter_model") and path.name.endswith(PICKLES))
        if pickles:
            why = f"has its tensors only as a pickle ({pickles[0]}), which can run code when loaded and is refused"
            raise ModelError(f"{folder} {why}; get it as safetensors, or, if you trust it, convert it: {CONVERT}")
        raise ModelError(f"{folder} has no {TENSORS}; download it too")


def _header(opened: BufferedReader, file: Path) -> dict[str, TensorEntry]:
    size = opened.seek(0, 2)
    opened.seek(0)
    start = opened.read(8)
    if size == 0:
        raise ValueError("the file is empty; download it again")
    if start == b"version ":
        raise ValueError("it is only a pointer, left by a clone without Git LFS; run `git lfs pull` in its folder")
    nbytes = int.from_bytes(start, "little")
    if size < 8 or nbytes > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header claims {nbytes} bytes of the {size} that it has: {AGAIN}")
    return parse_header(opened.read(nbytes), 8 + nbytes, size, str(file))


def _halves(entries: Iterable[TensorEntry], file: Path) -> dict[str, dict[str, TensorEntry]]:
    """The tensors by module, then A and B."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for entry in entries:
        found = HALF.fullmatch(entry.name)
        if found is None:
            reason = next((reason for part, reason in STRANGE.items() if part in entry.name), "it is no part of a LoRA as PEFT saves it")
            raise ModelError(f"{file}: tensor {entry.name}: {reason}")
        pair = halves.setdefault(found["module"], {})
        if found["half"] in pair:
            raise ValueError(f"{entry.name} and {pair[found['half']].name} are the same; {AGAIN}")
        pair[found["half"]] = entry
    return halves


def _check(halves: Mapping[str, Mapping[str, TensorEntry]], lora: Lora, file: Path) -> None:
    """That tensors and config belong together, before a tensor is read."""
    for module, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            (there,) = pair
            raise ValueError(f"{module} has lora_{there} and no lora_{'B' if there == 'A' else 'A'}; download it again")
        down, up = pair["A"], pair["B"]
        if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or 0 in down.shape + up.shape:
            raise ValueError(f"{down.name} {list(down.shape)} and {up.name} {list(up.shape)} are not [rank, in] and [out, rank]; {AGAIN}")
        if down.shape[0] != (rank := lora.rank_of(module)):
            raise ValueError(f"{down.name} has rank {down.shape[0]}, {CONFIG} says {rank}; the two belong to different adapters")
        for entry in (down, up):
            if (dtype := DTYPES.get(entry.dtype)) is None or not dtype.is_floating_point:
                raise ModelError(f"{file}: {entry.name} is stored as {entry.dtype}; save the adapter in BF16, F16 or F32")
        if not lora.takes(module):
            raise ValueError(f"it adapts {module}, which target_modules of {CONFIG} leaves out; the two belong to different adapters")
    if not halves:
        raise ValueError("it has no tensors at all; download it again")


def _read(opened: BufferedReader, entry: TensorEntry) -> Tensor:
    data = bytearray(entry.extent.nbytes)
    opened.seek(entry.extent.offset)
    if opened.readinto(data) != len(data):
        raise ValueError(f"{entry.name} ends early; {AGAIN}")
    tensor = torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape)
    if not math.isfinite(float(tensor.float().abs().max())):
        raise ValueError(f"{entry.name} holds NaN or infinity; {AGAIN}")
    return tensor
