"""Mixtures: the rows of a layer go to the experts that were chosen for them, each expert's weights are read once, and the
results are summed in the order of the experts' numbers, whatever the order in which they came.

A generator for the compute thread; where it needs weights it yields to the event loop. It refuses to know how rows are
routed and where experts are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .berths import Berths
from .device import Device
from .errors import ModelError
from .experts import FEW_ROWS
from .families.base import Experts, Mixed, Params, Route, Step, Work


@dataclass(frozen=True, slots=True)
class Fetch:
    """Begin to read a layer's `experts` (ascending) for `rows` rows; answered with the order in which they come.

    `likely`: whom the next layer with experts will probably ask for, and which layer that is.
    """

    layer: int
    experts: list[int]
    rows: int
    likely: tuple[int, list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Arrive:
    """Wait for the experts that come next; answered with the weights of one or more of them."""


class _Part:
    """The rows of one chunk, sorted by expert."""

    def __init__(self, route: Route, device: Device | None) -> None:
        self.rows, self._gates, self._top = route.rows, route.gates, route.experts.shape[1]
        self.sum = torch.zeros_like(route.rows)
        chosen = (route.experts if device is None else device.fetch(route.experts)).flatten()
        order = chosen.argsort(stable=True)
        self._order = order if device is None else device.put(order)
        counts = chosen.bincount()
        ends = counts.cumsum(0)
        self.spans = {number: (int(ends[number] - counts[number]), int(ends[number])) for number in counts.nonzero().flatten().tolist()}

    def result(self, number: int, experts: Experts, weights: Params, beside: Params) -> tuple[Tensor, Tensor]:
        """An expert's weighed results, and the rows to add them to."""
        first, last = self.spans[number]
        places = self._order[first:last]
        rows = places // self._top
        picked = self.rows if len(self.rows) == 1 else self.rows[rows]
        return rows, experts.run(picked, weights, number, beside) * self._gates.flatten()[places, None].to(picked.dtype)


def mix(
    step: Step, beside: Params, works: Sequence[Work], foresee: Callable[[], tuple[int, list[int]] | None],
    post: Callable[[Callable[[], object]], None], release: Callable[[int], None], berths: Berths | None = None,
) -> Generator[Fetch | Arrive, Any, list[Tensor]]:  # fmt: skip
    """Run a step's chunks, each up to its `Mixed`; returns what each is to be answered with, [T, hidden].

    `beside` are the step's own weights, `foresee()` guesses what the next layer will ask for, `release(n)` says that the first
    n experts that came are not used any more. `berths`: where they are computed with, if not where they come to.
    """
    experts = step.experts
    assert experts is not None
    parts = [_Part(_expect(work, Route), None if berths is None else berths.device) for work in works]
    wanted = sorted({number for part in parts for number in part.spans})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < experts.count:
        raise ModelError(f"layer {step.layer} routes to expert {wanted[-1]}, but has {experts.count}")
    rows = sum(len(part.rows) for part in parts)
    order: list[int] = yield Fetch(step.layer, wanted, rows, foresee() if rows <= FEW_ROWS else None)
    for work in works:  # what is computed beside the experts, while they are read
        _expect(work, Mixed)
    held: list[tuple[int, _Part, Tensor, Tensor]] = []
    at = 0
    while at < len(order):
        arrived: list[Params] = yield Arrive()
        for number, came in zip(order[at:], arrived, strict=False):
            weights = came if berths is None else berths.take(came, step.layer)
            held += [(number, part, *part.result(number, experts, weights, beside)) for part in parts if number in part.spans]
            if rows > FEW_ROWS:
                _add(held)
        at += len(arrived)
        post(partial(release, len(arrived)))
    _add(held)
    return [part.sum for part in parts]


def _expect(work: Work, kind: type) -> Any:
    effect = next(work)
    assert isinstance(effect, kind)
    return effect


def _add(held: list[tuple[int, _Part, Tensor, Tensor]]) -> None:
    """Sum what is held, in the order of the experts' numbers."""
    for _, part, rows, result in sorted(held, key=lambda one: one[0]):
        if len(part.sum) == 1:
            part.sum += result
        else:
            part.sum.index_put_((rows,), result, accumulate=True)  # index_add_ gathers all threads for it, which takes longer
    held.clear()
