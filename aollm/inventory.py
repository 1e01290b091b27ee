"""The inventory: which models are on this machine, found without the network, and what their configurations say of them.

What is downloaded is looked for where downloads go. It refuses to know what is in the weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anyio.to_thread

from .blueprint import dtype_named
from .checkpoint import read_json
from .download import Shelf
from .errors import ModelError
from .families import FAMILIES, unread_quantization
from .families.quantization import quantization
from .hub import COMMIT, MAIN, Repository, missing
from .reference import ALIASES, find, locate

Presence = Literal["here", "incomplete", "absent"]
SHELF = "models--"


@dataclass(frozen=True, slots=True)
class Entry:
    """One model. `reference` is what MODEL may be; `folder` is None where nothing of it is here, and so is all that is read there.

    `nbytes` are on disk, with what has arrived of a download that was broken off. `dtype` is the configuration's, or how the
    weights are quantized. `tier` is None for what generates no text.
    """

    reference: str
    repository: str | None
    presence: Presence
    folder: Path | None = None
    lacking: tuple[str, ...] = ()
    nbytes: int = 0
    model_type: str | None = None
    dtype: str | None = None
    tier: str | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """The entry as JSON has it."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {**fields, "folder": self.folder and str(self.folder), "lacking": list(self.lacking)}


async def inventory(models_dir: Path | None = None) -> list[Entry]:
    """The aliases, and after them whatever else is in `models_dir` (None: huggingface_hub's own cache): downloads, and folders
    with a `config.json`. Raises `ModelError` for a `models_dir` that is none."""
    root = downloads(models_dir)
    entries, seen = [], set[Path]()
    for alias, meant in ALIASES.items():
        found = await anyio.to_thread.run_sync(held, meant, root)
        entries.append(await _entry(alias, meant if isinstance(meant, Repository) else None, found))
        if found is not None:
            seen.add(found)
    for reference, repository, folder in await anyio.to_thread.run_sync(_others, root, models_dir):
        if folder not in seen:
            entries.append(await _entry(reference, repository, folder))
    return entries


def downloads(models_dir: Path | None) -> Path:
    """Where downloads are kept."""
    if models_dir is not None:
        return models_dir
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def held(meant: Path | Repository, root: Path) -> Path | None:
    """The folder on this machine of what a reference means; None where nothing of it is here. Blocking."""
    if isinstance(meant, Path):
        return meant
    shelf = Shelf(root, meant.name)
    commit = shelf.recall(meant.revision)
    folder = shelf.snapshot(commit) if commit is not None and COMMIT.fullmatch(commit) else None
    return folder if folder is not None and folder.is_dir() else None


async def whole(reference: str, models_dir: Path | None) -> Path:
    """The folder of a model that is on this machine; raises `ModelError` that says how to get it where it is not, or not whole."""
    meant = await anyio.to_thread.run_sync(locate, reference)
    if isinstance(meant, Path):
        return await find(reference, models_dir)
    root = downloads(models_dir)
    folder = await anyio.to_thread.run_sync(held, meant, root)
    named = reference if reference == str(meant) else f"{reference} ({meant})"
    how = f"aollm run {reference} PROMPT downloads it, and aollm plan {reference} says before whether it fits"
    if folder is None:
        raise ModelError(f"{named} is not on this machine, as {root} does not have it; {how}")
    if lacking := await missing(folder):
        raise ModelError(f"{named} is here only in part, {folder} lacks {', '.join(lacking[:3])}; {how}")
    return folder


def native(described: Mapping[str, Any]) -> bool:
    """Whether our own layers are made for what `config.json` describes, as far as that alone says."""
    kind = described.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES and unread_quantization(described) is None


def disk_nbytes(folder: Path) -> int:
    """Bytes of the files below `folder`, each counted once, links followed. Blocking."""
    found: dict[tuple[int, int], int] = {}
    for at, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.stat(os.path.join(at, name))
            except OSError:  # a link to nowhere
                continue
            found[status.st_dev, status.st_ino] = status.st_size
    return sum(found.values())


async def _entry(reference: str, repository: Repository | None, folder: Path | None) -> Entry:
    name = repository.name if repository is not None else None
    if folder is None:
        return Entry(reference, name, "absent")
    nbytes = await anyio.to_thread.run_sync(_with_partials, folder, repository is not None)
    try:
        lacking = tuple(await missing(folder)) if repository is not None else ()
        described = {} if "config.json" in lacking else await read_json(folder / "config.json")
    except ModelError as error:
        return Entry(reference, name, "incomplete", folder, nbytes=nbytes, error=str(error))
    kind = described.get("model_type")
    return Entry(
        reference, name, "incomplete" if lacking else "here", folder, lacking, nbytes, kind if isinstance(kind, str) else None,
        quantization(described) or dtype_named(described), await anyio.to_thread.run_sync(_tier, described) if described else None,
    )  # fmt: skip


def _tier(described: Mapping[str, Any]) -> str | None:
    if native(described):
        return "optimized-native"
    from .generic.kind import kind_of  # imports transformers

    return "transformers-generic" if kind_of(described) is not None else None


def _with_partials(folder: Path, downloaded: bool) -> int:
    """What a model has on disk, and what of its download is not whole."""
    blobs = folder.parent.parent / "blobs"
    arriving = blobs.glob("*.incomplete") if downloaded else ()
    return disk_nbytes(folder) + sum(map(_file_nbytes, arriving))


def _file_nbytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # it has arrived meanwhile
        return 0


def _others(root: Path, models_dir: Path | None) -> list[tuple[str, Repository | None, Path]]:
    """References and folders of what is in `root`."""
    try:
        places = sorted(path for path in root.iterdir() if path.is_dir())
    except FileNotFoundError:
        if models_dir is not None:
            raise ModelError(f"{root} is missing; name the folder where models are kept") from None
        return []
    except OSError as error:
        raise ModelError(f"{root} cannot be read: {error.strerror}; name the folder where models are kept") from error
    found: list[tuple[str, Repository | None, Path]] = []
    for place in places:
        if place.name.startswith(SHELF):
            found += _snapshots(place)
        elif (place / "config.json").is_file():
            found.append((str(place), None, place))
    return found


def _snapshots(place: Path) -> Iterable[tuple[str, Repository, Path]]:
    """What there is of one repository: its revisions by their names, or by their commits where no name means them any more."""
    name = place.name.removeprefix(SHELF).replace("--", "/")
    refs, snapshots = place / "refs", place / "snapshots"
    names = {path.relative_to(refs).as_posix(): path for path in refs.rglob("*") if path.is_file()} if refs.is_dir() else {}
    commits = {
        revision: path.read_text(errors="replace").strip() for revision, path in sorted(names.items(), key=lambda ref: ref[0] != MAIN)
    }
    for snapshot in sorted(snapshots.iterdir()) if snapshots.is_dir() else ():
        revision = next((revision for revision, commit in commits.items() if commit == snapshot.name), snapshot.name)
        if snapshot.is_dir():
            repository = Repository(name, revision)
            yield str(repository), repository, snapshot
