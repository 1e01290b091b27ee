"""Room: the memory of a device that has its own, divided among what a run needs of it and the weights. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from .berths import BERTHS, berth_nbytes
from .buffers import Ledger, pages
from .device import Device
from .families.base import Family, Tower
from .piece import Piece
from .placement import ring_nbytes
from .supply import landing_nbytes
from .towers import DEPTH


def device_ledger(
    device: Device, memory: int, family: Family, experts: Iterable[Piece], tower: tuple[Tower | None, Sequence[Piece]], context: int,
    activations: int, adapters_nbytes: int,
) -> Ledger:  # fmt: skip
    """What a run needs of `memory` bytes of `device` before any weight is kept there; nothing where its memory is the host's."""
    if not device.apart:
        return Ledger(0, setting="device_memory")
    states = 3 * max((4 * math.prod(shape) for shape in family.kv.states), default=0)  # one comes, one is computed, one goes
    needs = {"libraries": device.overhead_nbytes, "activations": activations + states, "adapters": adapters_nbytes}
    if tower[0] is not None:
        needs["towers"] = landing_nbytes(tower[1], DEPTH) + tower[0].activation_nbytes(tower[0].largest(context))
    if berth := max(map(berth_nbytes, experts), default=0):
        needs["experts"] = BERTHS * berth
    return Ledger(memory, {name: nbytes for name, nbytes in needs.items() if nbytes}, "device_memory")


def land(ledger: Ledger, sizes: Sequence[int], depth: int, named: bool) -> int:
    """Set memory aside for what comes and goes: none where all pieces of `sizes` stay, and nobody has `named` other places for some.

    Raises `MemoryBudgetError` where not even that fits.
    """
    if not ledger.limit or (sum(sizes) <= ledger.free and not named):
        return 0
    nbytes = pages(ring_nbytes(sizes, depth))
    ledger.reserve("landing", nbytes)
    return nbytes


def why_here(device: Device, reason: str, asked: Mapping[str, object]) -> str:
    """Why it is this device; where it has no memory of its own, also what became of the settings that were `asked` for one."""
    if device.apart or not (names := [name for name, value in asked.items() if value is not None]):
        return reason
    if "offload_gpu_layers" in names:
        return f"{reason}: what was to be on a device is in host memory"
    return f"{reason}: {names[0]} limits nothing"
