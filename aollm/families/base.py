"""What a family is: an architecture as pure code.

A family says which tensors each step of each layer needs and computes rows with them. It never awaits, loads or keeps
anything: weights are an argument, and where bytes may have to come from a disk it yields an effect and is resumed with
the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ModelError
from ..maths.layers import linear


@dataclass(frozen=True, slots=True)
class Attend:
    """Effect: append keys and values [T, K, D] to KV layer `layer`, attend with queries [T, H, D]; answered with [T, H, D].

    `sinks` [H]: one more logit for each head, whose share of the softmax is dropped.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Recall:
    """Effect: carry the state of state layer `layer` along `rows`, tensors [T, …]; answered with [T, …].

    `scan(rows, state)` takes consecutive rows of one sequence and the state before them (None at the beginning), and
    returns as many rows and the state after them, a new float32 tensor of the layer's shape.
    """

    layer: int
    rows: tuple[Tensor, ...]
    scan: Callable[[tuple[Tensor, ...], Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Route:
    """Effect: send rows [T, hidden] to the `experts` [T, k] chosen for them, with `gates` [T, k]; their weights begin to be read.

    To be followed by `Mixed`; what a step computes between the two, it computes while the drive works.
    """

    rows: Tensor
    experts: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True)
class Mixed:
    """Effect: answered with the sum over a row's experts of gate · expert(row), [T, hidden], for the rows of the last `Route`."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What adapters add to one product: ((x downᵀ) · mask) upᵀ, for all that ride at once.

    `down` [R, in] and `up` [out, R] hold the R ranks of all adapters side by side, `mask` [T, R] says which row has which.
    """

    down: Tensor
    up: Tensor
    mask: Tensor


class Params:
    """A step's weights by name, and the products with them."""

    def __init__(self, tensors: Mapping[str, Tensor], deltas: Mapping[str, Delta] | None = None) -> None:
        self._tensors, self._deltas = tensors, deltas or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The weights by name."""
        return self._tensors

    def with_deltas(self, deltas: Mapping[str, Delta]) -> Params:
        """The same weights beside other adapters."""
        return Params(self._tensors, deltas) if deltas else self

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [T, in] times the weight `name` [out, in], plus the bias `name`_bias if there is one, plus what adapters add."""
        y = linear(x, self._tensors[name], self._tensors.get(f"{name}_bias"))
        if (delta := self._deltas.get(name)) is not None:
            y += linear(linear(x, delta.down) * delta.mask, delta.up)
        return y


Angles = tuple[Tensor, ...]
Effect = Attend | Recall | Route | Mixed
Work = Generator[Effect, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Need:
    """A parameter of `shape`: one tensor of the checkpoint, or several stacked by rows.

    `dtype`: what it is computed with, where that is not the model's; `uint8` only for what is stored so. `row`: it is this
    row of the tensors alone, as one expert's part of what all experts have.
    """

    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    dtype: torch.dtype | None = None
    row: int | None = None


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a step: `count` of them, of which a row takes `top`; `params(e)` names the weights of expert e.

    `run(rows, weights, e, beside)` computes expert e's results for rows [N, hidden]; `beside` are the weights of the step.
    `likely(x, beside)` are the experts [T, top] that the step would choose for rows x if they came to it as they are.
    """

    count: int
    top: int
    params: Callable[[int], Mapping[str, Need]]
    run: Callable[[Tensor, Params, int, Params], Tensor]
    likely: Callable[[Tensor, Params], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a layer that runs on weights of its own, so that no more of a layer than this is in memory at once.

    `params` names what `run` finds in its weights. `run(weights, x, angles)` takes and returns rows x [T, hidden].
    `attends`: the KV layer that it yields `Attend` for, once, or None. `experts`: whom it yields `Route` and `Mixed` for, once
    each; their weights are read apart, those that are asked for.
    """

    layer: int
    name: str
    params: Mapping[str, Need]
    run: Callable[[Params, Tensor, Angles], Work]
    attends: int | None = None
    experts: Experts | None = None


@dataclass(frozen=True, slots=True)
class KvShape:
    """Keys and values of one token: for each layer that attends, `heads` × `head_dim` of `dtype`, twice.

    `layers` counts those that attend. `windows`: how many positions a query of each sees, None for all. `states`: shapes of
    what other layers carry from token to token, float32. `shift(keys [T, K, D], by)` turns keys into what they would be `by`
    positions earlier; None where that cannot be done. `depends_on_length`: whether keys are other ones in a prompt of
    another length.
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
    layers: int
    embedding: str
    """Name of the embedding table [vocabulary, hidden]."""
    head: str
    """Name of the output projection [vocabulary, hidden]; the embedding's where they are tied."""
    norm: str
    """Name of the last norm's weight."""
    steps: Sequence[Step]
    kv: KvShape

    def begin(self, x: Tensor) -> Tensor:
        """What is done to rows of the embedding table [T, hidden] before the first step."""
        ...

    def angles(self, positions: Tensor, length: int) -> Angles:
        """What the steps need to know of positions [T] in a sequence of `length` tokens; every tensor is [T, …]."""
        ...

    def finish(self, x: Tensor, norm: Tensor) -> Tensor:
        """The last norm, before the head: [T, hidden] to [T, hidden]."""
        ...

    def activation_nbytes(self, rows: int) -> int:
        """Bytes of intermediate results that one step needs for a chunk of `rows`."""
        ...


class Tower(Protocol):
    """What turns an image or a sound into rows that a language model reads like those of its embedding table.

    Its steps run one after the other on one item: the first takes what `prepare` gives, the last gives rows [n, hidden of the
    text]. What lies between is the tower's own business. They yield nothing, need no angles, and work in the weights' dtype.
    """

    kind: str
    """What it takes: `image` or `audio`."""
    dtype: torch.dtype
    steps: Sequence[Step]
    """Layers count from 0; steps before and after them have layer -1."""
    text_hidden: int
    both_ways: bool
    """Whether the rows of an item attend to each other in both directions."""

    def prepare(self, data: np.ndarray) -> Tensor:
        """One item, float32, from an image uint8 [H, W, 3] or a sound float32 [samples] at 16,000 Hz."""
        ...

    def rows(self, prepared: Tensor) -> int:
        """How many rows an item becomes."""
        ...

    def largest(self, rows: int) -> tuple[int, ...]:
        """The shape of what `prepare` gives for the largest item that becomes at most `rows` rows, or for the smallest there is."""
        ...

    def place(self, ids: Sequence[int], rows: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids with each item's placeholder replaced by what the model was trained on, and the position of each item's first row.

        `rows`: how many rows each item has, in the order of the prompt. What is already written out is left as it is.
        Raises `RequestError` when there are not as many placeholders as items.
        """
        ...

    def activation_nbytes(self, prepared: Sequence[int]) -> int:
        """Bytes that the largest step needs for an item of shape `prepared`, its input and its output among them."""
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


def gated_mlp(weights: Params, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(x gateᵀ) · (x upᵀ) downᵀ, with gate and up stacked as `gate_up` [2 F, hidden]: one product reads both."""
    gate, up = weights.linear("gate_up", x).chunk(2, dim=-1)
    return weights.linear("down", act(gate).mul_(up))


def head_name(prefix: str, tied: bool) -> str:
    """The output projection's name beside tensors whose names begin with `prefix`; the embedding's where they are tied."""
    return f"{prefix}embed_tokens.weight" if tied else f"{prefix.removesuffix('model.')}lm_head.weight"


def section(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of `config.json` that is an object of its own."""
    found = config.get(key)
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json: {key} must be an object, found {found!r}")
    return found


def prefix_of(names: Iterable[str], ending: str) -> str:
    """What comes before `ending` in the tensor's name that has it; `CheckpointError` when none has."""
    for name in names:
        if name.endswith(ending):
            return name.removesuffix(ending)
    raise CheckpointError(f"the checkpoint has no tensor …{ending}; is it the language model alone?")


def layer_kinds(config: Mapping[str, Any], layers: int, known: tuple[str, ...]) -> tuple[str, ...]:
    """What `layer_types` says of each layer, one of `known`; empty where the config has none."""
    kinds = config.get("layer_types")
    if kinds is None:
        return ()
    if not isinstance(kinds, list) or len(kinds) < layers or not all(kind in known for kind in kinds):
        raise ModelError(f"config.json: layer_types must name one of {', '.join(known)} for each layer, found {kinds!r}")
    return tuple(kinds[:layers])
