"""Rotary position embedding: frequencies of the published kinds, and the rotation itself.

RoFormer (Su et al., 2021), half-split rotation as in Llama. Kinds: default, linear, dynamic (NTK), llama3, yarn
(Peng et al., 2023), longrope (Ding et al., 2024). Frequencies are float32, as transformers computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError, SpecializationError


@dataclass(frozen=True)
class Rope:
    """Frequencies for one head size. `frequencies(length)` is [D/2] float32 for a sequence of `length` tokens in all."""

    dim: int
    scale: float
    frequencies: Callable[[int], Tensor]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], head_dim: int, theta: float = 10_000.0) -> Rope:
        """Read `rope_parameters`, or `rope_theta` and `rope_scaling` as older configs have it; `ModelError` when malformed."""
        kind: object = "unread"
        try:
            given = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
            kind = given.get("rope_type", given.get("type", "default"))
            if not isinstance(kind, str) or kind not in _KINDS:
                raise SpecializationError(f"config.json: rope type {kind!r} is not known; known are {', '.join(_KINDS)}")
            base = float(given.get("rope_theta") or config.get("rope_theta") or theta)
            context = int(config.get("max_position_embeddings") or 2048)
            given.setdefault("original_max_position_embeddings", config.get("original_max_position_embeddings") or context)
            if not given["original_max_position_embeddings"] > 0:
                raise ValueError("original_max_position_embeddings must be positive")
            part = float(given.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0)
            dim = int(head_dim * part)
            if odd := [name for name, value in given.items() if isinstance(value, int | float) and not 0 <= value < math.inf]:
                raise ModelError(f"config.json: {odd[0]} of the rope parameters must be a positive number, found {given[odd[0]]!r}")
            scale, frequencies = _KINDS[kind](given, base, dim, context)
            probes = [frequencies(1), frequencies(1 << 30)]
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise ModelError(f"config.json: the rope parameters (type {kind!r}) are incomplete or malformed: {error!r}") from error
        if not (0 < part <= 1 and 0 < scale < math.inf and 0 < base < math.inf):
            raise ModelError(
                f"config.json: rope type {kind!r}: theta, scale and partial_rotary_factor (at most 1) must be positive and finite"
            )
        for probe in probes:
            if probe.shape != (dim // 2,) or not bool((torch.isfinite(probe) & (probe > 0)).all()):
                raise ModelError(
                    f"config.json: rope type {kind!r} needs {dim // 2} finite positive frequencies; its factors do not give them"
                )
        return cls(dim, scale, frequencies)

    def angles(self, positions: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, 1, D/2] in `dtype` for int64 `positions` [T] of a sequence that will be `length` tokens long."""
        angle = positions[:, None].float() * self.frequencies(length)  # [T, D/2]
        return (angle.cos() * self.scale).to(dtype)[:, None], (angle.sin() * self.scale).to(dtype)[:, None]

    @property
    def depends_on_length(self) -> bool:
        """Whether a position's angles are other ones in a longer sequence."""
        return not torch.equal(self.frequencies(1), self.frequencies(1 << 30))

    def shifted(self, keys: Tensor, by: int) -> Tensor:
        """Keys [T, K, D] as they would be `by` positions earlier: rotated back, in float32."""
        angle = -by * self.frequencies(1)  # [D/2]
        return rotate(keys.float(), angle.cos()[None, None], angle.sin()[None, None]).to(keys.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, H, D] by angles [T, 1, D'/2]; dims past D' pass through."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :])
    return torch.cat(parts, dim=-1)


Scheme = tuple[float, Callable[[int], Tensor]]


def _powers(base: float, dim: int) -> Tensor:
    return base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def _default(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    inverse = 1.0 / _powers(base, dim)
    return 1.0, lambda length: inverse


def _linear(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    inverse = 1.0 / _powers(base, dim) / float(given["factor"])
    return 1.0, lambda length: inverse


def _dynamic(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    factor = float(given["factor"])

    def frequencies(length: int) -> Tensor:
        stretched = factor * max(length, context) / context - (factor - 1)
        return 1.0 / _powers(base * stretched ** (dim / (dim - 2)), dim)

    return 1.0, frequencies


def _llama3(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    factor, low, high = float(given["factor"]), float(given["low_freq_factor"]), float(given["high_freq_factor"])
    original = float(given["original_max_position_embeddings"])
    inverse = 1.0 / _powers(base, dim)
    wavelength = 2 * math.pi / inverse
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, torch.where(wavelength < original / high, inverse, blended))
    return 1.0, lambda length: scaled


def _yarn(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    original = float(given["original_max_position_embeddings"])
    factor = float(given.get("factor") or context / original)
    mscale, mscale_all = given.get("mscale"), given.get("mscale_all_dim")
    scale = given.get("attention_factor")
    if scale is None:
        scale = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)

    def turns_at(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = turns_at(given.get("beta_fast") or 32), turns_at(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 if low == high else 0.0
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    powers = _powers(base, dim)
    inverse = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return float(scale), lambda length: inverse


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(given: Mapping[str, Any], base: float, dim: int, context: int) -> Scheme:
    original = int(given["original_max_position_embeddings"])
    factor = float(given.get("factor") or context / original)
    scale = given.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    powers = _powers(base, dim)
    factors = [torch.tensor(given[key], dtype=torch.float32) for key in ("short_factor", "long_factor")]
    if any(each.shape != powers.shape for each in factors):
        raise ValueError(f"short_factor and long_factor must have {dim // 2} numbers each")
    short, long = (1.0 / (each * powers) for each in factors)
    return float(scale), lambda length: long if length > original else short


_KINDS: dict[str, Callable[[Mapping[str, Any], float, int, int], Scheme]] = {
    "default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "su": _longrope,
}  # fmt: skip
