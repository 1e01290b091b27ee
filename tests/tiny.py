"""Tiny random models, made by transformers, and what transformers says about them."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.15, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
COUNT = 6


def save(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "1GB", **options: Any) -> Path:
    """A model of `kind` with random weights in `folder`; biases and norms are not left at zero and one."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**SIZES, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


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
