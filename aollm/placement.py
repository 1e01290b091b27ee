"""Placement: which pieces are kept in memory and which stream. Pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

Place = Literal["device", "host", "disk"]


def place(
    layers: Sequence[int], sizes: Sequence[int], on_device: Collection[int] | None, in_host: Collection[int] | None,
    device_room: int | None, host_room: int,
) -> list[Place]:  # fmt: skip
    """A place for each piece, of which `layers` has the layer (-1 for none) and `sizes` the bytes.

    The pieces of the layers `on_device` are there, those of `in_host` in the host's memory. Where nobody names layers for a place, it
    takes what fits of those that are left, spread evenly: the device first. `device_room` None: the device has no memory of its
    own, and what is to be there is in the host's.
    """
    places: list[Place] = ["disk"] * len(layers)
    for index, layer in enumerate(layers):
        if on_device is not None and layer in on_device:
            places[index] = "host" if device_room is None else "device"
        elif in_host is not None and layer in in_host:
            places[index] = "host"
    if device_room is not None and on_device is None:
        _fill(places, "device", sizes, device_room)
    if in_host is None:
        _fill(places, "host", sizes, host_room)
    return places


def _fill(places: list[Place], name: Place, sizes: Sequence[int], room: int) -> None:
    """Have what is on disk and fits `room`, beside what is there, be at the place `name`."""
    left = [index for index, place in enumerate(places) if place == "disk"]
    room -= kept_nbytes(sizes, places, name)
    for chosen in spread([sizes[index] for index in left], room):
        places[left[chosen]] = name


def spread(sizes: Sequence[int], room: int) -> frozenset[int]:
    """Choose pieces to pin in `room` bytes: as many as fit, spread evenly over the pass, so that the drive never waits."""
    total = sum(sizes)
    if total <= max(room, 0):
        return frozenset(range(len(sizes)))
    pinned: set[int] = set()
    share, credit, left = room / total, 0.0, room
    for index, nbytes in enumerate(sizes):
        credit += share * nbytes
        if credit >= nbytes / 2 and nbytes <= left:
            pinned.add(index)
            credit -= nbytes
            left -= nbytes
    for index in sorted(set(range(len(sizes))) - pinned, key=lambda index: (-sizes[index], index)):
        if sizes[index] <= left:  # what rounding left over
            pinned.add(index)
            left -= sizes[index]
    return frozenset(pinned)


def ring_nbytes(sizes: Sequence[int], depth: int) -> int:
    """Bytes of the stream ring: what `depth` + 1 pieces of the round take that follow each other, and at least two of the
    largest, so that one is read while another is computed with. The round has no end, so it wraps around."""
    if not sizes:
        return 0
    count = min(depth + 1, len(sizes) + 1)
    round_ = list(sizes) * 3
    return max(2 * max(sizes), *(sum(round_[at : at + count]) for at in range(len(sizes))))


def band(layers: int, kept: int, policy: str) -> range:
    """The layers that an explicit placement keeps: the first, the last, or `kept` in the middle (`auto` is `middle-band`)."""
    kept = min(kept, layers)
    first = {"prefix": 0, "suffix": layers - kept}.get(policy, (layers - kept) // 2)
    return range(first, first + kept)


def named_layers(layers: int, cpu: int | None, policy: str, gpu: int | None) -> tuple[range | None, frozenset[int] | None]:
    """The layers that are named for the host's memory, `cpu` of them, and for the device, `gpu` of the others; None for what is
    not said."""
    in_host = None if cpu is None else band(layers, cpu, policy)
    left = [layer for layer in range(layers) if in_host is None or layer not in in_host]
    return in_host, None if gpu is None else evenly(left, gpu)


def kept_nbytes(sizes: Sequence[int], places: Sequence[Place], name: Place) -> int:
    """Bytes at the place `name`."""
    return sum(nbytes for nbytes, at in zip(sizes, places, strict=True) if at == name)


def evenly(layers: Sequence[int], kept: int) -> frozenset[int]:
    """`kept` of `layers`, or all if there are no more, spread evenly over them."""
    kept = min(kept, len(layers))
    return frozenset(layers[(2 * number + 1) * len(layers) // (2 * kept)] for number in range(kept))
