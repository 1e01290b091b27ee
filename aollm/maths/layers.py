"""The few products and norms that dense layers are made of, on rows [T, hidden] of any number of requests.

They round where transformers rounds, so that results agree to the last bit where the sums run in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

AMX = torch.cpu._is_amx_tile_supported()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, in] times weight [out, in] plus bias [out].

    One row takes the way that reads weights fastest. `mv` reads 26 GB/s where a matrix product reads 21 on a processor with AMX.
    On one without, it reads 11 to 19 in bfloat16, least where `in` is a power of two, and a product with the row twice 20 to 25.
    """
    if x.shape[0] != 1:
        return functional.linear(x, weight, bias)
    if x.dtype == torch.bfloat16 and not AMX:
        return functional.linear(x.expand(2, -1), weight, bias)[:1]
    y = torch.mv(weight, x[0])
    return (y if bias is None else y + bias)[None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., hidden] (Zhang and Sennrich, 2019), in float32, scaled in x's dtype as Llama does."""
    return weight * functional.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype)


def rms_norm_in_float(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., hidden], scaled in float32 too and rounded once."""
    return functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def rms_norm_about_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of x [..., hidden] whose weight is stored as its difference from one, all in float32, as Gemma does."""
    return rms_norm_in_float(x, 1.0 + weight.float(), eps)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": lambda x: functional.relu(x),
}
