"""What a family is: an architecture as pure code.

A family says which tensors each step of each layer needs and computes rows with them. It never awaits, loads or keeps
anything: weights are an argument, and where bytes may have to come from a disk it yields an effect and is resumed with
the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import ModelError


@dataclass(frozen=True, slots=True)
class Attend:
    """Effect: append keys and values [T, K, D] to KV layer `layer`, attend with queries [T, H, D]; answered with [T, H, D]."""

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Recall:
    """Effect: carry the state of state layer `layer` along rows [T, …]; answered with [T, …].

    `scan(rows, state)` takes consecutive rows of one sequence and the state before them (None at the beginning), and
    returns as many rows and the state after them, a new float32 tensor of the layer's shape.
    """

    layer: int
    rows: Tensor
    scan: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


Params = Mapping[str, Tensor]
Angles = tuple[Tensor, ...]
Effect = Attend | Recall
Work = Generator[Effect, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Need:
    """A parameter of `shape`: one tensor of the checkpoint, or several stacked by rows."""

    shape: tuple[int, ...]
    tensors: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a layer that runs on weights of its own, so that no more of a layer than this is in memory at once.

    `params` names what `run` finds in its weights. `run(weights, x, angles)` takes and returns rows x [T, hidden].
    `attends`: the KV layer that it yields `Attend` for, once, or None.
    """

    layer: int
    name: str
    params: Mapping[str, Need]
    run: Callable[[Params, Tensor, Angles], Work]
    attends: int | None = None


@dataclass(frozen=True, slots=True)
class KvShape:
    """Keys and values of one token: for each layer that attends, `heads` × `head_dim` of `dtype`, twice.

    `windows`: how many positions a query of each layer sees, None for all. `states`: shapes of what other layers carry from
    token to token, float32. `shift(keys [T, K, D], by)` turns keys into what they would be `by` positions earlier; None
    where that cannot be done. `depends_on_length`: whether keys are other ones in a prompt of another length.
    """

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...] = ()
    states: tuple[tuple[int, ...], ...] = ()
    shift: Callable[[Tensor, int], Tensor] | None = None
    depends_on_length: bool = False

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's keys (or values) in one layer."""
        return self.heads * self.head_dim * self.dtype.itemsize

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token in all layers."""
        return 2 * self.layers * self.row_nbytes

    @property
    def state_nbytes(self) -> int:
        """Bytes of one sequence's states."""
        return sum(4 * math.prod(shape) for shape in self.states)

    def window(self, layer: int, most: int | None = None) -> int | None:
        """What a query of `layer` sees when the cache keeps `most` tokens: the smaller of the two."""
        own = self.windows[layer] if self.windows else None
        return own if most is None else most if own is None else min(own, most)


class Family(Protocol):
    """An architecture with its sizes."""

    dtype: torch.dtype
    hidden: int
    vocabulary: int
    context: int
    embedding: str
    """Name of the embedding table [vocabulary, hidden]."""
    head: str
    """Name of the output projection [vocabulary, hidden]; the embedding's where they are tied."""
    norm: str
    """Name of the last norm's weight."""
    steps: Sequence[Step]
    kv: KvShape

    def angles(self, positions: Tensor, length: int) -> Angles:
        """What the steps need to know of positions [T] in a sequence of `length` tokens; every tensor is [T, …]."""
        ...

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm, before the head: [T, hidden] to [T, hidden]."""
        ...

    def activation_nbytes(self, rows: int) -> int:
        """Bytes of intermediate results that one step needs for a chunk of `rows`."""
        ...


def count(config: Mapping[str, Any], key: str, default: int | None = None, most: int = 1 << 24) -> int:
    """A positive whole number of `config.json`; `ModelError` names the key and what was found."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ModelError(f"config.json: {key} must be a whole number from 1 to {most}, found {value!r}")
    return value


def positive(config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive finite number of `config.json`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ModelError(f"config.json: {key} must be a positive number, found {value!r}")
    return float(value)
