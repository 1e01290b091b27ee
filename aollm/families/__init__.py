"""The families that run natively, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .base import Family, Tower
from .gemma3 import Gemma3
from .gpt_oss import GptOss
from .llama import VARIANTS, Llama
from .qwen3_next import Qwen3Next

FAMILIES: dict[str, Callable[[Mapping[str, Any], torch.dtype, str], Family]] = {
    **dict.fromkeys(VARIANTS, Llama),
    "gemma3": Gemma3,
    "gemma3_text": Gemma3,
    "gpt_oss": GptOss,
    "qwen3_next": Qwen3Next,
}

TOWERS: dict[str, Callable[[Mapping[str, Any], torch.dtype, Iterable[str], Mapping[str, Any]], Tower]] = {}
