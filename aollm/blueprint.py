"""Blueprints: the weights of a model that is not here yet, as its configuration and its index describe them.

Names come from the index where there is one, shapes and types from what the family needs. Nothing can be read of it: it is
for plans. It refuses to know where models come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch

from .checkpoint import INDEX, open_checkpoint, read_json
from .disk.base import Disk, Extent
from .errors import ModelError
from .export.opening import find_export
from .families import FAMILIES, TOWERS
from .families.base import Need, Step
from .piece import DTYPES as CODES
from .tensors import DTYPES, Checkpoint, TensorEntry, row_name

EMBEDDING = "embed_tokens.weight"
CODE = {dtype: code for code, dtype in CODES.items()}


async def weights_of(folder: Path, disk: Disk, described: Mapping[str, Any], here: bool) -> Checkpoint:
    """The checkpoint in `folder`, or, unless it has to be `here`, a blueprint of it. `described` is its `config.json`.

    Raises `ModelError` for weights that cannot be used, or that have to be here and are not.
    """
    if here or await anyio.to_thread.run_sync(_has_weights, folder) or await find_export(folder, disk) is not None:
        return await open_checkpoint(folder, disk)
    names: Iterable[str] = ()
    if await anyio.to_thread.run_sync((folder / INDEX).is_file):
        found = (await read_json(folder / INDEX)).get("weight_map")
        if not isinstance(found, dict) or not found:
            raise ModelError(f"{folder / INDEX} has no weight_map; download it again")
        names = found
    return await anyio.to_thread.run_sync(blueprint, folder, described, tuple(names))


def blueprint(folder: Path, described: Mapping[str, Any], names: tuple[str, ...]) -> Checkpoint:
    """The checkpoint that `described` asks for, with `names` of the index, if there is one. It has no tensors where the family is
    not known: transformers builds such a model from its configuration alone."""
    kind = described.get("model_type")
    if kind not in FAMILIES:
        return Checkpoint(folder, {}, (), 0)
    prefix = next((name.removesuffix(EMBEDDING) for name in names if name.endswith(EMBEDDING)), "model.")
    dtype = _dtype(described)
    family = FAMILIES[kind](described, dtype, prefix)
    table = (family.vocabulary, family.hidden)
    needs = [Need(table, (family.embedding,)), Need((family.hidden,), (family.norm,))]
    needs += [Need(table, (family.head,))] if family.head != family.embedding else []
    needs += _needs(family.steps)
    if kind in TOWERS and names:
        tower = TOWERS[kind](described, dtype, names, {}, ())
        needs += _needs(tower.steps) if tower is not None else []
    tensors: dict[str, TensorEntry] = {}
    file, at = str(folder / "weights"), 0
    for need in needs:
        for name, shape in _tensors(need):
            code = "U8" if need.dtype == torch.uint8 else CODE[dtype]
            nbytes = math.prod(shape) * DTYPES[code]
            tensors[name] = TensorEntry(name, code, shape, Extent(file, at, nbytes))
            at += nbytes
    return Checkpoint(folder, tensors, (), at)


def _needs(steps: Iterable[Step]) -> Iterator[Need]:
    for step in steps:
        yield from step.params.values()
        if step.experts is not None:
            for number in range(step.experts.count):
                yield from step.experts.params(number).values()


def _tensors(need: Need) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a need's tensors; how its rows are divided among several does not matter to a plan."""
    if need.row is not None:
        yield row_name(need.tensors[0], need.row), need.shape
        return
    count, rest = len(need.tensors), need.shape[1:]
    for number, name in enumerate(need.tensors):
        yield name, (need.shape[0] * (number + 1) // count - need.shape[0] * number // count, *rest)


def dtype_named(described: Mapping[str, Any]) -> str | None:
    """The dtype that `config.json` names, of the model or of its language model."""
    inner = described.get("text_config")
    parts = (described, inner if isinstance(inner, Mapping) else {})
    return next((part[key] for part in parts for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)), None)


def _dtype(described: Mapping[str, Any]) -> torch.dtype:
    """What `config.json` says that weights are stored as; float32 where it does not, as transformers has it."""
    name = dtype_named(described) or "float32"
    known = {str(dtype).removeprefix("torch."): dtype for dtype in CODE if dtype.is_floating_point}
    if name not in known:
        raise ModelError(f"config.json: dtype {name!r} is not one that weights are streamed in; that is {', '.join(known)}")
    return known[name]


def _has_weights(folder: Path) -> bool:
    try:
        return any(path.name.endswith(".safetensors") for path in folder.iterdir())
    except OSError:
        return True  # whoever opens it says what is wrong
