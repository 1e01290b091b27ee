"""Tiny random models, made by transformers, and what transformers says about them."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config, "mixtral": MixtralConfig,
    "qwen3_moe": Qwen3MoeConfig, "gemma3_text": Gemma3TextConfig, "qwen3_next": Qwen3NextConfig, "gpt_oss": GptOssConfig,
    "olmo2": Olmo2Config,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 16, "query_pre_attn_scalar": 20, "tie_word_embeddings": True},
    "qwen3_next": {
        "num_hidden_layers": 4, "head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "gpt_oss": {
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 64,
        "sliding_window": 16, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "original_max_position_embeddings": 256, "truncate": False,
        },
    },
}  # fmt: skip
"""Sizes that a kind has besides, or in the place of `SIZES`."""
COUNT = 6
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
"""The numbers that four bits stand for."""


def save(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **options: Any) -> Path:
    """A model of `kind` with random weights in `folder`; biases and norms are not left at zero and one."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **OWN.get(kind, {}), **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(float(parameter[0]), 0.2)  # about one, or about zero where one is added
            elif name.endswith("sinks"):
                parameter.normal_(0, 1)
            elif name.endswith("A_log"):
                parameter.uniform_(0.1, 8).log_()
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def pack(folder: Path) -> Path:
    """Turn the experts of a gpt_oss model in `folder` into MXFP4, as they are published."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = mxfp4(tensors.pop(name).transpose(1, 2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    edit(folder, lambda config: config.update(quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": kept}))
    return folder


def mxfp4(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [..., out, in/32, 16], the low nibble first, and scales [..., out, in/32] that are nearest to weights [..., out, in]."""
    groups = weights.float().unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().floor() + 1
    codes = (groups / torch.exp2(exponents)[..., None])[..., None].sub(FP4).abs().argmin(-1).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponents + 127).to(torch.uint8)


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Alter `config.json` in place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def prompt(length: int, seed: int = 0, vocabulary: int = 256) -> list[int]:
    """Token ids that are the same in every run."""
    return random.Random(seed).choices(range(vocabulary), k=length)


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, log-probabilities [T, vocabulary] of each position, and the largest logit's size."""

    ids: list[int]
    logprobs: torch.Tensor
    most: float


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def answer(model: PreTrainedModel, ids: Sequence[int], count: int = COUNT) -> Answer:
    """What transformers says, token by token with its own cache."""
    out = model(torch.tensor([list(ids)]), use_cache=True)
    found, rows = [], []
    while True:
        row = out.logits[0, -1].float()
        rows.append(row)
        found.append(int(row.argmax()))
        if len(found) == count:
            logits = torch.stack(rows)
            return Answer(found, logits.log_softmax(-1), float(logits.abs().max()))
        out = model(torch.tensor([[found[-1]]]), past_key_values=out.past_key_values, use_cache=True)


@torch.no_grad()
def replay(model: PreTrainedModel, ids: Sequence[int], found: Sequence[int]) -> Answer:
    """What transformers says at each position of an answer `found` to a prompt `ids`, all in one piece."""
    logits = model(torch.tensor([[*ids, *found[:-1]]]), use_cache=False).logits[0, len(ids) - 1 :].float()
    return Answer(logits.argmax(-1).tolist(), logits.log_softmax(-1), float(logits.abs().max()))


async def ours(runtime: Any, ids: Sequence[int], count: int = COUNT) -> Answer:
    """What a runtime says, through its public stream."""
    tokens = [token async for token in runtime.stream(list(ids), max_new_tokens=count, logprobs=1000)]
    rows = []
    for token in tokens:
        numbers, values = zip(*token.top_logprobs, strict=True)
        row = torch.full((len(values),), torch.nan)
        row[list(numbers)] = torch.tensor(values)
        rows.append(row)
    return Answer([token.id for token in tokens], torch.stack(rows), 0.0)
