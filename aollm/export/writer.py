"""Writing an export: the weights of a checkpoint, block by block, into a folder that takes its name when it is whole.

Until then it is called `….partial` and can be gone on with. Reading runs ahead while blocks are summed and written, in
memory of one fixed size. It refuses to know where the checkpoint comes from.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import anyio
import xxhash
from anyio.to_thread import run_sync

from .. import fingerprint
from ..ahead import Ahead
from ..buffers import Lease, Ring, size
from ..disk.base import Disk, Extent
from ..disk.durability import sync_folder
from ..disk.folder import Folder
from ..disk.trouble import disk_error
from ..errors import DiskError, ModelError
from ..tensors import Checkpoint, guard
from . import manifest as manifests
from . import stamp as stamps
from .checking import RING_NBYTES, Progress, Sums, damaged, ignore
from .journal import LIMIT, Journal
from .journal import NAME as JOURNAL
from .layout import REST, Block, RawFile, blocks, lay_out
from .manifest import Manifest, write_manifest
from .opening import FOLDER

PARTIAL, REPLACED, LOCK = ".partial", ".replaced", "lock"
SMALL_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
SMALL_LIMIT = 256 << 20
LAYER_FOLDER = re.compile(r"layer-\d{4,6}")


async def write_export(checkpoint: Checkpoint, target: Path, disk: Disk, progress: Progress = ignore, replace: bool = False) -> Manifest:
    """Write an export of `checkpoint` to the folder `target`, going on with one that was interrupted.

    Where that is not the model's own `gds_export`, its configuration and tokenizer are copied too. `replace`: in the place
    of an export that is there. Raises `ModelError` for a target that cannot be taken, `DiskError` where there is not
    enough room or the drive fails; what is finished is kept in `target` + ".partial".
    """
    target, model = _absolute(target), _absolute(checkpoint.folder)
    partial = target.with_name(target.name + PARTIAL)
    try:
        await run_sync(_check_target, target, replace)
        files = lay_out(checkpoint)
        source = await run_sync(fingerprint.weights, checkpoint.files)
        folder = await run_sync(lambda: Folder.make(partial, setting="--output"))
        lock = None
        try:
            if (lock := await run_sync(folder.lock, LOCK)) is None:
                raise ModelError(f"{partial} is being written by another process; wait until it has finished")
            await run_sync(_claim, folder)
            manifest = await _fill(checkpoint, files, source, folder, disk, progress)
            found = await stamps.settled(partial, [file.path for file in files])
            with anyio.CancelScope(shield=True):
                await run_sync(_finish, folder, manifest, found, model, target)
                await _forget(disk, target, [manifests.NAME, *found])  # it may have what was there before
        finally:
            if lock is not None:
                lock.release()
            folder.close()
    except OSError as error:
        raise disk_error(error, str(error.filename or partial)) from error
    return manifest


async def _fill(
    checkpoint: Checkpoint, files: Sequence[RawFile], source: str, folder: Folder, disk: Disk, progress: Progress
) -> Manifest:  # fmt: skip
    """Write the files that are not there yet."""
    journal = await run_sync(lambda: Journal(folder, _key(checkpoint, files, source), files))
    if journal.is_new:
        await run_sync(_clear, folder)
    await _forget(disk, folder.path, [file.path for file in files])  # it may have them open from an attempt before
    kept = [summed for summed in journal.finished.values() if _is_whole(folder.path, summed.file)]
    wrong = await damaged(folder.path, kept, disk, progress)
    done = {summed.file.path: summed for summed in kept if summed.file.path not in wrong}
    missing = [file for file in files if file.path not in done]
    await _forget(disk, folder.path, [summed.file.path for summed in kept])
    await run_sync(_prepare, folder, files, missing)
    mode = _mode(Path(checkpoint.files[0])) & 0o666 | 0o600
    ring, whole = Ring(RING_NBYTES), sum(file.nbytes for file in files)
    written = whole - sum(file.nbytes for file in missing)

    async def load(block: Block, lease: Lease) -> memoryview:
        memory = ring.arena.bytes[lease.offset : lease.offset + block.nbytes]
        at = 0
        for part in block.parts:
            memory[at : part.at] = bytes(part.at - at)  # what was there before is another block's
            at = part.at + part.extent.nbytes
        memory[at:] = bytes(block.nbytes - at)
        await disk.read_into(
            [part.extent for part in block.parts], [memory[part.at : part.at + part.extent.nbytes] for part in block.parts]
        )
        return memory

    plan = (block for file in missing for block in blocks(file))
    async with Ahead(plan, lambda block: block.nbytes, load, ring) as ahead:
        for file in missing:
            path, sums = str(folder.path / file.path), Sums()
            for block in blocks(file):
                memory, lease = await ahead.next()
                await run_sync(sums.add, block, memory)
                await disk.write([Extent(path, block.offset, block.nbytes)], [memory])
                lease.release()
                written += block.nbytes
                progress("writing", written, whole)
            await disk.sync(path)
            await disk.forget(path)
            await run_sync(os.chmod, path, mode)
            done[file.path] = sums.of(file)
            await run_sync(journal.add, done[file.path])
    return Manifest(source, tuple(done[file.path] for file in files))


async def _forget(disk: Disk, folder: Path, paths: Iterable[str]) -> None:
    for path in paths:
        await disk.forget(str(folder / path))


def _key(checkpoint: Checkpoint, files: Sequence[RawFile], source: str) -> str:
    """What an export must have in common with one that is gone on with: the source's files untouched, and the layout."""
    known = xxhash.xxh3_128(source.encode())
    for name in checkpoint.files:
        status = os.stat(name)
        known.update(f"{status.st_ino} {status.st_size} {status.st_mtime_ns}\n".encode())
    for file in files:
        places = [(place.entry.name, place.entry.dtype, place.entry.shape, place.offset) for place in file.places]
        known.update(f"{file.path} {file.nbytes} {places}\n".encode())
    return known.hexdigest()


def _is_whole(folder: Path, file: RawFile) -> bool:
    try:
        return os.lstat(folder / file.path).st_size == file.nbytes
    except OSError:
        return False


def _prepare(folder: Folder, files: Sequence[RawFile], missing: Sequence[RawFile]) -> None:
    """Make folders, remove what is not whole, and see that there is room for the rest."""
    for name in sorted({os.path.dirname(file.path) for file in files} - {""}):
        folder.child(name).close()
    for file in missing:
        (folder.path / file.path).unlink(missing_ok=True)
    needed, free = sum(file.nbytes for file in missing), shutil.disk_usage(folder.path).free
    if needed > free:
        raise DiskError(
            f"{folder.path} needs {size(needed)} more, and the drive has {size(free)} free: "
            f"free {size(needed - free)}, or choose a folder on another drive with --output"
        )


def _finish(folder: Folder, manifest: Manifest, found: Mapping[str, stamps.State], model: Path, target: Path) -> None:
    """Put manifest and stamp beside the files, and what else a folder needs that is not in `model`; then give it its name."""
    for path in _small_files(model) if target != model / FOLDER else ():
        folder.swap(path.name, path.read_bytes())
    text = write_manifest(manifest)
    folder.swap(manifests.NAME, text)
    stamps.stamp(folder.path, hashlib.sha256(text).hexdigest(), found)
    mode = _mode(model) | 0o700
    for name in folder.names():
        path = folder.path / name
        if name.startswith("."):  # left by a process that was ended
            path.unlink()
        elif name not in found:
            path.chmod(mode if path.is_dir() else mode & 0o666)
    replaced = target.with_name(target.name + REPLACED)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    folder.path.rename(target)
    sync_folder(str(target.parent))
    folder.remove(JOURNAL)
    folder.remove(LOCK)
    target.chmod(mode)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_target(target: Path, replace: bool) -> None:
    """Refuse a target that holds anything but an export, and one that holds an export unless it is to be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir() or target.is_symlink():
        raise ModelError(f"{target} is not a folder; choose another one with --output")
    names = sorted(path.name for path in target.iterdir())
    own = (manifests.NAME, stamps.NAME, JOURNAL, LOCK, REST)
    foreign = [name for name in names if name not in own and not LAYER_FOLDER.fullmatch(name) and not name.endswith(SMALL_FILES)]
    if foreign or (names and manifests.NAME not in names):
        what = f"it holds {foreign[0]}" if foreign else f"it has no {manifests.NAME}"
        raise ModelError(f"{target} is there and is not an export alone: {what}; choose another folder with --output")
    if names and not replace:
        raise ModelError(f"{target} is there already; --verify reads and checks it, --force makes it again")


def _claim(folder: Folder) -> None:
    """Refuse a folder that others than an interrupted export have filled."""
    if foreign := set(folder.names()) - {LOCK} if folder.read(JOURNAL, LIMIT) is None else set():
        folder.remove(LOCK)
        raise ModelError(f"{folder.path} is there, with {sorted(foreign)[0]}, and is not an unfinished export; move it away")


def _clear(folder: Folder) -> None:
    """Remove what is of an export of other weights."""
    for name in set(folder.names()) - {JOURNAL, LOCK}:
        path = folder.path / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def _small_files(model: Path) -> list[Path]:
    """Configuration, tokenizer and templates: small files that are not weights, nor say where weights are."""
    found = []
    for path in sorted(model.iterdir()):
        if path.suffix in SMALL_FILES and not path.name.endswith(".index.json") and path.is_file():
            guard(model, path.name)
            if path.name != manifests.NAME and path.stat().st_size <= SMALL_LIMIT:
                found.append(path)
    return found
