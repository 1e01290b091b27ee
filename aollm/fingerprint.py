"""Fingerprints: short texts that differ when a model's files differ in what its results depend on.

Weights are sampled, not read whole: a header and 256 KiB of each shard. Everything here blocks: call it in a worker
thread. It refuses to know what the fingerprints are compared with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import DiskError

PAGE, PAGES = 4096, 64
HEADER_LIMIT = 32 << 20
TEXT_LIMIT = 256 << 20
TOKENIZER_FILES = ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
WITHOUT_EFFECT = frozenset({"_commit_hash", "_name_or_path", "transformers_version", "use_cache"})
"""Keys of config.json that change no result, at any depth."""


def weights(paths: Sequence[str]) -> str:
    """Of safetensors shards: each one's size, header, and 64 pages of 4 KiB spread evenly, by order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths, key=os.path.basename):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                size = os.fstat(fd).st_size
                header = 8 + int.from_bytes(_read(fd, path, 8, 0), "little")
                if header > min(size, 8 + HEADER_LIMIT):
                    raise DiskError(f"{path} has a header of {header} bytes and {size} in all: it is damaged; download it again")
                total.update(size.to_bytes(8, "little") + _read(fd, path, header, 0))
                for number in range(PAGES):
                    at = max(size - PAGE, 0) * number // (PAGES - 1)
                    total.update(_read(fd, path, min(PAGE, size), at))
            finally:
                os.close(fd)
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror or error}; check the path") from error
    return total.hexdigest()


def tokenizer(folder: str | Path) -> str:
    """Of the files, where they are there, that decide how text becomes token ids."""
    total = hashlib.sha256()
    for name in TOKENIZER_FILES:
        path = os.path.join(folder, name)
        try:
            with open(path, "rb") as file:
                data = file.read(TEXT_LIMIT + 1)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise DiskError(f"{path}: {error.strerror or error}; check the path") from error
        if len(data) > TEXT_LIMIT:
            raise DiskError(f"{path} is larger than {TEXT_LIMIT} bytes: no tokenizer is; download it again")
        total.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return total.hexdigest()


def configuration(config: Mapping[str, object]) -> str:
    """Of a model's config.json, whatever the order of its keys, without those that change no result."""
    return hashlib.sha256(json.dumps(_effective(config), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _effective(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _effective(item) for name, item in value.items() if name not in WITHOUT_EFFECT}
    return [_effective(item) for item in value] if isinstance(value, list | tuple) else value


def _read(fd: int, path: str, nbytes: int, offset: int) -> bytes:
    parts: list[bytes] = []
    while nbytes and (part := os.pread(fd, nbytes, offset)):
        parts.append(part)
        nbytes, offset = nbytes - len(part), offset + len(part)
    if nbytes:
        raise DiskError(f"{path} ends at byte {offset}, {nbytes} bytes short: it is truncated, or changed while it was in use")
    return b"".join(parts)
