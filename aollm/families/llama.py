"""The llama family: pre-norm attention with rotary positions and grouped heads, and a gated MLP.

Llama (Touvron et al., 2023; Grattafiori et al., 2024). Mistral, Mixtral, Qwen2 and Qwen3 differ by a row in `VARIANTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SpecializationError
from ..maths.layers import ACTIVATIONS, rms_norm
from ..maths.rope import Rope, rotate
from .base import Angles, Attend, KvShape, Need, Params, Step, Work, count, gated_mlp, head_name, layer_kinds, positive
from .mixture import ExpertNames, Mixture


@dataclass(frozen=True, slots=True)
class Variant:
    """How a relative of Llama differs from it."""

    qkv_bias: bool | None = None
    """None: as `attention_bias` of the config says, for the output projection too."""
    head_norms: bool = False
    window: Callable[[Mapping[str, Any], int], int | None] = lambda config, layer: None
    theta: float = 10_000.0
    mixture: Callable[[Mapping[str, Any], int], Mixture | None] = lambda config, layer: None
    """What a layer has in the place of its MLP."""


def _mistral_window(config: Mapping[str, Any], layer: int) -> int | None:
    return None if config.get("sliding_window") is None else count(config, "sliding_window", most=1 << 30)


def _qwen_window(config: Mapping[str, Any], layer: int) -> int | None:
    if not config.get("use_sliding_window"):
        return None
    window = count(config, "sliding_window", 4096, most=1 << 30)
    if kinds := layer_kinds(config, layer + 1, ("full_attention", "sliding_attention")):
        return window if kinds[layer] == "sliding_attention" else None
    full = config.get("max_window_layers", 28)
    if not isinstance(full, int):
        raise ModelError(f"config.json: max_window_layers must be a whole number, found {full!r}")
    return window if layer >= full else None


def _qwen_moe_window(config: Mapping[str, Any], layer: int) -> int | None:
    return count(config, "sliding_window", 4096, most=1 << 30) if config.get("use_sliding_window") else None


def _mixtral_experts(config: Mapping[str, Any], layer: int) -> Mixture:
    names = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", ("w1", "w3", "w2"))
    return Mixture.from_config(config, names, "intermediate_size", renormalise=True)


def _qwen_experts(config: Mapping[str, Any], layer: int) -> Mixture | None:
    dense, every = config.get("mlp_only_layers") or [], count(config, "decoder_sparse_step", 1, most=4096)
    if layer in dense or (layer + 1) % every:
        return None
    return Mixture.from_config(config, ExpertNames(), "moe_intermediate_size", renormalise=bool(config.get("norm_topk_prob", False)))


VARIANTS: dict[str, Variant] = {
    "llama": Variant(),
    "mistral": Variant(qkv_bias=False, window=_mistral_window),
    "mixtral": Variant(qkv_bias=False, window=_mistral_window, theta=1_000_000.0, mixture=_mixtral_experts),
    "qwen2": Variant(qkv_bias=True, window=_qwen_window),
    "qwen3": Variant(head_norms=True, window=_qwen_window),
    "qwen3_moe": Variant(head_norms=True, window=_qwen_moe_window, mixture=_qwen_experts),
}


class Llama:
    """Sizes and steps of one model; `config` is its `config.json`, `dtype` that of its weights, `prefix` what their names begin with."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        variant = VARIANTS[config["model_type"]]
        self.hidden = count(config, "hidden_size")
        self.vocabulary = count(config, "vocab_size")
        self.context = count(config, "max_position_embeddings", 2048, most=1 << 30)
        self.intermediate = count(config, "intermediate_size")
        layers = count(config, "num_hidden_layers", most=4096)
        self.heads = count(config, "num_attention_heads", most=65_536)
        self.kv_heads = count(config, "num_key_value_heads", self.heads, most=65_536)
        self.head_dim = count(config, "head_dim", max(self.hidden // self.heads, 1), most=65_536)
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json: num_attention_heads ({self.heads}) must be a multiple of num_key_value_heads ({self.kv_heads})")
        self.eps = positive(config, "rms_norm_eps", 1e-6)
        act = config.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise SpecializationError(f"config.json: hidden_act {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[act]
        self.rope = Rope.from_config(config, self.head_dim, variant.theta)
        self.dtype = dtype
        self.layers, self._prefix = layers, prefix
        self.embedding, self.norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self.head = head_name(prefix, bool(config.get("tie_word_embeddings", False)))
        windows = tuple(variant.window(config, layer) for layer in range(layers))
        by_length = self.rope.depends_on_length
        self.kv = KvShape(
            layers, self.kv_heads, self.head_dim, dtype, windows,
            shift=None if by_length else self.rope.shifted, depends_on_length=by_length,
        )  # fmt: skip
        bias = bool(config.get("attention_bias", False))
        self.routed = 0
        self.steps: Sequence[Step] = tuple(
            step
            for layer in range(layers)
            for step in (
                self._attention_step(layer, bias if variant.qkv_bias is None else variant.qkv_bias, bias, variant),
                self._mlp_step(layer, bool(config.get("mlp_bias", False)), variant.mixture(config, layer)),
            )
        )

    def angles(self, positions: Tensor, length: int) -> Angles:
        """Cosines and sines [T, 1, D/2]."""
        return self.rope.angles(positions, length, self.dtype)

    def begin(self, x: Tensor) -> Tensor:
        """Embeddings as they are."""
        return x

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm."""
        return rms_norm(x, norm, self.eps)

    def activation_nbytes(self, rows: int) -> int:
        """The larger of the two steps: norms in float32, q|k|v and its rotation, or gate|up and its product."""
        item = self.dtype.itemsize
        norm = self.hidden * (8 + 3 * item)
        attention = (3 * self.heads + 4 * self.kv_heads) * self.head_dim * item + 2 * self.heads * self.head_dim * 4
        return rows * (norm + max(attention, 4 * max(self.intermediate, self.routed) * item))

    def attention(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        """x + attention(norm(x))."""
        rows = x.shape[0]
        qkv = w.linear("qkv", rms_norm(x, w["norm"], self.eps))  # [T, (H + 2 K) D]
        qk, v = qkv.view(rows, -1, self.head_dim).split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if "q_norm" in w:
            qk = torch.cat((rms_norm(qk[:, : self.heads], w["q_norm"], self.eps), rms_norm(qk[:, self.heads :], w["k_norm"], self.eps)), 1)
        q, k = rotate(qk, *angles).split_with_sizes((self.heads, self.kv_heads), dim=1)  # [T, H, D], [T, K, D]
        o = yield Attend(layer, q, k, v, self.head_dim**-0.5)  # [T, H, D]
        return x + w.linear("o", o.reshape(rows, -1))

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + mlp(norm(x))."""
        yield from ()
        return x + gated_mlp(w, rms_norm(x, w["norm"], self.eps), self.act)

    def _attention_step(self, layer: int, qkv_bias: bool, o_bias: bool, variant: Variant) -> Step:
        at = f"{self._prefix}layers.{layer}"
        wide, stacked = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        params = {
            "norm": Need((self.hidden,), (f"{at}.input_layernorm.weight",)),
            "qkv": Need((stacked, self.hidden), tuple(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            "o": Need((self.hidden, wide), (f"{at}.self_attn.o_proj.weight",)),
        }
        if variant.head_norms:
            params |= {f"{name}_norm": Need((self.head_dim,), (f"{at}.self_attn.{name}_norm.weight",)) for name in "qk"}
        if qkv_bias:
            params["qkv_bias"] = Need((stacked,), tuple(f"{at}.self_attn.{name}_proj.bias" for name in "qkv"))
        if o_bias:
            params["o_bias"] = Need((self.hidden,), (f"{at}.self_attn.o_proj.bias",))
        return Step(layer, "attention", params, partial(self.attention, layer=layer), attends=layer)

    def _mlp_step(self, layer: int, bias: bool, mixture: Mixture | None) -> Step:
        at, wide = f"{self._prefix}layers.{layer}", self.intermediate
        if mixture is not None:
            self.routed = max(self.routed, mixture.top * mixture.intermediate)
            return mixture.step(layer, at, partial(rms_norm, eps=self.eps), self.act)
        params = {
            "norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
            "gate_up": Need((2 * wide, self.hidden), (f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")),
            "down": Need((self.hidden, wide), (f"{at}.mlp.down_proj.weight",)),
        }
        if bias:
            params["gate_up_bias"] = Need((2 * wide,), (f"{at}.mlp.gate_proj.bias", f"{at}.mlp.up_proj.bias"))
            params["down_bias"] = Need((self.hidden,), (f"{at}.mlp.down_proj.bias",))
        return Step(layer, "mlp", params, self.mlp)
