"""The tensors of each family: names and shapes, computed from a published config.json.

Tensors come in the order in which the published files were split into shards (the order of the model's modules). Nothing
here reads, writes or imports a model library: `published.json` has the rows, `make_checkpoint.py` writes the files.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Config = dict[str, Any]


class Tensor(NamedTuple):
    """One tensor of a checkpoint; `fill` is `normal`, `one`, `zero`, `scale` (MXFP4 exponents) or `blocks` (MXFP4 values)."""

    name: str
    shape: tuple[int, ...]
    fill: str = "normal"

    @property
    def quantized(self) -> bool:
        return self.fill in ("scale", "blocks")

    def nbytes(self, itemsize: int) -> int:
        return math.prod(self.shape) * (1 if self.quantized else itemsize)


@dataclass(frozen=True, slots=True)
class Shape:
    """A published model: its config.json, its tensors, and how its files were cut."""

    config: Config
    tensors: Callable[[Config], Iterator[Tensor]]
    shard_nbytes: int
    first_shard: int

    def sliced(self, layers: int | None) -> Config:
        """The config with only the first `layers` decoder layers (all of them for `None`); towers stay whole."""
        config = copy.deepcopy(self.config)
        text = config.get("text_config", config)
        if layers is None:
            return config
        if not 1 <= layers <= text["num_hidden_layers"]:
            raise ValueError(f"--layers is {layers}; this shape has 1 to {text['num_hidden_layers']}")
        text["num_hidden_layers"] = layers
        if "layer_types" in text:
            text["layer_types"] = text["layer_types"][:layers]
        return config


def linear(name: str, out: int, inner: int, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, inner))
    if bias:
        yield Tensor(f"{name}.bias", (out,))


def layer_norm(name: str, size: int) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (size,), "one")
    yield Tensor(f"{name}.bias", (size,), "zero")


def attention(name: str, text: Config, bias: bool = False, gated: bool = False) -> Iterator[Tensor]:
    hidden, size = text["hidden_size"], text["head_dim"]
    q, kv = text["num_attention_heads"] * size, text["num_key_value_heads"] * size
    yield from linear(f"{name}.q_proj", q * (2 if gated else 1), hidden, bias)
    yield from linear(f"{name}.k_proj", kv, hidden, bias)
    yield from linear(f"{name}.v_proj", kv, hidden, bias)
    yield from linear(f"{name}.o_proj", hidden, q, bias)


def swiglu(name: str, hidden: int, inner: int) -> Iterator[Tensor]:
    yield from linear(f"{name}.gate_proj", inner, hidden)
    yield from linear(f"{name}.up_proj", inner, hidden)
    yield from linear(f"{name}.down_proj", hidden, inner)


def llama(config: Config, prefix: str = "") -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield Tensor(f"{prefix}model.embed_tokens.weight", (config["vocab_size"], hidden))
    for n in range(config["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{n}"
        yield from attention(f"{layer}.self_attn", config)
        yield from swiglu(f"{layer}.mlp", hidden, config["intermediate_size"])
        yield Tensor(f"{layer}.input_layernorm.weight", (hidden,), "one")
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), "one")
    yield Tensor(f"{prefix}model.norm.weight", (hidden,), "one")
    if not config.get("tie_word_embeddings", False):
        yield Tensor(f"{prefix}lm_head.weight", (config["vocab_size"], hidden))


def gemma3_text(config: Config, prefix: str = "") -> Iterator[Tensor]:
    text = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208} | config
    hidden = text["hidden_size"]
    yield Tensor(f"{prefix}model.embed_tokens.weight", (text["vocab_size"], hidden))
    for n in range(text["num_hidden_layers"]):
        layer = f"{prefix}model.layers.{n}"
        yield from attention(f"{layer}.self_attn", text)
        for name in ("q_norm", "k_norm"):
            yield Tensor(f"{layer}.self_attn.{name}.weight", (text["head_dim"],), "zero")
        yield from swiglu(f"{layer}.mlp", hidden, text["intermediate_size"])
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            yield Tensor(f"{layer}.{name}_layernorm.weight", (hidden,), "zero")
    yield Tensor(f"{prefix}model.norm.weight", (hidden,), "zero")


def gemma3(config: Config) -> Iterator[Tensor]:
    vision = config["vision_config"]
    size, inner = vision["hidden_size"], vision["intermediate_size"]
    tower = "vision_tower.vision_model"
    yield Tensor(f"{tower}.embeddings.patch_embedding.weight", (size, 3, vision["patch_size"], vision["patch_size"]))
    yield Tensor(f"{tower}.embeddings.patch_embedding.bias", (size,))
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    yield Tensor(f"{tower}.embeddings.position_embedding.weight", (patches, size))
    for n in range(vision["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{n}"
        yield from layer_norm(f"{layer}.layer_norm1", size)
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", size, size, bias=True)
        yield from layer_norm(f"{layer}.layer_norm2", size)
        yield from linear(f"{layer}.mlp.fc1", inner, size, bias=True)
        yield from linear(f"{layer}.mlp.fc2", size, inner, bias=True)
    yield from layer_norm(f"{tower}.post_layernorm", size)
    hidden = config["text_config"]["hidden_size"]
    yield Tensor("multi_modal_projector.mm_input_projection_weight", (size, hidden))
    yield Tensor("multi_modal_projector.mm_soft_emb_norm.weight", (size,), "zero")
    yield from gemma3_text(config["text_config"], "language_model.")


def qwen3_next(config: Config) -> Iterator[Tensor]:
    hidden = config["hidden_size"]
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for n in range(config["num_hidden_layers"]):
        full = (n + 1) % config["full_attention_interval"] == 0
        yield from qwen3_next_layer(f"model.layers.{n}", config, full)
    yield Tensor("model.norm.weight", (hidden,), "zero")
    yield Tensor("lm_head.weight", (config["vocab_size"], hidden))
    yield Tensor("mtp.fc.weight", (hidden, 2 * hidden))
    yield from qwen3_next_layer("mtp.layers.0", config, full=True)
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        yield Tensor(f"mtp.{name}.weight", (hidden,), "zero")


def qwen3_next_layer(layer: str, config: Config, full: bool) -> Iterator[Tensor]:
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    if full:
        yield from attention(f"{layer}.self_attn", config, gated=True)
        for name in ("q_norm", "k_norm"):
            yield Tensor(f"{layer}.self_attn.{name}.weight", (config["head_dim"],), "zero")
    else:
        heads, size = config["linear_num_value_heads"], config["linear_value_head_dim"]
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        values, name = heads * size, f"{layer}.linear_attn"
        yield Tensor(f"{name}.dt_bias", (heads,), "one")
        yield Tensor(f"{name}.A_log", (heads,))
        yield Tensor(f"{name}.conv1d.weight", (2 * keys + values, 1, config["linear_conv_kernel_dim"]))
        yield from linear(f"{name}.in_proj_qkvz", 2 * keys + 2 * values, hidden)
        yield from linear(f"{name}.in_proj_ba", 2 * heads, hidden)
        yield Tensor(f"{name}.norm.weight", (size,), "one")
        yield from linear(f"{name}.out_proj", hidden, values)
    yield from linear(f"{layer}.mlp.gate", config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from swiglu(f"{layer}.mlp.experts.{expert}", hidden, inner)
    yield from swiglu(f"{layer}.mlp.shared_expert", hidden, config["shared_expert_intermediate_size"])
    yield from linear(f"{layer}.mlp.shared_expert_gate", 1, hidden)
    yield Tensor(f"{layer}.input_layernorm.weight", (hidden,), "zero")
    yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), "zero")


def gpt_oss(config: Config) -> Iterator[Tensor]:
    hidden, inner, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for n in range(config["num_hidden_layers"]):
        layer = f"model.layers.{n}"
        yield Tensor(f"{layer}.self_attn.sinks", (config["num_attention_heads"],))
        yield from attention(f"{layer}.self_attn", config, bias=True)
        yield from linear(f"{layer}.mlp.router", experts, hidden, bias=True)
        for name, out, size in (("gate_up_proj", 2 * inner, hidden), ("down_proj", hidden, inner)):
            yield Tensor(f"{layer}.mlp.experts.{name}_blocks", (experts, out, size // 32, 16), "blocks")
            yield Tensor(f"{layer}.mlp.experts.{name}_scales", (experts, out, size // 32), "scale")
            yield Tensor(f"{layer}.mlp.experts.{name}_bias", (experts, out))
        yield Tensor(f"{layer}.input_layernorm.weight", (hidden,), "one")
        yield Tensor(f"{layer}.post_attention_layernorm.weight", (hidden,), "one")
    yield Tensor("model.norm.weight", (hidden,), "one")
    yield Tensor("lm_head.weight", (config["vocab_size"], hidden))


def voxtral(config: Config) -> Iterator[Tensor]:
    audio, hidden = config["audio_config"], config["text_config"]["hidden_size"]
    size, inner = audio["hidden_size"], audio["intermediate_size"]
    for name, channels in (("conv1", audio["num_mel_bins"]), ("conv2", size)):
        yield Tensor(f"audio_tower.{name}.weight", (size, channels, 3))
        yield Tensor(f"audio_tower.{name}.bias", (size,))
    yield Tensor("audio_tower.embed_positions.weight", (audio["max_source_positions"], size))
    for n in range(audio["num_hidden_layers"]):
        layer = f"audio_tower.layers.{n}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", size, size, bias=name != "k_proj")
        yield from layer_norm(f"{layer}.self_attn_layer_norm", size)
        yield from linear(f"{layer}.fc1", inner, size, bias=True)
        yield from linear(f"{layer}.fc2", size, inner, bias=True)
        yield from layer_norm(f"{layer}.final_layer_norm", size)
    yield from layer_norm("audio_tower.layer_norm", size)
    yield from llama(config["text_config"], "language_model.")
    yield from linear("multi_modal_projector.linear_1", hidden, inner)
    yield from linear("multi_modal_projector.linear_2", hidden, hidden)


def merged(base: Config, row: Config) -> Config:
    """`base` with the settings of `row`, nested settings too."""
    both = {key: merged(base[key], value) for key, value in row.items() if isinstance(value, dict) and key in base}
    return base | row | both


def read_published(path: Path) -> dict[str, Shape]:
    """The rows of `published.json`: what a group shares, what each model says itself, layer kinds as one period."""
    families: list[Callable[[Config], Iterator[Tensor]]] = [llama, gemma3_text, gemma3, qwen3_next, gpt_oss, voxtral]
    by_name = {family.__name__: family for family in families}
    shapes = {}
    for group in json.loads(path.read_text()):
        for name, row in group["rows"].items():
            config = merged(group["config"], row)
            if "layer_types" in config:
                config["layer_types"] = list(itertools.islice(itertools.cycle(config["layer_types"]), config["num_hidden_layers"]))
            shapes[name] = Shape(config, by_name[group["family"]], group["shard_nbytes"], group["first_shard"])
    return shapes
