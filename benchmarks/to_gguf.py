"""Convert a llama checkpoint of safetensors to a bf16 GGUF file for llama.cpp.

    python benchmarks/to_gguf.py MODEL OUT.gguf

Matrices stay bf16, norms become f32, rows of q and k are permuted to llama.cpp's order of rotary pairs. The vocabulary is
made of numbered names, since a comparison feeds token ids. One tensor is in memory at a time. It runs no model.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    number, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{number}.{LAYER_NAMES[rest]}"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every bf16 tensor of a folder's safetensors files as a mapped uint16 array."""
    tensors: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(bytes(data[:8]), "little")
        for name, entry in json.loads(bytes(data[8:start])).items():
            if name != "__metadata__":
                if entry["dtype"] != "BF16":
                    raise ValueError(f"{name} is {entry['dtype']}; this converter takes BF16")
                begin, end = entry["data_offsets"]
                tensors[name] = data[start + begin : start + end].view(np.uint16).reshape(entry["shape"])
    return tensors


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows from split halves (x0 x1 .. y0 y1 ..) to pairs (x0 y0 x1 y1 ..) in each head."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def rope_factors(config: dict[str, Any]) -> np.ndarray:
    """What each rotary frequency is divided by under llama3 scaling, f32[head_dim / 2]."""
    rope, size = config["rope_scaling"], config["head_dim"]
    wavelength = 2 * math.pi * config["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / rope["factor"] + smooth), dtype=np.float32)


def add_settings(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<0x{n:02X}>" if n < 256 else f"token{n}" for n in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([TokenType.BYTE if n < 256 else TokenType.NORMAL for n in range(config["vocab_size"])])


def convert(folder: Path, out: Path) -> None:
    """Write `out` beside its final name, then rename it."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "llama":
        raise ValueError(f"this converter knows llama checkpoints; this one is {config['model_type']}")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    tensors = read_tensors(folder)
    partial = out.with_suffix(".partial")
    writer = GGUFWriter(partial, "llama")
    add_settings(writer, config)
    factors = rope_factors(config) if config.get("rope_scaling") else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor_info(gguf_name(name), tensor.shape, np.dtype(np.float32), 4 * tensor.size)
        else:
            writer.add_tensor_info(gguf_name(name), tensor.shape, np.dtype(np.float16), tensor.nbytes, GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, tensor in tensors.items():
        projection = name.split(".")[-2]
        if tensor.ndim == 1:
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        elif projection in heads:
            tensor = permuted(tensor, heads[projection])
        writer.write_tensor_data(tensor)
    writer.close()
    partial.rename(out)


def main() -> int:
    parser = argparse.ArgumentParser(description="convert a llama checkpoint to bf16 GGUF")
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} has no config.json")
    try:
        convert(arguments.model, arguments.out)
    except ValueError as error:
        print(f"to_gguf: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
