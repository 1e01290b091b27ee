"""The families that run natively, by `model_type`, and the towers of those that take images or sound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from .base import Family, Tower, section
from .gemma3 import Gemma3
from .gpt_oss import PACKED, GptOss
from .llama import VARIANTS, Llama
from .olmo2 import Olmo2
from .quantization import quantization
from .qwen3_next import Qwen3Next
from .siglip import Siglip
from .whisper import Whisper

Config = Mapping[str, Any]


def voxtral(config: Config, dtype: torch.dtype, prefix: str) -> Family:
    """Voxtral's language model: a llama, whatever it hears coming in among its rows."""
    return Llama(section(config, "text_config"), dtype, prefix)


def eye(config: Config, dtype: torch.dtype, names: Iterable[str], preparation: Config, newlines: Sequence[int]) -> Tower | None:
    """Gemma 3's, unless it is a model of text alone."""
    return Siglip(config, dtype, names, preparation, newlines) if config.get("vision_config") else None


def ear(config: Config, dtype: torch.dtype, names: Iterable[str], preparation: Config, newlines: Sequence[int]) -> Tower | None:
    """Voxtral's."""
    return Whisper(config, dtype, names, preparation)


FAMILIES: dict[str, Callable[[Config, torch.dtype, str], Family]] = {
    **dict.fromkeys(VARIANTS, Llama),
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
    "gpt_oss": GptOss,
    "olmo2": Olmo2,
    "qwen3_next": Qwen3Next,
    "voxtral": voxtral,
}
TOWERS: dict[str, Callable[[Config, torch.dtype, Iterable[str], Config, Sequence[int]], Tower | None]] = {"gemma3": eye, "voxtral": ear}
QUANTIZATIONS = {"gpt_oss": PACKED}
"""What a family reads as it is published, besides plain weights."""


def unread_quantization(config: Config) -> str | None:
    """How the weights are quantized, where the family that `config.json` names does not read that; None where it does."""
    method = quantization(config)
    return None if method == QUANTIZATIONS.get(str(config.get("model_type"))) else method
