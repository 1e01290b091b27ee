"""Checkpoints: which bytes of which safetensors file are which tensor, read in place.

A model folder comes from strangers, so a header is believed only after it accounts for every byte of its file. This
module refuses to know what a tensor is for, unpickles nothing, imports nothing from the folder, and reads no weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

import anyio
import anyio.to_thread

from .disk.base import Disk, Extent, Priority
from .errors import CheckpointError, DiskError, ModelError, first_of
from .export.checking import Progress, ignore
from .export.opening import find_export, open_export
from .tensors import AGAIN, GGUF, MAX_TENSORS, NO_GGUF, PICKLES, TENSOR_NAME, check_tensor, guard, parse_json
from .tensors import DTYPES as DTYPES
from .tensors import Checkpoint as Checkpoint
from .tensors import TensorEntry as TensorEntry

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
AT_ONCE = 8
"""Headers that are read at a time."""
HEADER_LIMIT, INDEX_LIMIT = 32 << 20, 16 << 20
CONVERT = "transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
SHARD_NAME = re.compile(r"\w[\w.\-]{0,240}\.safetensors", re.ASCII)


async def open_checkpoint(
    folder: Path, disk: Disk, weights: Literal["auto", "published", "export"] = "auto", progress: Progress = ignore
) -> Checkpoint:  # fmt: skip
    """Read the headers of `model.safetensors`, or of the index's shards, or of the only *.safetensors in `folder`.

    `weights`: `export` takes those that `aollm export` has made, in the folder's `gds_export` or in the folder itself;
    `auto` does where no safetensors file is there. An export that nobody has checked is read once, which `progress` is told.
    Raises `ModelError` for a folder without weights, `CheckpointError` for weights that are missing, truncated or lie
    about themselves, and `DiskError` when the drive fails.
    """
    published = await _open_published(folder, disk) if weights == "published" or await _is_published(folder, disk) else None
    if published is not None and weights != "export":
        return published
    if (export := await find_export(folder, disk)) is not None:
        return await open_export(export, disk, published.files if published is not None else (), progress)
    if weights == "export":
        raise ModelError(f"{folder} has no export (gds_export/manifest.json); make one: aollm export {folder}")
    return await _open_published(folder, disk)  # it is not there: this says what is missing, or finds it on a disk of another kind


async def _open_published(folder: Path, disk: Disk) -> Checkpoint:
    name = await _first(folder, disk)
    picks = await _read_index(folder, disk) if name == INDEX else {}
    names = list(dict.fromkeys(picks.values())) if name == INDEX else [name]
    shards = await _read_shards(folder, names, disk)
    tensors = await anyio.to_thread.run_sync(_merge, folder, shards, picks)
    files = tuple(str(folder / shard) for shard in names)
    return Checkpoint(folder, tensors, files, sum(entry.extent.nbytes for entry in tensors.values()))


async def _is_published(folder: Path, disk: Disk) -> bool:
    """Whether safetensors files are there. An index alone says nothing: it is small, and stays behind."""
    try:
        await _size(folder, SINGLE, disk)
        return True
    except DiskError:
        pass
    try:
        return any(name.endswith(".safetensors") for name in await anyio.to_thread.run_sync(os.listdir, folder))
    except OSError:
        return False


async def read_json(path: Path, limit: int = 16 << 20) -> dict[str, Any]:
    """The JSON object in the file at `path`, for example config.json; NaN and Infinity pass, since such files are in use.

    Raises `ModelError` if it is missing, leaves its folder by a link, is larger than `limit` bytes, or has a key twice.
    """

    def read() -> dict[str, Any]:
        guard(path.parent, path.name)
        with path.open("rb") as file:
            if len(data := file.read(limit + 1)) > limit:
                raise ValueError(f"it is larger than {limit} bytes")
        return parse_json(data, constant=float)

    try:
        return await anyio.to_thread.run_sync(read)
    except FileNotFoundError as error:
        if path.name != "config.json":
            raise ModelError(f"{path} is missing; check the path, or download the file again") from error
        advice = "give the folder that has one beside the *.safetensors files, or download the model into it"
        raise ModelError(f"{path.parent} is no model's folder: it has no {path.name}; {await _gguf(path.parent) or advice}") from error
    except (OSError, ValueError) as error:
        why = error.strerror or error if isinstance(error, OSError) else error
        raise ModelError(f"{path} cannot be used: {why}; check the path, or download the file again") from error


async def _gguf(folder: Path) -> str | None:
    """What to do about the GGUF file in `folder`, if there is one."""
    try:
        names = await anyio.to_thread.run_sync(os.listdir, folder)
    except OSError:
        return None
    found = sorted(name for name in names if name.endswith(GGUF))
    return f"{found[0]} cannot be taken: {NO_GGUF}" if found else None


def parse_header(header: bytes, data_start: int, file_size: int, file: str) -> dict[str, TensorEntry]:
    """The tensors of `file`, whose JSON header is `header` and whose data are its bytes from `data_start` to `file_size`.

    Follows the safetensors format, more strictly than its own reader: no key twice, no odd names, no leading blanks, and
    tensors that cover the data without a hole, an overlap or a rest. Raises `CheckpointError`, and nothing else.
    """
    try:
        if header[:1] != b"{":
            raise ValueError("the header does not start with {")
        entries = parse_json(header)
        metadata = entries.pop("__metadata__", {})
        if len(entries) > MAX_TENSORS:
            raise ValueError(f"it lists {len(entries)} tensors, more than {MAX_TENSORS}")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ does not map strings to strings")
        found = {name: _entry(name, fields, data_start, file) for name, fields in entries.items()}
        at = data_start
        for entry in sorted(found.values(), key=lambda entry: (entry.extent.offset, entry.extent.end)):
            if entry.extent.offset != at:
                fault = "overlaps the tensor before it" if entry.extent.offset < at else "leaves a hole before it"
                raise ValueError(f"tensor {entry.name}, at byte {entry.extent.offset}, {fault}: {at} was expected")
            at = entry.extent.end
        if at != file_size:
            fault = "is truncated" if at > file_size else "has trailing bytes that belong to no tensor"
            raise ValueError(f"the file {fault}: it has {file_size} bytes, and its tensors end at {at}")
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; {AGAIN}") from error
    return found


def _entry(name: str, fields: object, data_start: int, file: str) -> TensorEntry:
    if not TENSOR_NAME.fullmatch(name):
        raise ValueError(f"{short(name)} cannot be the name of a tensor")
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} is not described by dtype, shape and data_offsets alone")
    dtype, shape, nbytes = check_tensor(name, fields["dtype"], fields["shape"], file)
    offsets = fields["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets) or not 0 <= offsets[0] <= offsets[1]:
        raise ValueError(f"tensor {name} has data_offsets {short(offsets)}: not a begin and an end")
    begin, end = offsets
    if nbytes != end - begin:
        raise ValueError(
            f"tensor {name} has shape {list(shape)} of {dtype}, {nbytes} bytes, but data_offsets of {short(end - begin)} bytes"
        )
    return TensorEntry(name, dtype, shape, Extent(file, data_start + begin, nbytes))


async def _first(folder: Path, disk: Disk) -> str:
    """The file to begin with. The disk is asked first: it need not be the computer's filesystem."""
    for name in (SINGLE, INDEX):
        try:
            await _size(folder, name, disk)
            return name
        except DiskError:
            pass
    try:
        names = sorted(await anyio.to_thread.run_sync(os.listdir, folder))
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}; give the path of a folder with config.json and *.safetensors files") from error
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights and (pickles := [name for name in names if name.endswith(PICKLES)]):
        why = f"has only pickles ({pickles[0]}), which can run code when loaded and are refused; download it as safetensors"
        raise ModelError(f"{folder} {why}, or, if you trust it, convert it: {CONVERT}")
    if not weights and (gguf := await _gguf(folder)) is not None:
        raise ModelError(f"{folder} has no *.safetensors file; {gguf}")
    if not weights:
        raise ModelError(f"{folder} has no *.safetensors file; download the model's weights into it")
    if len(weights) > 1 and SINGLE not in weights and INDEX not in names:
        raise ModelError(f"{folder} has {len(weights)} *.safetensors files and no {INDEX}; download that file too")
    return next((name for name in (SINGLE, INDEX) if name in names), weights[0])


async def _size(folder: Path, name: str, disk: Disk) -> int:
    await anyio.to_thread.run_sync(guard, folder, name)
    return await disk.size(str(folder / name))


async def _read(file: str, offset: int, nbytes: int, disk: Disk) -> bytes:
    buffer = bytearray(nbytes)
    await disk.read_into([Extent(file, offset, nbytes)], [memoryview(buffer)], Priority.NOW)
    return bytes(buffer)


async def _read_index(folder: Path, disk: Disk) -> dict[str, str]:
    """Tensor name → name of the shard that it is to be read from."""
    file = str(folder / INDEX)
    nbytes = await _size(folder, INDEX, disk)
    try:
        if nbytes > INDEX_LIMIT:
            raise ValueError(f"it has {nbytes} bytes, more than the {INDEX_LIMIT} that are read of an index")
        picks = (await anyio.to_thread.run_sync(parse_json, await _read(file, 0, nbytes, disk))).get("weight_map")
        if not isinstance(picks, dict) or not picks:
            raise ValueError("it has no weight_map")
        if odd := [shard for shard in picks.values() if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard)]:
            raise ValueError(f"its weight_map names {short(odd[0])}, which is not the plain name of a .safetensors file")
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; {AGAIN}") from error
    return picks


async def _read_shards(folder: Path, names: Sequence[str], disk: Disk) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each shard, in the order of `names`; a few headers are read at a time."""
    found: dict[str, dict[str, TensorEntry]] = {}
    limiter = anyio.CapacityLimiter(AT_ONCE)

    async def read(name: str) -> None:
        async with limiter:
            found[name] = await _read_shard(folder, name, disk)

    try:
        async with anyio.create_task_group() as group:
            for name in names:
                group.start_soon(read, name)
    except BaseExceptionGroup as raised:
        raise first_of(raised) from raised
    return {name: found[name] for name in names}


async def _read_shard(folder: Path, name: str, disk: Disk) -> dict[str, TensorEntry]:
    file = str(folder / name)
    try:
        size = await _size(folder, name, disk)
    except DiskError as error:
        raise CheckpointError(f"{folder}: its weight file {name} cannot be opened ({error}); download it again") from error
    if size == 0:
        raise CheckpointError(f"{file}: the file is empty; download it again")
    start = await _read(file, 0, min(8, size), disk)
    if start == b"version ":
        raise CheckpointError(f"{file} is only a pointer to the weights, left by a clone without Git LFS; run `git lfs pull` in its folder")
    nbytes = int.from_bytes(start, "little")
    if size < 8 or nbytes > min(HEADER_LIMIT, size - 8):
        limit = f"at most {HEADER_LIMIT} bytes of header are read, and the file has {size} bytes"
        raise CheckpointError(f"{file}: its header claims {nbytes} bytes, but {limit}: it is truncated, or no safetensors file; {AGAIN}")
    header = await _read(file, 8, nbytes, disk)
    return await anyio.to_thread.run_sync(parse_header, header, 8 + nbytes, size, file)


def _merge(folder: Path, shards: Mapping[str, Mapping[str, TensorEntry]], picks: Mapping[str, str]) -> dict[str, TensorEntry]:
    """One mapping of all shards' tensors. Tensors that the index does not name are kept, as transformers does."""
    tensors: dict[str, TensorEntry] = {}
    for shard, entries in shards.items():
        for name, entry in entries.items():
            if name in tensors and name not in picks:
                raise CheckpointError(f"{folder}: tensor {name} is in {tensors[name].extent.file} and in {shard}; {AGAIN}")
            if picks.get(name, shard) == shard:
                tensors[name] = entry
    for name in picks.keys() - tensors.keys():
        raise CheckpointError(f"{folder / picks[name]} lacks tensor {short(name)}, which {INDEX} says it holds; download both again")
    return tensors
