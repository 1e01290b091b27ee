"""Tensors: what a model's weights are called, how they are typed and shaped, and which bytes of which file they are.

Names, types and shapes come from strangers, so they are bounded here before anything is made of them. This module
refuses to know in what format the files are.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

from .disk.base import Extent
from .errors import CheckpointError

MAX_TENSORS = 131_072  # of one file
MAX_VALUES = 16 * MAX_TENSORS  # of one JSON text, where a tensor needs 14: `[[],[],…` would grow to 20 times its size in memory
MAX_RANK, MAX_DIMENSION = 8, 1 << 31
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GGUF = ".gguf"
NO_GGUF = "GGUF is not read; take the model as it was published on the Hub before its conversion, as safetensors"
DTYPES: dict[str, int] = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of one element, by safetensors' code for the type."""
TENSOR_NAME = re.compile(r"[\w.\-:/]{1,512}", re.ASCII)
NUMBER = re.compile(r"\d+")
AGAIN = "it is damaged or forged: download it again, from a source that you trust"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its type (a key of `DTYPES`), its shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder, in the `nbytes` bytes of `files` (full paths) that are tensors' bytes."""

    folder: Path
    tensors: Mapping[str, TensorEntry]
    files: tuple[str, ...]
    nbytes: int
    fingerprint: str | None = None
    """What stands for the weights where they are an export, whose files have no headers to be told apart by; else None."""

    def __getitem__(self, name: str) -> TensorEntry:
        """The tensor called `name`; `CheckpointError` with the nearest names when there is none."""
        if (entry := self.tensors.get(name)) is None:
            kinds = {NUMBER.sub("0", other): other for other in self.tensors}  # a model has dozens, where it has 100,000 names
            near = [kinds[kind] for kind in difflib.get_close_matches(NUMBER.sub("0", name), list(kinds)[:2000])]
            raise CheckpointError(f"{self.folder} has no tensor {name}, but {near}; is its config.json that of another model?")
        return entry

    def row(self, name: str, index: int) -> TensorEntry:
        """What `name[index]` is, for example one expert's matrix of a fused tensor: stored by itself, or as a part of `name`.

        Raises `CheckpointError` when there is neither, or `index` is outside the tensor's first dimension.
        """
        if (entry := self.tensors.get(part := row_name(name, index))) is not None:
            return entry
        whole = self[name]
        if not whole.shape or not 0 <= index < whole.shape[0]:
            raise CheckpointError(f"{self.folder} has no {part}: {name} has shape {list(whole.shape)}; is its config.json another model's?")
        nbytes = whole.extent.nbytes // whole.shape[0]
        extent = Extent(whole.extent.file, whole.extent.offset + index * nbytes, nbytes)
        return TensorEntry(part, whole.dtype, whole.shape[1:], extent)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"<Checkpoint {self.folder.name}: {len(self.tensors)} tensors in {len(self.files)} files, {self.nbytes / 1e9:.2f} GB>"


def row_name(name: str, index: int) -> str:
    """What one row of a tensor is called where it is stored by itself."""
    return f"{name}[{index}]"


def check_tensor(name: str, dtype: object, shape: object, file: str) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and size in bytes of a tensor of which `file` says so; `ValueError` for what no tensor can have.

    Raises `CheckpointError` for a dtype that is not in `DTYPES`.
    """
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{file}: tensor {name} has dtype {short(dtype)}; save the model in one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n <= MAX_DIMENSION for n in shape):
        raise ValueError(f"tensor {name} has shape {short(shape)}: not at most {MAX_RANK} whole numbers from 0 to {MAX_DIMENSION}")
    return dtype, tuple(shape), math.prod(shape) * DTYPES[dtype]


def parse_json(data: bytes, constant: Callable[[str], object] = int) -> dict[str, Any]:
    """A JSON object, no key twice in it or below; `ValueError` for all else. `constant` takes NaN or Infinity; int raises."""
    if sum(map(data.count, b"{[,")) > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES:,} values")
    try:
        found = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=constant)
    except RecursionError as error:
        raise ValueError("its JSON is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    return found


def guard(folder: Path, name: str) -> None:
    """Refuse a link out of the folder (or out of the Hugging Face cache that it is part of), and all but regular files."""
    path, root = folder / name, Path(os.path.realpath(folder))
    homes = [home for home in (root, root.parent) if home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")]
    allowed = (root, *(home.parent.parent / "blobs" for home in homes))
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(each) for each in allowed):
        raise CheckpointError(f"{path} is a link that leaves the model folder; put the file itself there if you trust it")
    if os.path.lexists(path) and not os.path.isfile(real):
        raise CheckpointError(f"{path} is not a regular file, nor a link to one; download it again")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(built := dict(pairs)) != len(pairs):
        raise ValueError(f"the key {short(Counter(key for key, _ in pairs).most_common(1)[0][0])} appears twice")
    return built
