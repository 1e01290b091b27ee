"""The gpt-oss family: attention with sinks and alternating windows, and a mixture of experts with clamped gates.

gpt-oss (OpenAI, 2025). Experts are read as published, in MXFP4 (blocks of 32 four-bit numbers with a scale each) or in
bfloat16, one expert being a row of the tensors that hold all of a layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..maths.layers import rms_norm_in_float
from ..maths.mxfp4 import SCRATCH_NBYTES, compiled, mxfp4_linear
from ..maths.rope import Rope, rotate
from .base import Angles, Attend, Experts, KvShape, Mixed, Need, Params, Route, Step, Work, count, head_name, layer_kinds, positive
from .quantization import quantization

SLIDING, FULL = "sliding_attention", "full_attention"
PACKED = "mxfp4"
"""The quantization that is read here."""
GROUP = 32
"""Numbers that share a scale."""


class GptOss:
    """Sizes and steps of one model; `config` is its `config.json`, `dtype` that of its weights, `prefix` what their names begin with."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        self.hidden = count(config, "hidden_size", 2880)
        self.vocabulary = count(config, "vocab_size", 201_088)
        self.context = count(config, "max_position_embeddings", 131_072, most=1 << 30)
        self.intermediate = count(config, "intermediate_size", 2880)
        self.layers = count(config, "num_hidden_layers", 36, most=4096)
        self.heads = count(config, "num_attention_heads", 64, most=65_536)
        self.kv_heads = count(config, "num_key_value_heads", 8, most=65_536)
        self.head_dim = count(config, "head_dim", 64, most=65_536)
        self.experts = count(config, "num_local_experts", 128, most=65_536)
        self.top = count(config, "num_experts_per_tok", count(config, "experts_per_token", 4), most=self.experts)
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json: num_attention_heads ({self.heads}) must be a multiple of num_key_value_heads ({self.kv_heads})")
        self.eps = positive(config, "rms_norm_eps", 1e-5)
        self.limit, self.alpha = positive(config, "swiglu_limit", 7.0), positive(config, "swiglu_alpha", 1.702)
        self.packed = quantization(config) == PACKED
        if self.packed and (self.hidden % GROUP or self.intermediate % GROUP):
            raise ModelError(f"config.json: hidden_size and intermediate_size must be multiples of {GROUP} for MXFP4")
        if self.packed:
            compiled()  # now, so that the memory it takes is counted, and no answer waits for it
        self.dtype = dtype
        self.kinds = layer_kinds(config, self.layers, (SLIDING, FULL)) or (SLIDING, FULL) * self.layers
        self.rope = Rope.from_config(config, self.head_dim, 150_000.0)
        self.embedding, self.norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self.head = head_name(prefix, bool(config.get("tie_word_embeddings", False)))
        window, by_length = count(config, "sliding_window", 128, most=1 << 30), self.rope.depends_on_length
        self.kv = KvShape(
            self.layers, self.kv_heads, self.head_dim, dtype,
            tuple(window if self.kinds[layer] == SLIDING else None for layer in range(self.layers)),
            shift=None if by_length else self.rope.shifted, depends_on_length=by_length,
        )  # fmt: skip
        bias = bool(config.get("attention_bias", True))
        self.steps: Sequence[Step] = tuple(
            step
            for layer in range(self.layers)
            for step in (self._attention_step(layer, f"{prefix}layers.{layer}", bias), self._mixture_step(layer, f"{prefix}layers.{layer}"))
        )

    def begin(self, x: Tensor) -> Tensor:
        """Embeddings as they are."""
        return x

    def angles(self, positions: Tensor, length: int) -> Angles:
        """Cosines and sines [T, 1, D/2]."""
        return self.rope.angles(positions, length, self.dtype)

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm."""
        return rms_norm_in_float(x, norm, self.eps)

    def activation_nbytes(self, rows: int) -> int:
        """The larger of the two steps: norms in float32 and q|k|v with its rotation, or an expert's gate|up, its product, and its
        weights unpacked where they are."""
        item = self.dtype.itemsize
        attention = (3 * self.heads + 4 * self.kv_heads) * self.head_dim * item + 2 * self.heads * self.head_dim * 4
        unpacked = 3 * SCRATCH_NBYTES if self.packed else 0
        return rows * (self.hidden * (8 + 4 * item) + max(attention, 7 * self.intermediate * item)) + unpacked

    def attention(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        """x + attention(norm(x))."""
        rows = x.shape[0]
        qkv = w.linear("qkv", rms_norm_in_float(x, w["norm"], self.eps))  # [T, (H + 2 K) D]
        qk, v = qkv.view(rows, -1, self.head_dim).split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(qk, *angles).split_with_sizes((self.heads, self.kv_heads), dim=1)  # [T, H, D], [T, K, D]
        o = yield Attend(layer, q, k, v, self.head_dim**-0.5, w["sinks"])  # [T, H, D]
        return x + w.linear("o", o.reshape(rows, -1))

    def mixture(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + mixture(norm(x)); gates are a softmax over the chosen experts alone."""
        h = rms_norm_in_float(x, w["norm"], self.eps)
        best, experts = self.best(h, w)
        yield Route(h, experts, best.softmax(-1))
        mixed = yield Mixed()
        return x + mixed

    def best(self, h: Tensor, w: Params) -> tuple[Tensor, Tensor]:
        """The largest logits of normed rows h, and whose they are, both [T, top]."""
        return w.linear("router", h).topk(self.top, dim=-1)

    def likely(self, x: Tensor, w: Params) -> Tensor:
        """The experts that rows x would be sent to."""
        return self.best(rms_norm_in_float(x, w["norm"], self.eps), w)[1]

    def expert(self, rows: Tensor, w: Params, number: int, beside: Params) -> Tensor:
        """One expert's rows [N, hidden]; gate and up alternate in the product."""
        gate_up = self._product("gate_up", rows, w, beside["gate_up_bias"][number])
        gate, up = gate_up[:, ::2].clamp(max=self.limit), gate_up[:, 1::2].clamp(-self.limit, self.limit)
        return self._product("down", (up + 1) * (gate * torch.sigmoid(gate * self.alpha)), w, beside["down_bias"][number])

    def _product(self, name: str, rows: Tensor, w: Params, bias: Tensor) -> Tensor:
        if self.packed:
            return mxfp4_linear(rows, w[f"{name}_blocks"], w[f"{name}_scales"], bias)
        return torch.addmm(bias, rows, w[name])

    def _attention_step(self, layer: int, at: str, bias: bool) -> Step:
        wide, stacked = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        params = {
            "norm": Need((self.hidden,), (f"{at}.input_layernorm.weight",)),
            "sinks": Need((self.heads,), (f"{at}.self_attn.sinks",)),
            "qkv": Need((stacked, self.hidden), tuple(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            "o": Need((self.hidden, wide), (f"{at}.self_attn.o_proj.weight",)),
        }
        if bias:
            params["qkv_bias"] = Need((stacked,), tuple(f"{at}.self_attn.{name}_proj.bias" for name in "qkv"))
            params["o_bias"] = Need((self.hidden,), (f"{at}.self_attn.o_proj.bias",))
        return Step(layer, "attention", params, partial(self.attention, layer=layer), attends=layer)

    def _mixture_step(self, layer: int, at: str) -> Step:
        params = {
            "norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
            "router": Need((self.experts, self.hidden), (f"{at}.mlp.router.weight",)),
            "router_bias": Need((self.experts,), (f"{at}.mlp.router.bias",)),
            "gate_up_bias": Need((self.experts, 2 * self.intermediate), (f"{at}.mlp.experts.gate_up_proj_bias",), self.dtype),
            "down_bias": Need((self.experts, self.hidden), (f"{at}.mlp.experts.down_proj_bias",), self.dtype),
        }
        experts = Experts(self.experts, self.top, partial(self._expert_params, f"{at}.mlp.experts"), self.expert, self.likely)
        return Step(layer, "mixture", params, self.mixture, experts=experts)

    def _expert_params(self, at: str, number: int) -> Mapping[str, Need]:
        shapes = {"gate_up": (2 * self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}
        params: dict[str, Need] = {}
        for name, (outs, ins) in shapes.items():
            if self.packed:
                params[f"{name}_blocks"] = Need((outs, ins // GROUP, 16), (f"{at}.{name}_proj_blocks",), torch.uint8, number)
                params[f"{name}_scales"] = Need((outs, ins // GROUP), (f"{at}.{name}_proj_scales",), torch.uint8, number)
            else:
                params[name] = Need((ins, outs), (f"{at}.{name}_proj",), row=number)
        return params
