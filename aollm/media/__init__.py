"""Parts of a prompt that are no text: images and sounds, from whatever holds them to arrays.

Blocking; call it in a worker thread. What it reads, decodes and keeps is bounded, whatever the input. It fetches nothing
from a network, and knows nothing of models: they make of a picture's size and of a sound's length what they like.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import RequestError
from .picture import array_pixels, pixels
from .sound import RATE_HZ, array_samples, samples
from .source import content, short

__all__ = ["TYPES", "Media", "read_part"]

Kind = Literal["image", "audio"]
TYPES: Mapping[str, Kind] = {"image": "image", "image_url": "image", "audio": "audio", "input_audio": "audio"}
KEYS = {"image": ("image", "image_url", "path", "url", "base64"), "audio": ("audio", "input_audio", "path", "url", "base64", "data")}


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """An image uint8 [H, W, 3], or a sound float32 [samples] of one channel at 16,000 Hz; equal values have an equal `digest`."""

    kind: Kind
    data: np.ndarray
    digest: bytes

    @classmethod
    def of(cls, kind: Kind, data: np.ndarray) -> Media:
        """`data` with its digest."""
        data = np.ascontiguousarray(data)
        digest = hashlib.blake2b(f"{kind} {data.shape}".encode(), digest_size=16)
        digest.update(data.data)
        return cls(kind, data, digest.digest())

    def __repr__(self) -> str:
        what = f"{self.data.shape[1]} × {self.data.shape[0]}" if self.kind == "image" else f"{len(self.data) / RATE_HZ:.2f} s"
        return f"<Media {self.kind} {what} {self.digest.hex()[:8]}>"


def read_part(part: Mapping[str, Any], files: bool = True) -> Media:
    """The image or sound of one part of a message; `files` says whether it may name a file of this machine.

    `{"type": "image", "image": …}` with a path, bytes, a data URI, a Pillow image or an array uint8 [H, W], [H, W, 3] or
    [H, W, 4]; `{"type": "audio", "audio": …}` with a path, bytes, a data URI, or an array [samples] or [samples, channels] beside
    its `sampling_rate`, Hz; also under `path`, `url` or `base64`. And as API clients send them: `{"type": "image_url",
    "image_url": {"url": "data:…"}}`, `{"type": "input_audio", "input_audio": {"data": …, "format": "wav"}}`.
    Raises `RequestError` for anything else, and for what is damaged, too large, animated, too long or not a number.
    """
    name = part.get("type") if isinstance(part, Mapping) else part
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise RequestError(f"a part of type {short(name)} is no image and no sound; these have one of the types {', '.join(TYPES)}")
    source, rate = given(part, kind), part.get("sampling_rate")
    if isinstance(source, Mapping):
        source, rate = given(source, kind), source.get("sampling_rate", rate)
    if kind == "image":
        return Media.of(kind, array_pixels(source) if isinstance(source, np.ndarray) else pixels(source, files))
    return Media.of(kind, array_samples(source, rate) if isinstance(source, np.ndarray) else samples(content(source, kind, files)))


def given(part: Mapping[str, Any], kind: Kind) -> Any:
    """What a part's image or sound is given as."""
    found = [key for key in KEYS[kind] if part.get(key) is not None]
    if len(found) != 1:
        raise RequestError(f"a part with an {kind} has it under one of {', '.join(KEYS[kind])}; this one has {len(found)} of them")
    value = part[found[0]]
    bare = found[0] in ("base64", "data") and isinstance(value, str) and value[:5].lower() != "data:"
    return f"data:;base64,{value}" if bare else value
