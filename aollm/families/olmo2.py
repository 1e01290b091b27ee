"""The olmo2 family: norms after attention and MLP in the place of those before, and norms over all queries and all keys.

OLMo 2 (Team OLMo, 2025). A norm on queries or keys takes all heads of a row together, before they are told apart. Positions
turn them in float32, whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SpecializationError
from ..maths.layers import ACTIVATIONS, rms_norm_in_float
from ..maths.rope import Rope, rotate
from .base import Angles, Attend, KvShape, Need, Params, Step, Work, count, gated_mlp, head_name, positive


class Olmo2:
    """Sizes and steps of one model; `config` is its `config.json`, `dtype` that of its weights, `prefix` what their names begin with."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        self.hidden = count(config, "hidden_size", 4096)
        self.vocabulary = count(config, "vocab_size", 50_304)
        self.context = count(config, "max_position_embeddings", 2048, most=1 << 30)
        self.intermediate = count(config, "intermediate_size", 11_008)
        self.layers = count(config, "num_hidden_layers", 32, most=4096)
        self.heads = count(config, "num_attention_heads", 32, most=65_536)
        self.kv_heads = count(config, "num_key_value_heads", self.heads, most=65_536)
        self.head_dim = count(config, "head_dim", max(self.hidden // self.heads, 1), most=65_536)
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json: num_attention_heads ({self.heads}) must be a multiple of num_key_value_heads ({self.kv_heads})")
        act = config.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise SpecializationError(f"config.json: hidden_act {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        self.act, self.dtype = ACTIVATIONS[act], dtype
        self.rms_norm = partial(rms_norm_in_float, eps=positive(config, "rms_norm_eps", 1e-5))
        self.rope = Rope.from_config(config, self.head_dim)
        self.embedding, self.norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self.head = head_name(prefix, bool(config.get("tie_word_embeddings", False)))
        by_length = self.rope.depends_on_length
        self.kv = KvShape(
            self.layers, self.kv_heads, self.head_dim, dtype,
            shift=None if by_length else self.rope.shifted, depends_on_length=by_length,
        )  # fmt: skip
        bias = bool(config.get("attention_bias", False))
        self.steps: Sequence[Step] = tuple(
            step
            for layer in range(self.layers)
            for step in (self._attention_step(layer, f"{prefix}layers.{layer}", bias), self._mlp_step(layer, f"{prefix}layers.{layer}"))
        )

    def begin(self, x: Tensor) -> Tensor:
        """Embeddings as they are."""
        return x

    def angles(self, positions: Tensor, length: int) -> Angles:
        """Cosines and sines [T, 1, D/2] in float32."""
        return self.rope.angles(positions, length, torch.float32)

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm."""
        return self.rms_norm(x, norm)

    def activation_nbytes(self, rows: int) -> int:
        """The larger of the two steps: q|k|v, its norms and its rotation in float32, or gate|up and its product; and the norm after it."""
        item = self.dtype.itemsize
        norm = self.hidden * (8 + 4 * item)
        attention = (4 * self.heads + 4 * self.kv_heads) * self.head_dim * item + 4 * self.heads * self.head_dim * 4
        return rows * (norm + max(attention, 4 * self.intermediate * item))

    def attention(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        """x + norm(attention(x))."""
        sizes = [heads * self.head_dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = w.linear("qkv", x).split_with_sizes(sizes, dim=-1)  # [T, H D], [T, K D], [T, K D]
        q, k = self.rms_norm(q, w["q_norm"]), self.rms_norm(k, w["k_norm"])
        q, k, v = (part.view(x.shape[0], -1, self.head_dim) for part in (q, k, v))  # [T, H, D], [T, K, D], [T, K, D]
        q, k = rotate(q, *angles).to(q.dtype), rotate(k, *angles).to(k.dtype)
        o = yield Attend(layer, q, k, v, self.head_dim**-0.5)  # [T, H, D]
        return x + self.rms_norm(w.linear("o", o.flatten(1)), w["norm"])

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + norm(mlp(x))."""
        yield from ()
        return x + self.rms_norm(gated_mlp(w, x, self.act), w["norm"])

    def _attention_step(self, layer: int, at: str, bias: bool) -> Step:
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        params = {
            "qkv": Need((wide + 2 * narrow, self.hidden), tuple(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            "q_norm": Need((wide,), (f"{at}.self_attn.q_norm.weight",)),
            "k_norm": Need((narrow,), (f"{at}.self_attn.k_norm.weight",)),
            "o": Need((self.hidden, wide), (f"{at}.self_attn.o_proj.weight",)),
            "norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
        }
        if bias:
            params["qkv_bias"] = Need((wide + 2 * narrow,), tuple(f"{at}.self_attn.{name}_proj.bias" for name in "qkv"))
            params["o_bias"] = Need((self.hidden,), (f"{at}.self_attn.o_proj.bias",))
        return Step(layer, "attention", params, partial(self.attention, layer=layer), attends=layer)

    def _mlp_step(self, layer: int, at: str) -> Step:
        params = {
            "gate_up": Need((2 * self.intermediate, self.hidden), (f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")),
            "down": Need((self.hidden, self.intermediate), (f"{at}.mlp.down_proj.weight",)),
            "norm": Need((self.hidden,), (f"{at}.post_feedforward_layernorm.weight",)),
        }
        return Step(layer, "mlp", params, self.mlp)
