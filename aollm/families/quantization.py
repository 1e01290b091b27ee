"""Quantization: how `config.json` says that weights are packed. It refuses to know which families read that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def quantization(config: Mapping[str, Any]) -> str | None:
    """How the weights are quantized, by the name that `config.json` has for it; None where they are not."""
    found = config.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "quantized") if isinstance(found, Mapping) else found)
