"""The families that run natively, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from .base import Family
from .llama import VARIANTS, Llama


class Build(Protocol):
    """Makes a family from `config.json` and the dtype of the weights."""

    def __call__(self, config: Mapping[str, Any], dtype: torch.dtype) -> Family: ...


FAMILIES: dict[str, Build] = {model_type: Llama for model_type in VARIANTS}
