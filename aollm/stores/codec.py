"""What a block's keys and values look like on disk: as they are, or as int8 with one scale for each of the two.

A payload is the keys, then the values, each in whole pages. Encoding runs beside the compute thread, so it is numpy in
one thread and in slices; decoding is the compute thread's. It refuses to know where a payload lies.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..buffers import PAGE, Arena, pages
from ..errors import StoreError

SLICE = 1 << 16
"""Values that are quantized at a time: temporaries stay below 1 MiB."""
SCALES = struct.Struct("<ff")
SMALLEST = float(np.finfo(np.float32).tiny)
"""Scales below are not normal numbers, and may be flushed to zero."""


class Codec(Protocol):
    """Keys and values [R, K, D] to bytes and back. `row_nbytes` are those of one row of keys, as computed with."""

    name: str
    representation: str

    def payload_nbytes(self, rows: int, row_nbytes: int, itemsize: int) -> int:
        """Bytes of the payload of `rows` rows, whole pages counted."""
        ...

    def encode(self, keys: Tensor, values: Tensor) -> tuple[bytes, list[memoryview]]:
        """At most 24 bytes for the record's header, and the payload's parts, which may be the tensors' own memory."""
        ...

    def decode(self, extra: bytes, payload: memoryview, rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values of `rows` rows, which may be views of the payload."""
        ...


class RawCodec:
    """The bytes as they are; nothing is copied where keys and values are whole pages."""

    name = "full-precision"
    representation = ""

    def payload_nbytes(self, rows: int, row_nbytes: int, itemsize: int) -> int:
        """Twice the rows' bytes, each rounded up to pages."""
        return 2 * pages(rows * row_nbytes)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[bytes, list[memoryview]]:
        """No bytes for the header; views of both tensors, or copies where they are not whole pages in one piece."""
        return b"", [raw_bytes(keys), raw_bytes(values)]

    def decode(self, extra: bytes, payload: memoryview, rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Views of the payload."""
        return halves(payload, rows, heads, head_dim, dtype)


class Int8Codec:
    """x ≈ scale · q with q in -127..127 and scale = max|x| / 127, one for the keys and one for the values: the error is at
    most half a scale, and the type's own rounding."""

    name = "quantized"
    representation = "int8-symmetric-per-tensor"

    def payload_nbytes(self, rows: int, row_nbytes: int, itemsize: int) -> int:
        """A byte for each value, keys and values rounded up to pages."""
        return 2 * pages(rows * row_nbytes // itemsize)

    def encode(self, keys: Tensor, values: Tensor) -> tuple[bytes, list[memoryview]]:
        """Both scales for the header, and the codes; `StoreError` if a value is not finite."""
        key_scale, key_codes = quantized(keys)
        value_scale, value_codes = quantized(values)
        return SCALES.pack(key_scale, value_scale), [key_codes, value_codes]

    def decode(self, extra: bytes, payload: memoryview, rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """New tensors of `dtype`."""
        key_scale, value_scale = SCALES.unpack_from(extra)
        keys, values = halves(payload, rows, heads, head_dim, torch.int8)
        return keys.float().mul_(key_scale).to(dtype), values.float().mul_(value_scale).to(dtype)


def halves(payload: memoryview, rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The payload's two halves [R, K, D] as views."""
    count, shape = rows * heads * head_dim, (rows, heads, head_dim)
    keys = torch.frombuffer(payload, dtype=dtype, count=count).view(shape)
    values = torch.frombuffer(payload, dtype=dtype, count=count, offset=pages(count * dtype.itemsize)).view(shape)
    return keys, values


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory, or a copy in whole pages."""
    raw = tensor.view(torch.uint8).numpy()
    if raw.flags.c_contiguous and raw.nbytes % PAGE == 0:
        return raw.reshape(-1).data
    copy = Arena(raw.nbytes, huge=False).bytes
    np.frombuffer(copy, np.uint8, raw.nbytes).reshape(raw.shape)[...] = raw
    return copy


def quantized(tensor: Tensor) -> tuple[float, memoryview]:
    """The scale, and the codes in whole pages."""
    peak = 0.0
    for part in slices(tensor):
        low, high = float(part.min()), float(part.max())
        if not np.isfinite(low) or not np.isfinite(high):
            raise StoreError("keys or values that are not finite cannot be quantized; use a full-precision KV cache")
        peak = max(peak, high, -low)
    scale = np.float32(peak / 127)
    if float(scale) * 127 > peak:  # rounded up: 127 · scale could overflow
        scale = np.nextafter(scale, np.float32(0))
    scale = max(scale, np.float32(SMALLEST))
    codes = Arena(tensor.numel(), huge=False).bytes
    out, at = np.frombuffer(codes, np.int8), 0
    for part in slices(tensor):
        part /= scale
        out[at : at + part.size] = np.rint(part, out=part)
        at += part.size
    return float(scale), codes


def slices(tensor: Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """The values in order, as new float32 arrays of about `SLICE` values."""
    step = max(1, SLICE // max(1, tensor[:1].numel()))
    narrow = tensor.dtype == torch.bfloat16  # which numpy does not know: the upper half of a float32's bits
    source: npt.NDArray[Any] = tensor.view(torch.int16).numpy().view(np.uint16) if narrow else tensor.numpy()
    for start in range(0, len(source), step):
        part = source[start : start + step].reshape(-1)
        if narrow:
            bits = part.astype(np.uint32)
            bits <<= 16
            yield bits.view(np.float32)
        else:
            yield part.astype(np.float32)
