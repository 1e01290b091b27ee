"""Which class of transformers a model is built by: decided from `config.json` and transformers' own tables, never by trying.

Nothing that comes with a model is imported. This module refuses to know weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..compute import FOREIGN
from ..errors import ModelError

FAULTS = (*FOREIGN, OSError, ImportError, SafetensorError, StrictDataclassError)
"""What transformers raises on folders, settings and weights that it cannot cope with."""


class Kind(StrEnum):
    """What goes in and what comes out."""

    IMAGE_TEXT = "image-text-to-text"
    SEQ2SEQ = "seq2seq"
    CAUSAL = "causal"


CLASSES: dict[Kind, Any] = {
    Kind.IMAGE_TEXT: AutoModelForImageTextToText,
    Kind.SEQ2SEQ: AutoModelForSeq2SeqLM,
    Kind.CAUSAL: AutoModelForCausalLM,
}
NAMES: dict[Kind, Mapping[str, str]] = {
    Kind.IMAGE_TEXT: MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    Kind.SEQ2SEQ: MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    Kind.CAUSAL: MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


def kind_of(described: Mapping[str, Any]) -> Kind | None:
    """The kind of the model that `described`, its `config.json`, is of; None when transformers generates no text with it.

    Its first architecture decides. Where that is not a class that generates, encoder and decoder make a seq2seq model, and
    images go before text alone.
    """
    model_type = described.get("model_type")
    if not isinstance(model_type, str):
        return None
    possible = [kind for kind, names in NAMES.items() if model_type in names]
    architectures = described.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    named = [kind for kind in possible if NAMES[kind][model_type] == first]
    if named:
        return named[0]
    if described.get("is_encoder_decoder") is True and Kind.SEQ2SEQ in possible:
        return Kind.SEQ2SEQ
    return possible[0] if possible else None


def refusal(described: Mapping[str, Any]) -> str:
    """Why `kind_of` knows no kind for it."""
    name = described.get("model_type")
    if name is None:
        return "config.json names no model_type"
    return f"transformers has no model of type {name!r} that generates text"


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration as transformers reads it. Blocking; raises `ModelError`."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except FAULTS as error:
        raise ModelError(f"{folder}: transformers cannot read its config.json ({told(error)}); correct it, or download it again") from error
    return config


def told(error: BaseException) -> str:
    """The first sentence of a foreign error, in one line of reasonable length."""
    lines = " ".join(str(error).split())
    return (lines[:400] + "…" if len(lines) > 400 else lines) or type(error).__name__
