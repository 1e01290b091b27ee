"""What the generic tier does with memory: which parts of a model are kept, which accelerate reads anew for each pass.

Sizes come from the model's modules, built without memory, and are estimates where transformers decides by itself what it
allocates. No weight is read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..buffers import Ledger, size
from ..errors import MemoryBudgetError, ModelError
from ..placement import Place
from ..tensors import Checkpoint
from .kind import CLASSES, FAULTS, Kind, kind_of, read_config, refusal, told

SLACK = 64 << 20
"""For thread stacks and the allocator's leftovers."""
KV_SHARE, ACTIVATION_SHARE = 1 / 8, 1 / 4
"""Shares of what is free that keys and values, and one forward, have when the caller does not say how many tokens there will be."""
CHUNK_ROWS, STREAMED_CHUNK_ROWS = 512, 4096
"""Prompt rows of one forward; more where each forward reads weights."""
LEAST_CONTEXT = 64
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class GenericPlan:
    """Sizes in bytes. `placement` says of each module, or parameter, whether it is kept in memory (`host`) or read for each forward
    (`disk`)."""

    kind: Kind
    architecture: str
    dtype: str
    vocabulary: int
    memory: int
    ledger: dict[str, int]
    placement: dict[str, Place]
    weights_nbytes: int
    pinned_nbytes: int
    streamed_nbytes_per_pass: int
    kv_nbytes_per_token: int
    kv_tokens: int
    max_context_tokens: int
    chunk_rows: int | None
    """Prompt tokens of one forward; None when the model takes prompts whole."""
    rebuilt: bool
    """Whether transformers makes other tensors of the stored ones while it loads, as it does with most experts."""
    cache_mode: str = "transformers-dynamic"
    passes: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        """Whether any weight is read for each forward."""
        return self.streamed_nbytes_per_pass > 0

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """Modules or parameters that are kept, or read, together: one, or several that share a tensor. The lower `rank`, the sooner
    kept; below 0, always."""

    names: tuple[str, ...]
    nbytes: int
    rank: int


def make_plan(
    folder: Path, described: Mapping[str, Any], checkpoint: Checkpoint, memory: int, in_use: int, *, answers: int,
    context: int | None = None, kv_nbytes: int | None = None, dtype: torch.dtype | None = None,
) -> GenericPlan:  # fmt: skip
    """Divide `memory` bytes, of which the process already has `in_use`, for the model in `folder`. Blocking.

    `described` is its `config.json`. `answers` may be in the making at once, of at most `context` tokens each; keys and values have
    `kv_nbytes`. `dtype` None keeps the stored one. Raises `ModelError` for a model that transformers cannot build,
    `MemoryBudgetError` when its largest part does not fit.
    """
    kind = kind_of(described)
    if kind is None:
        raise ModelError(f"{folder}: {refusal(described)}; take a causal, image-text-to-text or seq2seq model")
    config = read_config(folder)
    dtype = dtype or stored_dtype(config, checkpoint)
    model = build(kind, config, dtype)
    text = config.get_text_config(decoder=True)
    parts = parts_of(model)
    total, largest = sum(part.nbytes for part in parts), max((part.nbytes for part in parts), default=0)
    ledger = Ledger(memory)
    ledger.lines["interpreter and libraries"] = in_use
    ledger.lines["slack"] = SLACK
    if ledger.free < largest:
        raise _too_small(ledger, "largest layer", largest)
    kv_token = kv_token_nbytes(text, dtype)
    kv_room = kv_nbytes or int(ledger.free * KV_SHARE)
    most = max(kv_room // kv_token, 1)
    limit = _number(text, "max_position_embeddings") or most
    whole = config.is_encoder_decoder or model._is_stateful
    room = int(max(ledger.free - largest, 0) * ACTIVATION_SHARE)
    tokens = min(limit, most) if context is None else context

    def forward(tokens: int, rows: int) -> int:
        return forward_nbytes(model, text, dtype, tokens if whole else min(rows, tokens), tokens)

    while context is None and tokens > LEAST_CONTEXT and forward(tokens, CHUNK_ROWS) > room:
        tokens //= 2
    kv_tokens = max(min(tokens * answers, most), tokens)
    ledger.lines["kv"] = kv_tokens * kv_token
    vocabulary = _vocabulary(model, text)
    draws = answers * vocabulary * (dtype.itemsize + 16)
    fits = total + forward(tokens, CHUNK_ROWS) + draws <= ledger.free
    chunk = CHUNK_ROWS if fits else STREAMED_CHUNK_ROWS
    while chunk > CHUNK_ROWS and forward(tokens, chunk) > room:
        chunk //= 2
    ledger.lines["activations"] = forward(tokens, chunk) + draws
    kept = parts
    if not fits:
        if largest > ledger.free:
            raise _too_small(ledger, "largest layer", largest)
        ledger.reserve("layer under way", largest)
        kept = keep(parts, ledger.free)
    pinned = sum(part.nbytes for part in kept)
    ledger.reserve("pinned weights", pinned)
    host = {name for part in kept for name in part.names}
    return GenericPlan(
        kind=kind, architecture=type(model).__name__, dtype=str(dtype).removeprefix("torch."), vocabulary=vocabulary,
        memory=memory, ledger=dict(ledger.lines),
        placement={name: "host" if name in host else "disk" for part in parts for name in part.names},
        weights_nbytes=total, pinned_nbytes=pinned, streamed_nbytes_per_pass=total - pinned,
        kv_nbytes_per_token=kv_token, kv_tokens=kv_tokens, max_context_tokens=tokens, chunk_rows=None if whole else chunk,
        rebuilt=len(checkpoint.tensors) > len(model.state_dict()),
    )  # fmt: skip


def build(kind: Kind, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """The model without memory, to be asked for its parts. Blocking; raises `ModelError`."""
    try:
        with torch.device("meta"):
            model = CLASSES[kind].from_config(config, dtype=dtype)
    except FAULTS as error:
        raise ModelError(f"transformers cannot build this model ({told(error)}); correct its config.json, or take another model") from error
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise ModelError(f"{type(model).__name__} cannot generate text; take a model with a language-model head")
    return model


def stored_dtype(config: PreTrainedConfig, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the configuration names, else that of the first tensor that is not of integers."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((STORED[entry.dtype] for entry in checkpoint.tensors.values() if entry.dtype in STORED), torch.float32)


def parts_of(model: Any) -> list[Part]:
    """What can be kept or left on disk by itself, in the order of the modules. Parts that share a tensor are one.

    Accelerate reads what a module holds when that module is called: so modules with parameters of their own are not divided, and what
    is used from outside, around its own module, has to be kept.
    """
    undivided, found = set(model._no_split_modules or ()), dict[str, int]()
    kept = set[str]()

    def walk(name: str, module: nn.Module) -> None:
        children, own = list(module.named_children()), [own for own, _ in module.named_parameters(recurse=False)]
        inner = list(module.modules())
        stacked = any(isinstance(each, nn.ModuleList) for each in inner)
        if name and (not children or type(module).__name__ in undivided or (own and not stacked)):
            found[name] = 0
            if any(isinstance(each, nn.MultiheadAttention) for each in inner):
                kept.add(name)
            return
        at = f"{name}." if name else ""
        direct = [f"{at}{tensor}" for tensor in (*own, *(buffer for buffer, _ in module.named_buffers(recurse=False)))]
        found.update(dict.fromkeys(direct, 0))
        kept.update(direct)
        for child, below in children:
            walk(f"{at}{child}", below)

    walk("", model)

    def home(tensor: str) -> str:
        while tensor and tensor not in found:
            tensor = tensor.rpartition(".")[0]
        return tensor

    tied = dict(model.all_tied_weights_keys)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in tied:
            found[home(name)] += tensor.numel() * tensor.element_size()
    group: dict[str, set[str]] = {name: {name} for name in found}
    for target, source in tied.items():
        together = group[home(target)] | group[home(source)]
        group |= dict.fromkeys(together, together)
    names_of = {id(module): name for name, module in model.named_modules()}
    often = tuple(f"{names_of.get(id(module), '-')}." for module in (model.get_decoder(), model.get_output_embeddings()))
    parts, order = [], {name: at for at, name in enumerate(found)}
    for name, together in group.items():
        members = tuple(sorted(together, key=order.__getitem__))
        if name == members[0]:
            rank = -1 if kept & together else 0 if len(members) > 1 else 1 if f"{name}.".startswith(often) else 2
            parts.append(Part(members, sum(found[member] for member in members), rank))
    return parts


def keep(parts: list[Part], free: int) -> list[Part]:
    """Of `parts`, what has to be kept, and what else `free` bytes hold: what a token needs twice, then what each token needs, then
    what only prompts need."""
    kept = []
    for part in sorted(parts, key=lambda part: part.rank):
        if part.rank < 0 or part.nbytes <= free:
            free -= part.nbytes
            kept.append(part)
    return kept


def kv_token_nbytes(text: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token, in all layers; no less for layers that keep a window or a state."""
    layers = _number(text, "num_decoder_layers", "decoder_layers", "num_hidden_layers") or 1
    attention = _number(text, "decoder_attention_heads", "num_attention_heads") or 1
    heads = _number(text, "num_key_value_heads") or attention
    wide = (_number(text, "hidden_size") or attention) // attention
    key = _number(text, "qk_head_dim", "global_head_dim", "head_dim", "d_kv") or wide
    return max(layers * heads * (key + (_number(text, "v_head_dim") or key)) * dtype.itemsize, 1)


def forward_nbytes(model: Any, text: PreTrainedConfig, dtype: torch.dtype, rows: int, context: int) -> int:
    """About what one forward of `rows` tokens with `context` tokens of history allocates: hidden states, a mask, logits, scores."""
    seq2seq = model.config.is_encoder_decoder
    hidden = _number(text, "hidden_size") or 1
    wide = _number(text, "intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim") or 4 * hidden
    experts = _number(text, "num_experts_per_tok", "top_k_experts") or 1
    scores = 2 * (_number(text, "num_attention_heads") or 1) if seq2seq or model.config._attn_implementation == "eager" else 1
    logits = 1 if seq2seq or model._supports_logits_to_keep() else rows
    return (
        rows * ((8 * hidden + 3 * wide * experts) * dtype.itemsize + 8 * hidden + 4 * context * scores)
        + logits * _vocabulary(model, text) * 8
    )


def _vocabulary(model: Any, text: PreTrainedConfig) -> int:
    head = model.get_output_embeddings()
    if isinstance(head, nn.Module) and isinstance(weight := getattr(head, "weight", None), torch.Tensor):
        return int(weight.shape[0])
    return _number(text, "vocab_size") or 1


def _number(config: PreTrainedConfig, *names: str) -> int | None:
    """The first of these that the configuration has; of one number a layer, the largest."""
    for name in names:
        value = getattr(config, name, None)  # families call the same thing by different names
        numbers = [number for number in (value if isinstance(value, list) else [value]) if type(number) is int and number > 0]
        if numbers:
            return max(numbers)
    return None


def _too_small(ledger: Ledger, name: str, nbytes: int) -> MemoryBudgetError:
    lines = {**ledger.lines, name: nbytes}
    return MemoryBudgetError(
        f"memory={size(ledger.limit)} is too small: this model needs at least {size(sum(lines.values()))}, of which "
        + ", ".join(f"{line} {size(n)}" for line, n in sorted(lines.items(), key=lambda line: -line[1])[:4])
        + "; raise memory, or lower max_context_tokens or max_concurrent_requests"
    )
