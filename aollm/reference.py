"""References: what a person calls a model, and the folder that it means.

A folder that exists is always meant first; then an alias; then `org/repo[@rev]`, with or without `hf://` before it, which is
a repository of the Hugging Face Hub. It refuses to know what is in the folder.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import anyio.to_thread

from .demo import MODEL as DEMO
from .download import Progress
from .errors import ModelError
from .hub import MAIN, Repository, snapshot
from .tensors import GGUF, NO_GGUF

ALIASES: dict[str, Path | Repository] = {
    "demo": DEMO,
    "llama3-1B-chat": Repository("meta-llama/Llama-3.2-1B-Instruct"),
    "llama3-3B-chat": Repository("meta-llama/Llama-3.2-3B-Instruct"),
    "llama3-8B-chat": Repository("meta-llama/Llama-3.1-8B-Instruct"),
    "gemma3-12B": Repository("google/gemma-3-12b-it"),
    "qwen3-next-80B": Repository("Qwen/Qwen3-Next-80B-A3B-Instruct"),
    "gpt-oss-20B": Repository("openai/gpt-oss-20b"),
    "voxtral-small-24B": Repository("mistralai/Voxtral-Small-24B-2507"),
}
SCHEME = "hf://"
WORD = r"[A-Za-z0-9]([\w.\-]*[A-Za-z0-9_])?"
REPOSITORY = re.compile(rf"(?P<name>{WORD}/{WORD})(@(?P<revision>[A-Za-z0-9][\w./\-]{{0,127}}))?", re.ASCII)
NAME_LIMIT = 96


async def find(
    reference: str, models_dir: Path | None = None, force_download: bool = False, progress: Progress | None = None,
    *, endpoint: str | None = None,
) -> Path:  # fmt: skip
    """The folder of a model, downloaded if need be.

    A repository is looked for in `models_dir` (None: where huggingface_hub keeps its own), and fetched as far as it is not
    there, or all of it with `force_download`. `progress` is told as it arrives. `endpoint`: another Hub than `HF_ENDPOINT`.
    Raises `ModelError` when there is no such model, or it cannot be had.
    """
    found = await anyio.to_thread.run_sync(locate, reference)
    return found if isinstance(found, Path) else await snapshot(found, models_dir, force_download, progress, endpoint)


async def describe(
    reference: str, models_dir: Path | None = None, force_download: bool = False, *, endpoint: str | None = None
) -> Path:  # fmt: skip
    """The folder of a model as `find` has it, but of a repository that is not here only its configuration, tokenizer and index."""
    found = await anyio.to_thread.run_sync(locate, reference)
    return found if isinstance(found, Path) else await snapshot(found, models_dir, force_download, None, endpoint, whole=False)


def locate(reference: str) -> Path | Repository:
    """What `reference` means, as far as it can be said without the network. Raises `ModelError` when it means nothing."""
    alias = ALIASES.get(reference)
    try:
        folder = Path(reference).expanduser()
        found, exists = folder.is_dir(), folder.exists()
        if alias is not None:  # a folder that happens to be called demo does not hide it, unless it is a model
            return folder if (folder / "config.json").is_file() else alias
    except OSError as error:
        raise ModelError(f"{reference[:200]!r} cannot be looked up ({error.strerror}); {_accepted(reference)}") from error
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{reference[:200]!r} is not a path that can be looked up ({error}); {_accepted(reference)}") from error
    if found and reference:
        return folder
    if exists and folder.name.endswith(GGUF):
        raise ModelError(f"{reference} is a file, not a folder, and {NO_GGUF}: its folder (config.json and *.safetensors), or org/repo")
    if exists and reference:
        raise ModelError(f"{reference} is a file, not a folder; {_accepted(reference)}")
    if (repository := _repository(reference.removeprefix(SCHEME))) is not None:
        return repository
    if reference.startswith(SCHEME):
        raise ModelError(f"{reference[:200]!r} names no repository; write hf://org/repo or hf://org/repo@revision")
    shown = reference[:200] if reference.isprintable() and reference else repr(reference[:200])
    raise ModelError(f"{shown} does not exist; {_accepted(reference)}")


def _repository(text: str) -> Repository | None:
    """The repository that `text` names by the Hub's rules for names, if it does."""
    if (found := REPOSITORY.fullmatch(text)) is None:
        return None
    name, revision = found["name"], found["revision"] or MAIN
    plain = len(name) <= NAME_LIMIT and "--" not in name and ".." not in text and not name.endswith(".git")
    return Repository(name, revision) if plain and "//" not in revision and not revision.endswith(("/", ".", ".lock")) else None


def _accepted(reference: str) -> str:
    lower = {name.lower(): name for name in ALIASES}
    near = difflib.get_close_matches(reference[:200].lower(), lower, 1)
    question = f"did you mean {lower[near[0]]}? " if near else ""
    known = ", ".join(ALIASES)
    return f"{question}give the folder of a model (config.json and *.safetensors), org/repo of the Hugging Face Hub, or one of: {known}"
