"""The Hugging Face Hub: a repository's snapshot as a folder of this machine, fetched only as far as a model needs it.

What is cached whole is used without asking. Of names, sizes and commits that the Hub tells, only plain ones are believed, so
that no repository can write outside its own folder. It refuses to know what is in the files, but for the index of the shards.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

import anyio
import anyio.to_thread

from .buffers import size
from .checkpoint import INDEX, SHARD_NAME, SINGLE, read_json
from .download import Progress, RemoteFile, Shelf, Tally, download
from .errors import ModelError
from .tensors import GGUF, PICKLES

MAIN = "main"
CONNECTIONS = 4
TIMEOUT_S = 30.0
COMMIT, DIGEST = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
PLAIN = re.compile(r"\w[\w.\-]{0,240}", re.ASCII)
PART = re.compile(r".*-\d+-of-(?!0*1\.)\d+\.safetensors")
TEXT = re.compile(
    r"(config[\w.\-]*|generation_config|tokenizer[\w.\-]*|special_tokens_map|added_tokens|vocab|merges|spiece|tekken|tiktoken|"
    r"chat_template[\w.\-]*|preprocessor_config|video_preprocessor_config|processor_config)\.(json|jinja|model|txt)",
    re.ASCII,
)
"""Files beside the weights that a model, its tokenizer, its chat template or its processor is made from."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt")


class Unreachable(ModelError):
    """The Hub does not answer, or is not to be asked."""


@dataclass(frozen=True, slots=True)
class Repository:
    """`org/name` on the Hub, at a branch, a tag or a commit."""

    name: str
    revision: str = MAIN

    def __str__(self) -> str:
        return self.name if self.revision == MAIN else f"{self.name}@{self.revision}"


@dataclass(frozen=True, slots=True)
class Listing:
    """The files at the top of a repository, by name, at one commit; `url` is of the folder that they are in."""

    commit: str
    files: dict[str, RemoteFile]
    url: str
    headers: dict[str, str]


async def snapshot(
    repository: Repository, models_dir: Path | None, force: bool, progress: Progress | None, endpoint: str | None = None,
    whole: bool = True,
) -> Path:  # fmt: skip
    """The folder of `repository` below `models_dir` (None: huggingface_hub's own cache), whole, or without its weights.

    The Hub is asked only when something is missing there, or with `force`. Cancelling keeps what has arrived.
    Raises `ModelError`: no such repository or revision, gated, no network, no room, or nothing in it that can be run.
    """
    shelf = Shelf(await anyio.to_thread.run_sync(_default_dir) if models_dir is None else models_dir, repository.name)
    commit = await anyio.to_thread.run_sync(shelf.recall, repository.revision)
    cached = shelf.snapshot(commit) if commit is not None and COMMIT.fullmatch(commit) else None
    lacking = await missing(cached) if cached is not None and not force else []
    if not whole:
        lacking = [name for name in lacking if not name.endswith(".safetensors")]
    if cached is not None and not lacking and not force:
        return cached
    try:
        listing = await anyio.to_thread.run_sync(_list, repository, endpoint, abandon_on_cancel=True)
    except Unreachable as error:
        if force:
            raise ModelError(f"{error}; without force_download, what is in {shelf.root} is used") from error
        if cached is not None and lacking == [TOKENIZERS[0]]:
            return cached  # its tokenizer may be of a kind that is not known here
        what = (
            f"{shelf.root} lacks {', '.join(lacking[:3])} of {repository}" if lacking else f"{repository} is no folder, nor in {shelf.root}"
        )
        how = f"run this again with the network, or copy there what `hf download {repository.name}` fetches elsewhere"
        raise ModelError(f"{error}; {what}: {how}") from error
    return await _complete(repository, listing, shelf, force, progress, whole)


async def missing(folder: Path) -> list[str]:
    """Names of files without which the model in a cached `folder` cannot be run; it is whole if there are none."""
    names = await anyio.to_thread.run_sync(lambda: {path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else set())
    lacking = [] if "config.json" in names else ["config.json"]
    weights = [name for name in names if name.endswith(".safetensors") and not PART.fullmatch(name)]
    if SINGLE not in names and INDEX in names:
        lacking += [name for name in await _shards(folder) if name not in names]
    elif SINGLE not in names and len(weights) != 1:
        lacking.append(SINGLE)
    return lacking if names & {*TOKENIZERS} else [*lacking, TOKENIZERS[0]]


async def _complete(
    repository: Repository, listing: Listing, shelf: Shelf, force: bool, progress: Progress | None, whole: bool
) -> Path:  # fmt: skip
    """The snapshot of `listing` with all that is needed: first the texts, so that whole weights mean a whole model."""
    folder, files = shelf.snapshot(listing.commit), listing.files
    weights = _weights(repository, files)
    if weights == [INDEX]:
        await _fetch(repository, [files[INDEX]], listing, shelf, force, Tally(files[INDEX].nbytes, None))
        weights = await _shards(folder)
        if absent := [name for name in weights if name not in files]:
            raise ModelError(f"{repository}: {INDEX} names {short(absent[0])}, which the repository does not have; choose another revision")
    texts = [file for name, file in files.items() if TEXT.fullmatch(name)]
    shards = [files[name] for name in weights] if whole else []
    needed = await anyio.to_thread.run_sync(lambda: sum(shelf.lacks_nbytes(file, listing.commit, force) for file in texts + shards))
    free = await anyio.to_thread.run_sync(shelf.free_nbytes)
    if needed > free:
        room = f"{size(needed)} are still to be downloaded and {shelf.root} has {size(free)} free"
        raise ModelError(f"{repository}: {room}; make room, or give another folder as models_dir")
    tally = Tally(sum(file.nbytes for file in texts + shards), progress)
    await _fetch(repository, texts, listing, shelf, force, tally)
    await _fetch(repository, shards, listing, shelf, force, tally)
    with _told(repository, listing.url):
        await anyio.to_thread.run_sync(shelf.remember, repository.revision, listing.commit)
    return folder


async def _fetch(
    repository: Repository, files: Sequence[RemoteFile], listing: Listing, shelf: Shelf, force: bool, tally: Tally
) -> None:  # fmt: skip
    """Download `files`, a few at a time. The first trouble ends all of them."""
    stop, limiter, troubles = threading.Event(), anyio.CapacityLimiter(CONNECTIONS), list[ModelError]()

    def one(file: RemoteFile) -> None:
        with _told(repository, listing.url):
            download(file, f"{listing.url}/{file.name}", listing.headers, shelf, listing.commit, force, stop, tally)

    async def each(file: RemoteFile) -> None:
        try:
            await anyio.to_thread.run_sync(one, file, abandon_on_cancel=True, limiter=limiter)
        except ModelError as error:
            troubles.append(error)
            group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            for file in files:
                group.start_soon(each, file)
    finally:
        stop.set()
    if troubles:
        raise troubles[0]


def _weights(repository: Repository, files: dict[str, RemoteFile]) -> list[str]:
    """The files with the weights, or the index that names them: what a checkpoint would be opened from."""
    found = [name for name in files if name.endswith(".safetensors")]
    chosen = next(([name] for name in (SINGLE, INDEX) if name in files), found)
    if "config.json" not in files or not found:
        what = "config.json" if found else "*.safetensors"
        other = next((name for name in files if name.endswith((*PICKLES, GGUF))), None)
        why = f"; {other} is of a kind that is not read" if other else ""
        raise ModelError(f"{repository} has no {what} at its top{why}; choose a repository with config.json and safetensors weights")
    if len(chosen) > 1:
        raise ModelError(f"{repository} has {len(chosen)} *.safetensors files and no {INDEX}; choose another revision")
    return chosen


async def _shards(folder: Path) -> list[str]:
    """The files that the index in `folder` names, in order."""
    picks = (await read_json(folder / INDEX)).get("weight_map")
    names = list(picks.values()) if isinstance(picks, dict) else []
    if odd := [name for name in names if not isinstance(name, str) or not SHARD_NAME.fullmatch(name)]:
        raise ModelError(
            f"{folder / INDEX} names {short(odd[0])}, which is not the plain name of a .safetensors file; it is not to be trusted"
        )
    if not names:
        raise ModelError(f"{folder / INDEX} names no files; download it again (force_download)")
    return sorted(set(names))


def _default_dir() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute()


def _list(repository: Repository, endpoint: str | None) -> Listing:
    """Ask the Hub what there is. Raises `Unreachable` and other `ModelError`s."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers

    api = HfApi(endpoint=endpoint, library_name="aollm")
    with _told(repository, f"{api.endpoint}/{repository.name}"):
        try:
            info = api.model_info(repository.name, revision=repository.revision, files_metadata=True, timeout=TIMEOUT_S)
            commit, siblings = str(info.sha), info.siblings or []
            if not COMMIT.fullmatch(commit):
                raise ValueError(f"{short(commit)} is no commit")
            files = {}
            for entry in siblings:
                if not PLAIN.fullmatch(entry.rfilename):  # a folder's, or nothing that is needed
                    continue
                digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
                nbytes = entry.lfs.size if entry.lfs is not None else entry.size
                if type(nbytes) is not int or nbytes < 0 or not isinstance(digest, str) or not DIGEST.fullmatch(digest):
                    raise ValueError(f"{entry.rfilename} has no size or no checksum")
                files[entry.rfilename] = RemoteFile(entry.rfilename, nbytes, digest)
        except HfHubHTTPError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(
                f"{api.endpoint} answered about {repository} what is not understood ({error}); is it a Hugging Face Hub?"
            ) from error
    url = hf_hub_url(repository.name, "config.json", revision=commit, endpoint=endpoint).removesuffix("/config.json")
    return Listing(commit, files, url, build_hf_headers(library_name="aollm"))


@contextmanager
def _told(repository: Repository, url: str) -> Iterator[None]:
    """What may go wrong between here and the Hub, as `ModelError`s. `url` is the repository's page, or within it."""
    import httpx2
    from huggingface_hub import errors

    page, _, within = url.partition("/resolve/")
    later = "what has arrived is kept" if within else "or try again later"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(f"{repository.name} is gated: accept its terms at {page}, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        how = "check the name, or if it is private log in with `hf auth login`"
        raise ModelError(f"{repository.name} does not exist, neither as a folder nor as {page}; {how}") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"{repository.name} has no revision {repository.revision}; {page}/tree/main shows what there is") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE is set, so nothing is downloaded") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        if code == 404:
            raise ModelError(f"{page} does not exist, or a file of it; check the name, or the Hub that HF_ENDPOINT names") from error
        if code in (401, 403):
            how = f"ask for access at {page}, and log in with `hf auth login`"
            raise ModelError(f"the Hub refuses {repository.name} ({code}); if it is private or gated, {how}") from error
        raise Unreachable(f"the Hub answered {code} for {page}; wait a while, {later}") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError) as error:
        raise Unreachable(f"{page} cannot be reached ({error}); check the network, {later}") from error
    except OSError as error:
        what = f"{error.filename or 'the folder for models'} cannot be written: {error.strerror or error}"
        raise ModelError(f"{repository}: {what}; make room or mend it, or give another folder as models_dir") from error
