"""Tiny models with random weights, made on the fly: one of each family, and a T5, which no family of ours computes.

Their tokenizer is the bundled model's. They say what a family's passes cost besides its arithmetic, and nothing of its answers.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..demo import MODEL
from ..errors import ConfigError

T5 = "t5"
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False, "pad_token_id": None,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "norm_topk_prob": True},
    "gemma3_text": {"num_hidden_layers": 7, "sliding_window": 64, "query_pre_attn_scalar": 64, "tie_word_embeddings": True},
    "olmo2": {},
    "qwen3_next": {
        **EXPERTS, "num_experts": 8, "shared_expert_intermediate_size": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    },
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 256, "sliding_window": 64},
}  # fmt: skip
"""Sizes that a family has besides, or in the place of `SIZES`."""
T5_SIZES: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def make(kind: str, folder: Path) -> Path:
    """Write the tiny model of `kind`, a key of `OWN` or `T5`, into `folder`, which is made. Imports transformers; blocking.

    Raises `ConfigError` for another kind."""
    if kind not in (*OWN, T5):
        raise ConfigError(f"probe-tiny: one of {', '.join((*OWN, T5))}, not {kind!r}")
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.utils import logging

    classes: dict[bool, Any] = {True: AutoModelForSeq2SeqLM, False: AutoModelForCausalLM}
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / name, folder / name)
    vocabulary = Tokenizer.from_file(str(MODEL / "tokenizer.json")).get_vocab_size()
    sizes = T5_SIZES if kind == T5 else {**SIZES, **OWN[kind]}
    logging.disable_progress_bar()
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, bos_token_id=None, eos_token_id=None, **sizes)
    torch.manual_seed(0)
    model = classes[kind == T5].from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
