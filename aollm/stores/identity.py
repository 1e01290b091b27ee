"""Identity: everything that keys and values depend on beside the tokens, as one short name.

Two runs with the same identity may share stored blocks, others never meet. It takes the parts as texts and refuses to
know where they come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..errors import StoreError

VERSION = 1
"""Of the format on disk; part of every identity."""
JSON_LIMIT = 1 << 16
WORDS = {
    "version": "another format version",
    "weights": "other weights",
    "configuration": "other configuration",
    "tokenizer": "other tokenizer",
    "dtype": "other dtype",
    "codec": "other codec",
    "block": "other block size",
}
"""What to say of the first part that differs, in the order in which they are compared."""


@dataclass(frozen=True, slots=True)
class Identity:
    """`parts` are texts by name; the keys of `WORDS`, and whatever else results depend on."""

    parts: Mapping[str, str]

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for it in every record."""
        return hashlib.sha256(self.json()).digest()[:16]

    @property
    def hex(self) -> str:
        """The name of its folder."""
        return self.digest.hex()

    def json(self) -> bytes:
        """Canonical JSON: the same bytes for the same parts."""
        return canonical({"version": VERSION, "parts": dict(self.parts)})

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The identity that `json` wrote; `StoreError` for anything else."""
        found = strict_json(data)
        if found.keys() != {"version", "parts"}:
            raise StoreError("an identity has other fields than version and parts; remove the file")
        if found["version"] != VERSION:
            raise StoreError(f"newer version: this identity has version {found['version']!r}, this program knows up to {VERSION}")
        return cls(texts(found["parts"]))


def difference(wanted: Identity, other: Identity) -> str | None:
    """The first part in which `other` differs, in words such as "other weights"; None when they are equal."""
    for name in dict.fromkeys((*WORDS, *sorted(wanted.parts), *sorted(other.parts))):
        if wanted.parts.get(name) != other.parts.get(name):
            return WORDS.get(name, f"other {name}")
    return None


def canonical(value: object) -> bytes:
    """JSON with sorted keys, no blanks and nothing but ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def strict_json(data: bytes) -> dict[str, Any]:
    """A JSON object of at most `JSON_LIMIT` bytes without NaN, and with no key twice; `StoreError` for anything else."""
    try:
        if len(data) > JSON_LIMIT:
            raise ValueError(f"it is larger than {JSON_LIMIT} bytes")
        found = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=int)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"a stored description is not plain JSON ({error}); it was altered: purge the cache") from error
    if not isinstance(found, dict):
        raise StoreError("a stored description is not a JSON object; it was altered: purge the cache")
    return found


def texts(value: object) -> dict[str, str]:
    """`value` if it maps texts to texts; else `StoreError`."""
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise StoreError("the parts of a stored identity are not texts; it was altered: purge the cache")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(built := dict(pairs)) != len(pairs):
        raise ValueError("a key appears twice")
    return built
