"""Lora: what an `adapter_config.json` says, as far as results depend on it.

Names, patterns and scales mean what they mean in PEFT. A setting that changes results and is not among these is refused, and
so is one that is not known: an adapter that is applied by half is worse than none. It refuses to know the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any, Self

import regex
from regex import Match, Pattern

MATCH_S = 0.1
"""How long one pattern may take on one name: patterns come from strangers, and some take for ever."""
MAX_PATTERNS, MAX_PATTERN, MAX_RANK = 8192, 2048, 4096

READ = frozenset((
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "bias", "init_lora_weights", "base_model_name_or_path",
))  # fmt: skip
WITHOUT_EFFECT = frozenset((
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
))  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the base's weights alone."""
REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales the rows of the merged weights, and here nothing is merged",
    "modules_to_save": "it holds whole modules of its own, which would have to take the place of the base's; train it without them",
    "lora_bias": "biases of adapters are not supported; train it with lora_bias=False",
    "target_parameters": "it changes parameters of fused experts, which are not supported; train it on target_modules",
    "fan_in_fan_out": "it is for weights that are stored transposed, and this base's are not",
    "trainable_token_indices": "it changes rows of the embedding table, which are not supported",
    "layer_replication": "it runs layers of the base more than once, which is not supported",
    "alora_invocation_tokens": "it begins to work in the middle of a prompt, which is not supported",
}


@dataclass(frozen=True, slots=True)
class Lora:
    """Ranks, scales and targets of one adapter; `base` is what it says it was trained on."""

    rank: int
    alpha: float
    rslora: bool
    ranks: Sequence[tuple[Pattern[str], int]]
    alphas: Sequence[tuple[Pattern[str], float]]
    targets: Pattern[str] | tuple[str, ...] | None
    """None: every linear module."""
    excluded: Pattern[str] | tuple[str, ...]
    layers: frozenset[int]
    """The only layers it is for; empty for all."""
    layer_patterns: Sequence[Pattern[str]]
    base: str

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> Self:
        """Read a config; `ValueError` says what is wrong with it, or why it is refused."""
        _refuse(config)
        layers, names = config.get("layers_to_transform"), config.get("layers_pattern") or []
        targets = config.get("target_modules")
        if not isinstance(targets, str | list) or not targets:
            raise ValueError(f"target_modules must name modules or be a pattern, found {short(targets)}")
        layers = [layers] if _whole(layers) else layers or []
        if not isinstance(layers, list) or not all(_whole(layer) for layer in layers):
            raise ValueError(f"layers_to_transform must be whole numbers, found {short(layers)}")
        return cls(
            _rank("r", config.get("r", 8)),
            _number("lora_alpha", config.get("lora_alpha", 8)),
            _truth(config, "use_rslora"),
            [(pattern, _rank("rank_pattern", value)) for pattern, value in _patterns(config, "rank_pattern")],
            [(pattern, _number("alpha_pattern", value)) for pattern, value in _patterns(config, "alpha_pattern")],
            None if isinstance(targets, str) and targets.lower() == "all-linear" else _names("target_modules", targets),
            _names("exclude_modules", config.get("exclude_modules") or []),
            frozenset(layers),
            [
                _compiled("layers_pattern", rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\.")
                for name in _strings("layers_pattern", [names] if isinstance(names, str) else names)
            ]
            or [regex.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")],
            str(config.get("base_model_name_or_path") or "a model that it does not name")[:200],
        )

    def rank_of(self, module: str) -> int:
        """The rank at `module`: that of the first pattern which fits the end of its name, else the common one."""
        return next((rank for pattern, rank in self.ranks if _found(pattern, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / rank, or alpha / √rank for rank-stabilised LoRA (Kalajdzievski, 2023)."""
        alpha = next((alpha for pattern, alpha in self.alphas if _found(pattern, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def takes(self, module: str) -> bool:
        """Whether the config says that `module` is adapted."""
        if _named(self.excluded, module):
            return False
        if self.targets is None:
            return True
        if not _named(self.targets, module):
            return False
        if not self.layers or not isinstance(self.targets, tuple) or module in self.targets:
            return True
        found = next((match for pattern in self.layer_patterns if (match := _found(pattern, module)) is not None), None)
        return found is not None and int(found["layer"]) in self.layers


def _refuse(config: Mapping[str, Any]) -> None:
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"peft_type is {short(kind)}; only LORA is supported")
    if (bias := config.get("bias", "none")) != "none":
        raise ValueError(f"bias is {short(bias)}: it changes the base's biases, which is not supported; train it with bias='none'")
    init = config.get("init_lora_weights")
    if not any(init is known or (isinstance(init, str) and init == known) for known in INITS):
        raise ValueError(
            f"init_lora_weights is {short(init)}, which changes the base's weights; "
            "save it again with path_initial_model_for_weight_conversion"
        )
    for key, reason in REFUSED.items():
        if config.get(key):
            raise ValueError(f"{key} is set: {reason}")
    if odd := [key for key in config if config[key] and key not in READ | WITHOUT_EFFECT]:
        raise ValueError(f"{short(odd[0])} is set, which is not known here and may change its results; train it without")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rank(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= MAX_RANK:
        raise ValueError(f"{key} must be a whole number from 1 to {MAX_RANK}, found {short(value)}")
    return value


def _number(key: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e9:
        raise ValueError(f"{key} must be a number, found {short(value)}")
    return float(value)


def _truth(config: Mapping[str, Any], key: str) -> bool:
    if (value := config.get(key) or False) is not True and value is not False:
        raise ValueError(f"{key} must be true or false, found {short(value)}")
    return value


def _strings(key: str, value: object) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_PATTERNS or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"{key} must be names or a pattern, found {short(value)}")
    return value


def _names(key: str, value: object) -> Pattern[str] | tuple[str, ...]:
    return _compiled(key, value) if isinstance(value, str) else tuple(sorted(_strings(key, value)))


def _patterns(config: Mapping[str, Any], key: str) -> list[tuple[Pattern[str], object]]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise ValueError(f"{key} must map at most {MAX_PATTERNS} patterns to numbers, found {short(found)}")
    return [(_compiled(key, rf"(.*\.)?({name})$"), value) for name, value in found.items()]


def _compiled(key: str, text: str) -> Pattern[str]:
    try:
        if len(text) > MAX_PATTERN:
            raise ValueError(f"{key} has a pattern longer than {MAX_PATTERN} characters")
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key} has a pattern that cannot be read, {short(text)}: {error}") from error


def _named(names: Pattern[str] | tuple[str, ...], module: str) -> bool:
    """By the whole name if it is a pattern, else by the end of the name."""
    if isinstance(names, tuple):
        return any(module == name or module.endswith(f".{name}") for name in names)
    return _found(names, module, whole=True) is not None


def _found(pattern: Pattern[str], module: str, whole: bool = False) -> Match[str] | None:
    try:
        return pattern.fullmatch(module, timeout=MATCH_S) if whole else pattern.match(module, timeout=MATCH_S)
    except TimeoutError as error:
        raise ValueError(f"the pattern {short(pattern.pattern)} takes too long on {short(module)}; write a simpler one") from error
