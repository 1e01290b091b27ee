"""Adapters: those of one runtime, laid side by side for each product of the base that any of them changes.

The ranks of an adapter are neighbours, so that the adapters in use are one slice of both factors. It refuses to know
requests: who rides with which adapter is an argument.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint
from ..errors import CheckpointError, ModelError, RequestError
from ..families.base import Delta, Family, Step
from .adapter import CONFIG, Adapter, Pair

TAIL = re.compile(r"(?P<prefix>(?:.*?\.)?)(?P<tail>layers\.\d+\..+)")
TEXT = frozenset(("model", "language_model", ""))
"""What a language model's own name is made of, in one class of models or another."""
TOLD = 3


@dataclass(frozen=True, slots=True)
class Place:
    """Rows [first, first + rows) of the parameter `param` [out, width] of the step `step` of `layer`."""

    layer: int
    step: str
    param: str
    first: int
    rows: int
    width: int
    out: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Factors:
    """What adapters add to one parameter: down [in, R] and up [R, out], both transposed, so that an adapter's part of up is whole rows.

    `owners` [R]: whose each rank is. `starts`: the first rank of each adapter, and the number of all.
    """

    down: Tensor
    up: Tensor
    owners: Tensor
    starts: tuple[int, ...]


class Adapters:
    """Adapters by name, for one base."""

    def __init__(self, adapters: Mapping[str, Adapter], family: Family, checkpoint: Checkpoint) -> None:
        """Find each adapter's modules in the base and lay them out, in the model's dtype; a second or so for a large adapter.

        Raises `ModelError` when one is for another base, `CheckpointError` when its tensors do not suffice.
        """
        self.names = tuple(adapters)
        self.digests = tuple(adapter.digest for adapter in adapters.values())
        self._dtype = family.dtype
        base = places_of(family, checkpoint)
        parts: dict[tuple[int, str, str], list[tuple[int, Place, Pair]]] = {}
        for number, (name, adapter) in enumerate(adapters.items()):
            for place, pair in _placed(name, adapter, base):
                parts.setdefault((place.layer, place.step, place.param), []).append((number, place, pair))
        self._factors: dict[tuple[int, str], dict[str, Factors]] = {}
        for (layer, step, param), own in parts.items():
            self._factors.setdefault((layer, step), {})[param] = self._side_by_side(own)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that they take."""
        every = [factors for step in self._factors.values() for factors in step.values()]
        return sum(tensor.nbytes for factors in every for tensor in (factors.down, factors.up, factors.owners))

    def place(self, put: Callable[[Tensor], Tensor]) -> None:
        """Have all factors where `put` puts them."""
        for step in self._factors.values():
            for param, own in step.items():
                step[param] = Factors(put(own.down), put(own.up), put(own.owners), own.starts)

    def index(self, name: str) -> int:
        """The number of the adapter called `name`; `RequestError` with the names that there are."""
        if name not in self.names:
            raise RequestError(
                f"adapter: there is no {name[:100]!r}; there are {', '.join(self.names) or 'none: open the runtime with adapter_dir'}"
            )
        return self.names.index(name)

    def mask(self, rows: Sequence[tuple[int | None, int]]) -> Tensor | None:
        """Which row has which adapter, [T, adapters], from the rows' parts in order: an adapter's number or None, and how many rows.

        None when nobody has one.
        """
        if all(number is None for number, _ in rows):
            return None
        mask = torch.zeros(sum(count for _, count in rows), len(self.names), dtype=self._dtype)
        first = 0
        for number, count in rows:
            if number is not None:
                mask[first : first + count, number] = 1
            first += count
        return mask

    def deltas(self, step: Step, mask: Tensor) -> Mapping[str, Delta]:
        """What the adapters of rows `mask` [T, adapters] add to the products of `step`, by parameter."""
        found = self._factors.get((step.layer, step.name))
        if found is None:
            return {}
        used = [number for number, most in enumerate(mask.amax(0).tolist()) if most]
        if not used:
            return {}
        deltas = {}
        for name, factors in found.items():
            low, high = factors.starts[used[0]], factors.starts[used[-1] + 1]
            if low < high:
                deltas[name] = Delta(
                    factors.down[:, low:high].t(), factors.up[low:high].t(), mask.index_select(1, factors.owners[low:high])
                )
        return deltas

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"<Adapters {', '.join(self.names)}: {self.nbytes / 1e6:.1f} MB>"

    def _side_by_side(self, parts: Sequence[tuple[int, Place, Pair]]) -> Factors:
        """`parts` in the order of adapters: the number of one, what part of the parameter it changes, and how."""
        place = parts[0][1]
        ranks = [pair.down.shape[0] for _, _, pair in parts]
        up = torch.zeros(sum(ranks), place.out, dtype=place.dtype)
        first = 0
        for (_, own, pair), rank in zip(parts, ranks, strict=True):
            up[first : first + rank, own.first : own.first + own.rows] = (pair.up.float() * pair.scale).t()
            first += rank
        owners = [number for (number, _, _), rank in zip(parts, ranks, strict=True) for _ in range(rank)]
        starts = tuple(sum(owner < number for owner in owners) for number in range(len(self.names) + 1))
        down = torch.cat([pair.down.to(place.dtype).t() for _, _, pair in parts], dim=1)
        return Factors(down, up, torch.tensor(owners), starts)


def load_adapters(source: Path | Mapping[str, Path]) -> dict[str, Adapter]:
    """The adapters of `source` by name, blocking: folders by name, or one folder that is an adapter or has adapters in it.

    Raises `ModelError` when there is none, or one cannot be used.
    """
    if isinstance(source, Mapping):
        return {name: Adapter.load(folder) for name, folder in source.items()}
    if (source / CONFIG).is_file():
        return {source.name: Adapter.load(source)}
    try:
        folders = sorted(folder for folder in source.iterdir() if (folder / CONFIG).is_file())
    except OSError as error:
        raise ModelError(
            f"{source} cannot be read: {error.strerror}; give a LoRA adapter's folder, or one with such folders in it"
        ) from error
    if not folders:
        raise ModelError(f"{source} has no {CONFIG}, nor has a folder in it; give a LoRA adapter's folder, or one with such folders in it")
    return {folder.name: Adapter.load(folder) for folder in folders}


def places_of(family: Family, checkpoint: Checkpoint) -> dict[str, Place]:
    """The modules of the base that can be adapted, by their names in the checkpoint: matrices of steps, experts left out."""
    found: dict[str, Place] = {}
    for step in family.steps:
        for name, need in step.params.items():
            if len(need.shape) != 2 or need.row is not None or need.dtype == torch.uint8:
                continue
            first = 0
            for tensor in need.tensors:
                rows = checkpoint[tensor].shape[0]
                place = Place(step.layer, step.name, name, first, rows, need.shape[1], need.shape[0], need.dtype or family.dtype)
                if tensor.endswith(".weight"):
                    found[tensor.removesuffix(".weight")] = place
                first += rows
    return found


def _placed(name: str, adapter: Adapter, base: Mapping[str, Place]) -> list[tuple[Place, Pair]]:
    """An adapter's parts with their places, in the order of the base."""
    who = f"adapter {name} ({adapter.folder})"
    trained = f"it was trained on {adapter.lora.base}"
    tails = {_split(module)[1]: module for module in base}
    found: dict[str, str] = {}  # module of the base: module of the adapter
    odd = []
    for module in adapter.modules:
        prefix, tail = _split(module)
        own = module if module in base else tails.get(tail) if TEXT.issuperset(prefix.split(".")) else None
        if own is None:
            odd.append(module)
        elif own in found:
            raise CheckpointError(f"{who}: {found[own]} and {module} are both {own} of the base; {trained}")
        else:
            found[own] = module
    if odd:
        raise ModelError(f"{who} {_why(odd)}; {trained}")
    for own, module in found.items():
        pair, place = adapter.modules[module], base[own]
        if (pair.down.shape[1], pair.up.shape[0]) != (place.width, place.rows):
            raise ModelError(
                f"{who}: {module} is for a weight [{pair.up.shape[0]}, {pair.down.shape[1]}], "
                f"and {own}.weight of the base is [{place.rows}, {place.width}]; {trained}"
            )
        _check_size(who, module, pair, place.dtype)
    _check_whole(who, adapter, base, found)
    return [(base[own], adapter.modules[found[own]]) for own in base if own in found]


def _why(modules: Sequence[str]) -> str:
    """Why modules of an adapter are nowhere in the base."""
    if experts := [module for module in modules if ".experts." in module]:
        return f"adapts experts ({experts[0]}), which is not supported; train it on other modules"
    if ends := [module for module in modules if module.rpartition(".")[2] in ("lm_head", "embed_tokens")]:
        return f"adapts the embedding table or the head ({ends[0]}), which is not supported; train it on other modules"
    more = f" and {len(modules) - TOLD} more" if len(modules) > TOLD else ""
    return f"adapts {', '.join(modules[:TOLD])}{more}, which the base does not have; use the adapter with the base that it is for"


def _check_size(who: str, module: str, pair: Pair, dtype: torch.dtype) -> None:
    """Factors so large that products overflow would reach rows of others in the batch: what is masked would be no number."""
    limit = torch.finfo(dtype).max ** 0.5
    most = max(float(pair.down.float().abs().max()), float(pair.up.float().abs().max()) * max(1.0, abs(pair.scale)))
    if most > limit:
        raise CheckpointError(f"{who}: {module} holds {most:.3g}, more than {limit:.3g}, which no trained adapter has; download it again")


def _check_whole(who: str, adapter: Adapter, base: Mapping[str, Place], found: Mapping[str, str]) -> None:
    """That no module of the base is declared and left out."""
    if adapter.lora.targets is None:
        return
    prefixes = {_split(module)[0] for module in found.values()}
    try:
        absent = [
            own for own in base
            if own not in found and any(adapter.lora.takes(prefix + _split(own)[1]) for prefix in prefixes)
        ]  # fmt: skip
    except ValueError as error:
        raise ModelError(f"{who}: {error}") from error
    if absent:
        more = f" and {len(absent) - TOLD} more" if len(absent) > TOLD else ""
        raise CheckpointError(
            f"{who} has no tensors for {', '.join(absent[:TOLD])}{more}, which its target_modules name; download it again"
        )


def _split(module: str) -> tuple[str, str]:
    """What comes before `layers.N.`, and the rest; nothing and the name itself where there is no such part."""
    found = TAIL.fullmatch(module)
    return (found["prefix"], found["tail"]) if found else ("", module)
