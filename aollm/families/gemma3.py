"""The gemma3 family: four norms a layer, norms on queries and keys, and five layers with a sliding window to each that sees all.

Gemma 3 (Gemma Team, 2025). Layers with a window turn their positions by frequencies of their own. What it sees of images
comes from a tower (`siglip.py`) and stands among its rows; an image's rows see each other in both directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SpecializationError
from ..maths.layers import ACTIVATIONS, rms_norm_about_one
from ..maths.rope import Rope, rotate
from .base import Angles, Attend, KvShape, Need, Params, Step, Work, count, gated_mlp, head_name, layer_kinds, positive, section

SLIDING, FULL = "sliding_attention", "full_attention"


class Gemma3:
    """Sizes and steps of one model; `config` is its `config.json`, `dtype` that of its weights, `prefix` what their names begin with."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        own = section(config, "text_config") if "text_config" in config else config
        self.hidden = count(own, "hidden_size", 2304)
        self.vocabulary = count(own, "vocab_size", 262_208)
        self.context = count(own, "max_position_embeddings", 131_072, most=1 << 30)
        self.intermediate = count(own, "intermediate_size", 9216)
        self.layers = count(own, "num_hidden_layers", 26, most=4096)
        self.heads = count(own, "num_attention_heads", 8, most=65_536)
        self.kv_heads = count(own, "num_key_value_heads", 4, most=65_536)
        self.head_dim = count(own, "head_dim", 256, most=65_536)
        if self.heads % self.kv_heads:
            raise ModelError(f"config.json: num_attention_heads ({self.heads}) must be a multiple of num_key_value_heads ({self.kv_heads})")
        self.eps = positive(own, "rms_norm_eps", 1e-6)
        self.scale = positive(own, "query_pre_attn_scalar", 256) ** -0.5
        act = own.get("hidden_activation") or "gelu_pytorch_tanh"
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise SpecializationError(f"config.json: hidden_activation {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        for key in ("attention_bias", "use_bidirectional_attention", "attn_logit_softcapping", "final_logit_softcapping"):
            if own.get(key):
                raise SpecializationError(f"config.json: {key} {own[key]!r} is not computed here")
        self.act = ACTIVATIONS[act]
        self.dtype = dtype
        every = count(own, "sliding_window_pattern", 6, most=4096)
        self.kinds = layer_kinds(own, self.layers, (SLIDING, FULL)) or tuple(
            SLIDING if (layer + 1) % every else FULL for layer in range(self.layers)
        )
        self.ropes = {kind: _rope(own, kind, self.head_dim) for kind in (FULL, SLIDING)}
        self.embedding, self.norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self.head = head_name(prefix, bool(config.get("tie_word_embeddings", own.get("tie_word_embeddings", True))))
        window = count(own, "sliding_window", 4096, most=1 << 30)
        self.kv = KvShape(
            self.layers, self.kv_heads, self.head_dim, dtype, tuple(window if kind == SLIDING else None for kind in self.kinds),
            depends_on_length=any(rope.depends_on_length for rope in self.ropes.values()),
        )  # fmt: skip
        self.steps: Sequence[Step] = tuple(
            step
            for layer in range(self.layers)
            for step in (self._attention_step(layer, f"{prefix}layers.{layer}"), self._mlp_step(layer, f"{prefix}layers.{layer}"))
        )

    def begin(self, x: Tensor) -> Tensor:
        """Scaled by the root of their length, which is rounded to their dtype first."""
        return x * torch.tensor(self.hidden**0.5, dtype=x.dtype)

    def angles(self, positions: Tensor, length: int) -> Angles:
        """Cosines and sines [T, 1, D/2] of the layers that see all, then of those with a window."""
        return tuple(part for rope in self.ropes.values() for part in rope.angles(positions, length, self.dtype))

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm."""
        return rms_norm_about_one(x, norm, self.eps)

    def activation_nbytes(self, rows: int) -> int:
        """The larger of the two steps: norms in float32, q|k|v and its norms and rotation, or gate|up and its product."""
        item = self.dtype.itemsize
        norm = self.hidden * (12 + 4 * item)
        attention = (4 * self.heads + 5 * self.kv_heads) * self.head_dim * item + 4 * self.heads * self.head_dim * 4
        return rows * (norm + max(attention, 4 * self.intermediate * item))

    def attention(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        """x + norm(attention(norm(x)))."""
        rows, norm = x.shape[0], partial(rms_norm_about_one, eps=self.eps)
        turn = angles[:2] if self.kinds[layer] == FULL else angles[2:]
        qkv = w.linear("qkv", norm(x, w["norm"])).view(rows, -1, self.head_dim)  # [T, H + 2 K, D]
        q, k, v = qkv.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = rotate(norm(q, w["q_norm"]), *turn), rotate(norm(k, w["k_norm"]), *turn)
        o = yield Attend(layer, q, k, v, self.scale)  # [T, H, D]
        return x + norm(w.linear("o", o.reshape(rows, -1)), w["post_norm"])

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + norm(mlp(norm(x)))."""
        yield from ()
        h = gated_mlp(w, rms_norm_about_one(x, w["norm"], self.eps), self.act)
        return x + rms_norm_about_one(h, w["post_norm"], self.eps)

    def _attention_step(self, layer: int, at: str) -> Step:
        wide, stacked = self.heads * self.head_dim, (self.heads + 2 * self.kv_heads) * self.head_dim
        params = {
            "norm": Need((self.hidden,), (f"{at}.input_layernorm.weight",)),
            "post_norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
            "qkv": Need((stacked, self.hidden), tuple(f"{at}.self_attn.{name}_proj.weight" for name in "qkv")),
            "o": Need((self.hidden, wide), (f"{at}.self_attn.o_proj.weight",)),
            **{f"{name}_norm": Need((self.head_dim,), (f"{at}.self_attn.{name}_norm.weight",)) for name in "qk"},
        }
        return Step(layer, "attention", params, partial(self.attention, layer=layer), attends=layer)

    def _mlp_step(self, layer: int, at: str) -> Step:
        params = {
            "norm": Need((self.hidden,), (f"{at}.pre_feedforward_layernorm.weight",)),
            "post_norm": Need((self.hidden,), (f"{at}.post_feedforward_layernorm.weight",)),
            "gate_up": Need((2 * self.intermediate, self.hidden), (f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")),
            "down": Need((self.hidden, self.intermediate), (f"{at}.mlp.down_proj.weight",)),
        }
        return Step(layer, "mlp", params, self.mlp)


def _rope(config: Mapping[str, Any], kind: str, head_dim: int) -> Rope:
    """A kind of layer's frequencies: `rope_parameters` has one entry for each, older configs name the two bases."""
    given = config.get("rope_parameters")
    context = config.get("max_position_embeddings", 131_072)
    if isinstance(given, Mapping) and isinstance(given.get(kind), Mapping):
        return Rope.from_config({"rope_parameters": given[kind], "max_position_embeddings": context}, head_dim)
    if kind == SLIDING:
        return Rope.from_config({"rope_theta": positive(config, "rope_local_base_freq", 1e4)}, head_dim)
    full = {key: config[key] for key in ("rope_scaling", "rope_theta") if config.get(key) is not None}
    return Rope.from_config({"max_position_embeddings": context, **full}, head_dim, 1e6)
