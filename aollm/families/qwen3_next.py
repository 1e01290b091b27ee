"""The qwen3-next family: three layers of gated DeltaNet to each of gated attention, and a mixture of experts in all of them.

Qwen3-Next (Qwen Team, 2025); gated delta networks (Yang et al., 2024). A DeltaNet layer carries two states from token to
token, what its convolution saw last and its recurrent memory, and has no keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ModelError, SpecializationError
from ..maths.delta import causal_conv, gated_delta
from ..maths.layers import ACTIVATIONS, rms_norm, rms_norm_about_one
from ..maths.rope import Rope, rotate
from .base import Angles, Attend, KvShape, Need, Params, Recall, Step, Work, count, gated_mlp, head_name, layer_kinds, positive
from .mixture import ExpertNames, Mixture

LINEAR, FULL = "linear_attention", "full_attention"


class Qwen3Next:
    """Sizes and steps of one model; `config` is its `config.json`, `dtype` that of its weights, `prefix` what their names begin with."""

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype, prefix: str = "model.") -> None:
        self.hidden = count(config, "hidden_size", 2048)
        self.vocabulary = count(config, "vocab_size", 151_936)
        self.context = count(config, "max_position_embeddings", 32_768, most=1 << 30)
        self.intermediate = count(config, "intermediate_size", 5632)
        self.layers = count(config, "num_hidden_layers", 48, most=4096)
        self.heads = count(config, "num_attention_heads", 16, most=65_536)
        self.kv_heads = count(config, "num_key_value_heads", 2, most=65_536)
        self.head_dim = count(config, "head_dim", 256, most=65_536)
        self.kernel = count(config, "linear_conv_kernel_dim", 4, most=1024)
        self.key_heads, self.key_dim = count(config, "linear_num_key_heads", 16), count(config, "linear_key_head_dim", 128)
        self.value_heads, self.value_dim = count(config, "linear_num_value_heads", 32), count(config, "linear_value_head_dim", 128)
        for many, few in (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads")):
            if count(config, many, 32) % count(config, few, 2):
                raise ModelError(f"config.json: {many} ({config[many]}) must be a multiple of {few} ({config[few]})")
        self.eps = positive(config, "rms_norm_eps", 1e-6)
        act = config.get("hidden_act", "silu")
        if not isinstance(act, str) or act not in ACTIVATIONS:
            raise SpecializationError(f"config.json: hidden_act {act!r} is not known; known are {', '.join(ACTIVATIONS)}")
        self.act = ACTIVATIONS[act]
        self.rope = Rope.from_config({"partial_rotary_factor": 0.25, **config}, self.head_dim)
        self.dtype = dtype
        self.embedding, self.norm = f"{prefix}embed_tokens.weight", f"{prefix}norm.weight"
        self.head = head_name(prefix, bool(config.get("tie_word_embeddings", False)))
        every = count(config, "full_attention_interval", 4, most=4096)
        kinds = layer_kinds(config, self.layers, (LINEAR, FULL)) or tuple(
            LINEAR if (layer + 1) % every else FULL for layer in range(self.layers)
        )
        self.keys, self.values = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        carried = ((2 * self.keys + self.values, self.kernel - 1), (self.value_heads, self.key_dim, self.value_dim))
        self.kv = KvShape(
            kinds.count(FULL), self.kv_heads, self.head_dim, dtype,
            states=carried * kinds.count(LINEAR), depends_on_length=self.rope.depends_on_length,
        )  # fmt: skip
        self.routed = 0
        self.steps: Sequence[Step] = tuple(
            step
            for layer, kind in enumerate(kinds)
            for step in (
                self._attention_step(layer, f"{prefix}layers.{layer}", kinds[:layer].count(FULL), bool(config.get("attention_bias")))
                if kind == FULL
                else self._delta_step(layer, f"{prefix}layers.{layer}", 2 * kinds[:layer].count(LINEAR)),
                self._mlp_step(layer, f"{prefix}layers.{layer}", config),
            )
        )

    def begin(self, x: Tensor) -> Tensor:
        """Embeddings as they are."""
        return x

    def angles(self, positions: Tensor, length: int) -> Angles:
        """Cosines and sines [T, 1, D/8]: a quarter of a head turns."""
        return self.rope.angles(positions, length, self.dtype)

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm."""
        return rms_norm_about_one(x, norm, self.eps)

    def activation_nbytes(self, rows: int) -> int:
        """The largest step: attention with its gates, a DeltaNet's projections in float32 and its chunks, or the experts' products."""
        item = self.dtype.itemsize
        attention = (6 * self.heads + 4 * self.kv_heads) * self.head_dim * (item + 4)
        delta = (2 * self.keys + 2 * self.values) * 3 * item + (4 * self.keys + 6 * self.values) * 4 * self.value_heads // self.key_heads
        mlp = 4 * max(self.intermediate if not self.routed else 0, self.routed) * item
        return rows * (self.hidden * (12 + 3 * item) + max(attention, delta + 6 * 64 * 4 * self.value_heads, mlp))

    def attention(self, w: Params, x: Tensor, angles: Angles, layer: int) -> Work:
        """x + attention(norm(x)), each head's result gated."""
        rows, norm = x.shape[0], partial(rms_norm_about_one, eps=self.eps)
        wide = self.heads * self.head_dim
        both, k, v = w.linear("qkv", norm(x, w["norm"])).split_with_sizes((2 * wide, *[self.kv_heads * self.head_dim] * 2), dim=-1)
        q, gate = both.view(rows, self.heads, 2 * self.head_dim).chunk(2, dim=-1)  # [T, H, D]
        q = rotate(norm(q, w["q_norm"]), *angles)
        k = rotate(norm(k.view(rows, self.kv_heads, self.head_dim), w["k_norm"]), *angles)
        o = yield Attend(layer, q, k, v.view(rows, self.kv_heads, self.head_dim), self.head_dim**-0.5)  # [T, H, D]
        return x + w.linear("o", (o * torch.sigmoid(gate)).reshape(rows, -1))

    def delta(self, w: Params, x: Tensor, angles: Angles, state: int) -> Work:
        """x + delta(norm(x)); q, k, v and z of a key head's group stand side by side in the projection."""
        rows, each = x.shape[0], self.value_heads // self.key_heads
        h = rms_norm_about_one(x, w["norm"], self.eps)
        q, k, v, z = (
            w.linear("qkvz", h)
            .view(rows, self.key_heads, -1)
            .split_with_sizes((self.key_dim, self.key_dim, each * self.value_dim, each * self.value_dim), -1)
        )
        b, a = (part.reshape(rows, -1) for part in w.linear("ba", h).view(rows, self.key_heads, -1).chunk(2, dim=-1))  # [T, Hv]
        mixed = torch.cat([part.reshape(rows, -1) for part in (q, k, v)], dim=-1)
        conv = w["conv"][:, 0]
        mixed = yield Recall(state, (mixed,), lambda part, carried: causal_conv(part[0], conv, carried))
        q, k, v = mixed.split_with_sizes((self.keys, self.keys, self.values), dim=-1)
        decay = -w["A_log"].exp() * functional.softplus(a.float() + w["dt_bias"])
        o = yield Recall(
            state + 1,
            (
                q.view(rows, self.key_heads, -1), k.view(rows, self.key_heads, -1), v.view(rows, self.value_heads, -1),
                decay, b.sigmoid(),
            ),
            lambda parts, carried: gated_delta(parts[0], parts[1], parts[2], parts[3], parts[4], carried),
        )  # fmt: skip
        o = rms_norm(o, w["gated_norm"], self.eps) * functional.silu(z.reshape(rows, self.value_heads, -1).float())
        return x + w.linear("o", o.to(x.dtype).reshape(rows, -1))

    def mlp(self, w: Params, x: Tensor, angles: Angles) -> Work:
        """x + mlp(norm(x)), in layers without experts."""
        yield from ()
        return x + gated_mlp(w, rms_norm_about_one(x, w["norm"], self.eps), self.act)

    def _attention_step(self, layer: int, at: str, kv_layer: int, bias: bool) -> Step:
        wide, own = self.heads * self.head_dim, f"{at}.self_attn"
        stacked = 2 * wide + 2 * self.kv_heads * self.head_dim
        params = {
            "norm": Need((self.hidden,), (f"{at}.input_layernorm.weight",)),
            "qkv": Need((stacked, self.hidden), tuple(f"{own}.{name}_proj.weight" for name in "qkv")),
            "o": Need((self.hidden, wide), (f"{own}.o_proj.weight",)),
            **{f"{name}_norm": Need((self.head_dim,), (f"{own}.{name}_norm.weight",)) for name in "qk"},
        }
        if bias:
            params["qkv_bias"] = Need((stacked,), tuple(f"{own}.{name}_proj.bias" for name in "qkv"))
            params["o_bias"] = Need((self.hidden,), (f"{own}.o_proj.bias",))
        return Step(layer, "attention", params, partial(self.attention, layer=kv_layer), attends=kv_layer)

    def _delta_step(self, layer: int, at: str, state: int) -> Step:
        own, flat = f"{at}.linear_attn", 2 * self.keys + self.values
        params = {
            "norm": Need((self.hidden,), (f"{at}.input_layernorm.weight",)),
            "qkvz": Need((flat + self.values, self.hidden), (f"{own}.in_proj_qkvz.weight",)),
            "ba": Need((2 * self.value_heads, self.hidden), (f"{own}.in_proj_ba.weight",)),
            "conv": Need((flat, 1, self.kernel), (f"{own}.conv1d.weight",), self.dtype),
            "A_log": Need((self.value_heads,), (f"{own}.A_log",), torch.float32),
            "dt_bias": Need((self.value_heads,), (f"{own}.dt_bias",), torch.float32),
            "gated_norm": Need((self.value_dim,), (f"{own}.norm.weight",)),
            "o": Need((self.hidden, self.values), (f"{own}.out_proj.weight",)),
        }
        return Step(layer, "delta", params, partial(self.delta, state=state))

    def _mlp_step(self, layer: int, at: str, config: Mapping[str, Any]) -> Step:
        norm = partial(rms_norm_about_one, eps=self.eps)
        if layer not in (config.get("mlp_only_layers") or []) and (layer + 1) % count(config, "decoder_sparse_step", 1, most=4096) == 0:
            mixture = Mixture.from_config(
                config, ExpertNames(), "moe_intermediate_size", renormalise=bool(config.get("norm_topk_prob", True)),
                shared=count(config, "shared_expert_intermediate_size", 512),
            )  # fmt: skip
            self.routed = max(mixture.intermediate * mixture.top, mixture.shared)
            return mixture.step(layer, at, norm, self.act)
        params = {
            "norm": Need((self.hidden,), (f"{at}.post_attention_layernorm.weight",)),
            "gate_up": Need((2 * self.intermediate, self.hidden), (f"{at}.mlp.gate_proj.weight", f"{at}.mlp.up_proj.weight")),
            "down": Need((self.hidden, self.intermediate), (f"{at}.mlp.down_proj.weight",)),
        }
        return Step(layer, "mlp", params, self.mlp)
