"""The families that run natively, by `model_type`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .base import Family
from .llama import VARIANTS, Llama

FAMILIES: dict[str, Callable[[Mapping[str, Any], torch.dtype, str], Family]] = {model_type: Llama for model_type in VARIANTS}
