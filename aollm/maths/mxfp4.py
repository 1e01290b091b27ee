"""Weights of four bits: 32 codes share a power of two (OCP Microscaling Formats 1.0, MXFP4), as gpt-oss publishes its experts.

Blocks are uint8 [out, in/32, 16], two codes a byte, the low nibble first; scales are uint8 [out, in/32], exponents with bias 127.
Few rows are multiplied while decoding, so that only packed bytes are read; for many the weights are decoded tile by tile for a matrix
product. numba compiles both at first use; without it torch does the same, slower. It knows nothing of experts, or of who reads them.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError

if TYPE_CHECKING:
    from .mxfp4_kernels import Kernels

DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)  # the codes' sizes, twice: half of the largest scale is finite
SCRATCH_NBYTES = 4 << 20  # of decoded weights at a time: they stay in the cache until the product has read them
EXACT = (torch.bfloat16, torch.float32)  # hold every finite number; other types are rounded from float32
FUSED_ROWS = {torch.bfloat16: 8, torch.float32: 32}  # measured: up to here, decoding for each four rows beats decoding once


def compiled() -> bool:
    """Whether numba's kernels are in force; compiles them if no one has. Without numba: warns once, and torch decodes."""
    return _kernels() is not None


def dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Weights [..., out, in] in `dtype` from blocks [..., out, in/32, 16] and scales [..., out, in/32].

    Bit for bit what transformers gives (it also transposes). bfloat16 and float32 hold every finite number exactly; float16 rounds once.
    Scale 255, which the standard calls NaN, is 2^128, as there. `CheckpointError` on shapes or types that do not go together.
    """
    _check(blocks, scales)
    *outer, groups, _ = blocks.shape
    exact = dtype if dtype in EXACT else torch.float32
    weights = torch.empty(scales.numel() // groups, groups * 32, dtype=exact, device=blocks.device)
    _decode(weights, blocks.reshape(-1, groups, 16), scales.reshape(-1, groups))
    return weights.to(dtype).view(*outer, groups * 32)


def mxfp4_linear(x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weights of blocks [out, in/32, 16] and scales [out, in/32], plus bias [out]: [T, out] in x's type.

    Equals `linear(x, dequantize(blocks, scales, x.dtype), bias)` within rounding; sums are float32. Takes at most `SCRATCH_NBYTES` of
    memory beside a float32 copy of few rows. `CheckpointError` on shapes or types that do not go together.
    """
    _check(blocks, scales)
    if scales.dim() != 2:
        raise CheckpointError(
            f"rows are multiplied with MXFP4 scales of 2 dimensions, found {list(scales.shape)}; pass one expert's weights"
        )
    outs, groups = scales.shape
    if bias is not None and bias.shape != (outs,):
        raise CheckpointError(
            f"a bias of {bias.numel()} numbers does not go with MXFP4 weights of {outs} outputs; download the model again"
        )
    if x.shape[1] != groups * 32:
        raise CheckpointError(
            f"rows of {x.shape[1]} numbers do not go with MXFP4 weights of {groups * 32} inputs; is this the right config.json?"
        )
    if (kernels := _kernels() if x.device.type == "cpu" else None) and x.shape[0] <= FUSED_ROWS.get(x.dtype, 0):
        return _fused(kernels, x, blocks.contiguous(), scales.contiguous(), bias)
    y = x.new_empty(x.shape[0], outs)
    exact = x.dtype if x.dtype in EXACT else torch.float32
    tile = min(outs, max(1, SCRATCH_NBYTES // (groups * 32 * exact.itemsize)))
    scratch = torch.empty(tile, groups * 32, dtype=exact, device=x.device)
    bias = None if bias is None else bias.to(x.dtype)
    for first in range(0, outs, tile):
        part = slice(first, first + tile)
        weights = scratch[: scales[part].shape[0]]
        _decode(weights, blocks[part], scales[part])
        y[:, part] = functional.linear(x, weights.to(x.dtype), None if bias is None else bias[part])
    return y


def _fused(kernels: Kernels, x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    outs, groups = scales.shape
    lanes = x.float().reshape(-1, groups * 16, 2).transpose(1, 2).contiguous()  # [T, even or odd, in/2], as nibbles lie
    y = torch.empty(x.shape[0], outs)
    at = y.data_ptr(), lanes.data_ptr(), blocks.data_ptr(), scales.data_ptr()
    kernels.run(kernels.product, *at, x.shape[0], groups, outs, threads=torch.get_num_threads())
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def _decode(weights: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """Fill `weights` [out, in], bfloat16 or float32, from blocks [out, groups, 16]."""
    kernels = _kernels() if weights.device.type == "cpu" else None
    if kernels is None:
        return _look_up(weights, blocks, scales)
    blocks, scales = blocks.contiguous(), scales.contiguous()
    at = weights.data_ptr(), blocks.data_ptr(), scales.data_ptr()
    kernels.run(kernels.decode, *at, scales.numel(), weights.dtype == torch.bfloat16, threads=torch.get_num_threads())


def _look_up(weights: Tensor, blocks: Tensor, scales: Tensor) -> None:
    """The same by torch alone: each byte looks up a pair of numbers; by tiles, because an index takes eight bytes."""
    numbers = torch.tensor([*DOUBLED, *(-double for double in DOUBLED)], dtype=weights.dtype, device=weights.device)
    pairs = torch.stack((numbers.repeat(16), numbers.repeat_interleave(16)), dim=1)  # [256, 2], the low nibble first
    tile = max(1, SCRATCH_NBYTES // (blocks.shape[1] * 16 * 8))
    for first in range(0, blocks.shape[0], tile):
        part = slice(first, first + tile)
        power = torch.exp2(scales[part].float() - 128).to(weights.dtype)
        torch.mul(pairs[blocks[part].long()], power[..., None, None], out=weights[part].view(*blocks[part].shape, 2))


def _check(blocks: Tensor, scales: Tensor) -> None:
    fits = (
        blocks.dtype == scales.dtype == torch.uint8 and blocks.dim() >= 3 and blocks.shape == (*scales.shape, 16) and blocks.shape[-2] > 0
    )
    if not fits:
        raise CheckpointError(
            f"MXFP4 weights must be uint8 blocks [..., out, in/32, 16] with uint8 scales [..., out, in/32], found "
            f"{blocks.dtype} {list(blocks.shape)} with {scales.dtype} {list(scales.shape)}; download the model again"
        )


@cache
def _kernels() -> Kernels | None:
    try:
        from .mxfp4_kernels import kernels
    except ImportError as error:
        message = (
            f"MXFP4 weights are decoded without compiled kernels, many times slower ({error}); to have them: pip install 'aollm[mxfp4]'"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None
    threads = torch.get_num_threads()
    built = kernels()
    torch.set_num_threads(threads)  # numba sets the number of OpenMP's threads, which may be torch's, as it starts its own
    return built
