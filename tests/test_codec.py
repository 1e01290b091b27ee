"""Codecs: raw bytes come back as they were, int8 within half a scale, and sizes are as promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aollm.buffers import Arena, pages
from aollm.disk.base import address
from aollm.errors import StoreError
from aollm.maths.attention import BLOCK
from aollm.stores import codec as codec_module
from aollm.stores.codec import Codec, Int8Codec, RawCodec

TYPES = [torch.bfloat16, torch.float16, torch.float32]
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
every_codec = pytest.mark.parametrize("codec", [RawCodec(), Int8Codec()], ids=lambda codec: codec.name)


def random(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, heads, head_dim, generator=generator) * scale for _ in range(2))
    return keys.to(dtype), (3 * values).to(dtype)


def round_trip(codec: Codec, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Through bytes, as a disk would write and read them."""
    extra, parts = codec.encode(keys, values)
    rows, heads, head_dim = keys.shape
    nbytes = codec.payload_nbytes(rows, heads * head_dim * keys.itemsize, keys.itemsize)
    assert sum(part.nbytes for part in parts) == nbytes and nbytes % 4096 == 0 and len(extra) <= 24
    arena = Arena(nbytes)
    at = 0
    for part in parts:
        assert part.itemsize == 1 and part.ndim == 1
        arena.bytes[at : at + part.nbytes] = part
        at += part.nbytes
    return codec.decode(extra.ljust(24, b"\0"), arena.bytes[:nbytes], rows, heads, head_dim, keys.dtype)


def assert_within_bound(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    exact = wanted.double()
    scale = max(exact.abs().max().item() / 127, torch.finfo(torch.float32).tiny)
    rounding = torch.finfo(wanted.dtype).eps * exact.abs() + torch.finfo(wanted.dtype).smallest_normal
    assert bool(((found.double() - exact).abs() <= scale / 2 + scale * 1e-4 + rounding).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, BLOCK), st.integers(1, 3), st.integers(1, 40), st.sampled_from(TYPES), st.integers(0, 9))
def test_raw_is_exact(rows: int, heads: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    keys, values = random(rows, heads, head_dim, dtype, seed)
    found = round_trip(RawCodec(), keys, values)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    assert found[0].dtype == dtype


@settings(max_examples=60, deadline=None)
@given(st.integers(1, BLOCK), st.integers(1, 3), st.integers(1, 40), st.sampled_from(TYPES), st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_int8_is_within_half_a_scale(rows: int, heads: int, head_dim: int, dtype: torch.dtype, scale: float) -> None:
    keys, values = random(rows, heads, head_dim, dtype, rows, scale)
    for found, wanted in zip(round_trip(Int8Codec(), keys, values), (keys, values), strict=True):
        assert_within_bound(found, wanted)


@every_type
def test_raw_keeps_every_bit(dtype: torch.dtype) -> None:
    keys = torch.tensor([float("nan"), float("inf"), -0.0, torch.finfo(dtype).smallest_normal / 4]).to(dtype).view(1, 1, 4)
    for found in round_trip(RawCodec(), keys, keys):
        assert torch.equal(found.view(torch.uint8), keys.view(torch.uint8))


@every_type
def test_whole_pages_are_not_copied(dtype: torch.dtype) -> None:
    arena = Arena(4 * BLOCK * 16 * dtype.itemsize)
    keys = arena.tensor(0, dtype, (BLOCK, 2, 8))
    values = arena.tensor(pages(keys.nbytes), dtype, (BLOCK, 2, 8))
    _, parts = RawCodec().encode(keys, values)
    assert [address(part) for part in parts] == [keys.data_ptr(), values.data_ptr()]
    found = RawCodec().decode(b"", arena.bytes, BLOCK, 2, 8, dtype)
    assert [half.data_ptr() for half in found] == [keys.data_ptr(), values.data_ptr()]


@every_codec
def test_copies_lie_on_pages_and_are_padded_with_zeros(codec: Codec) -> None:
    keys, values = random(5, 1, 7, torch.bfloat16)
    _, parts = codec.encode(keys, values)
    for part in parts:
        assert address(part) % 4096 == 0 and not any(part[70:])
    if isinstance(codec, RawCodec):
        assert address(parts[0]) != keys.data_ptr()


@every_codec
def test_tensors_in_pieces_are_read_in_order(codec: Codec) -> None:
    keys, values = random(64, 4, 32, torch.float32)
    wanted = round_trip(codec, keys[:, 1:3].contiguous(), values[:, 1:3].contiguous())
    found = round_trip(codec, keys[:, 1:3], values[:, 1:3])
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@every_type
def test_zeros_stay_zeros(dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 2, 4, dtype=dtype)
    for found in round_trip(Int8Codec(), zeros, zeros):
        assert torch.equal(found, zeros)


@every_type
def test_the_largest_and_smallest_numbers_are_quantized(dtype: torch.dtype) -> None:
    largest = torch.tensor([torch.finfo(dtype).max, -torch.finfo(dtype).max, 1.0, 0.0], dtype=dtype).view(2, 1, 2)
    smallest = torch.tensor([torch.finfo(dtype).smallest_normal / 2, 0.0, 0.0, 0.0]).to(dtype).view(2, 1, 2)
    for found, wanted in zip(round_trip(Int8Codec(), largest, smallest), (largest, smallest), strict=True):
        assert bool(found.isfinite().all())
        assert_within_bound(found, wanted)


def test_keys_and_values_have_a_scale_each_and_slices_share_it() -> None:
    keys, values = random(BLOCK, 2, 64, torch.bfloat16)  # two slices
    assert keys.numel() == 2 * codec_module.SLICE
    keys[0, 0, 0] = 127.0
    values[-1] = -25.4
    extra, parts = Int8Codec().encode(keys, values)
    assert codec_module.SCALES.unpack(extra) == pytest.approx((1.0, values.float().abs().max().item() / 127))
    codes = torch.frombuffer(parts[0], dtype=torch.int8)[: keys.numel()].view(keys.shape)
    assert torch.equal(codes, keys.float().round().to(torch.int8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_type
def test_what_is_not_finite_cannot_be_quantized(bad: float, dtype: torch.dtype) -> None:
    keys, values = random(BLOCK, 2, 64, dtype)
    values[700, 1, 3] = bad
    with pytest.raises(StoreError, match="cannot be quantized"):
        Int8Codec().encode(keys, values)


@pytest.mark.parametrize("width", [64, 256, 1024])
@every_type
def test_int8_takes_about_half(dtype: torch.dtype, width: int) -> None:
    sizes = [codec.payload_nbytes(BLOCK, width * dtype.itemsize, dtype.itemsize) for codec in (RawCodec(), Int8Codec())]
    assert sizes[1] <= 0.55 * sizes[0]
    assert sizes[0] == 2 * BLOCK * width * dtype.itemsize


def test_codecs_have_their_names() -> None:
    assert [(codec.name, codec.representation) for codec in (RawCodec(), Int8Codec())] == [
        ("full-precision", ""),
        ("quantized", "int8-symmetric-per-tensor"),
    ]
