"""Where pieces are put: what is named, where it is named for; of the rest as much as fits, spread evenly; each size once."""

import random
from itertools import pairwise

import pytest

from aollm.placement import Place, band, evenly, kept_nbytes, named_layers, place, spread

LAYERS = [layer for layer in range(6) for _ in range(2)] + [-1]
SIZES = [10, 20] * 6 + [15]
WHOLE = sum(SIZES)


def told(cpu: int | None, gpu: int | None, device_room: int | None, host_room: int, policy: str = "auto") -> str:
    in_host, on_device = named_layers(6, cpu, policy, gpu)
    return "".join({"device": "D", "host": "H", "disk": "."}[at] for at in place(LAYERS, SIZES, on_device, in_host, device_room, host_room))


@pytest.mark.parametrize(
    ("cpu", "gpu", "device_room", "host_room", "policy", "wanted"),
    [
        (None, None, WHOLE, WHOLE, "auto", "DDDDDDDDDDDDD"),
        (None, None, None, WHOLE, "auto", "HHHHHHHHHHHHH"),
        (None, None, 0, WHOLE, "auto", "HHHHHHHHHHHHH"),
        (None, None, 0, 0, "auto", "............."),
        (None, None, -5, -5, "auto", "............."),
        (2, None, None, 0, "auto", "....HHHH....."),
        (2, None, None, WHOLE, "prefix", "HHHH........."),
        (2, None, None, WHOLE, "suffix", "........HHHH."),
        (2, None, WHOLE, WHOLE, "suffix", "DDDDDDDDHHHHD"),
        (2, None, WHOLE, 0, "suffix", "DDDDDDDDHHHHD"),
        (0, None, None, WHOLE, "auto", "............."),
        (9, None, None, 0, "auto", "HHHHHHHHHHHH."),
        (None, 2, 0, 0, "auto", "..DD....DD..."),
        (None, 2, 0, WHOLE, "auto", "HHDDHHHHDDHHH"),
        (None, 0, WHOLE, 0, "auto", "............."),
        (None, 2, None, 0, "auto", "..HH....HH..."),
        (2, 2, WHOLE, WHOLE, "auto", "..DDHHHH..DD."),
        (2, 9, WHOLE, WHOLE, "auto", "DDDDHHHHDDDD."),
        (6, 1, WHOLE, WHOLE, "auto", "HHHHHHHHHHHH."),
        (2, 2, None, WHOLE, "auto", "..HHHHHH..HH."),
        (0, 0, WHOLE, WHOLE, "auto", "............."),
    ],
)
def test_places(cpu: int | None, gpu: int | None, device_room: int | None, host_room: int, policy: str, wanted: str) -> None:
    assert told(cpu, gpu, device_room, host_room, policy) == wanted


def test_the_device_is_filled_before_the_host_and_both_are_kept_to() -> None:
    chance = random.Random(3)
    for _ in range(300):
        sizes = [chance.randint(1, 90) for _ in range(chance.randint(1, 40))]
        layers = list(range(len(sizes)))
        rooms: dict[Place, int] = {"device": chance.randint(0, 900), "host": chance.randint(0, 900)}
        places = place(layers, sizes, None, None, rooms["device"], rooms["host"])
        left = [nbytes for nbytes, at in zip(sizes, places, strict=True) if at == "disk"]
        for name, room in rooms.items():
            assert kept_nbytes(sizes, places, name) <= room
            assert all(kept_nbytes(sizes, places, name) + nbytes > room for nbytes in left)
        if "disk" in places or "host" in places:
            below = [nbytes for nbytes, at in zip(sizes, places, strict=True) if at != "device"]
            assert all(kept_nbytes(sizes, places, "device") + nbytes > rooms["device"] for nbytes in below)


def test_what_is_kept_is_spread_over_the_pass() -> None:
    places = place(list(range(40)), [10] * 40, None, None, 100, 100)
    for name in ("device", "host"):
        at = [index for index, found in enumerate(places) if found == name]
        assert len(at) == 10 and max(later - first for first, later in pairwise(at)) <= 6
    assert spread([10] * 4, 20) == {0, 2}


@pytest.mark.parametrize("room", [5, 0, -5])
def test_what_is_named_may_leave_nothing_and_no_room(room: int) -> None:
    assert place([0, 1], [10, 10], {0, 1}, None, None, room) == ["host", "host"]
    assert spread([], room) == spread([10], room) == set()


@pytest.mark.parametrize(
    ("layers", "kept", "wanted"),
    [(6, 1, {3}), (6, 2, {1, 4}), (6, 3, {1, 3, 5}), (5, 5, {0, 1, 2, 3, 4}), (3, 9, {0, 1, 2}), (4, 0, set())],
)
def test_layers_on_the_device_are_spread_evenly(layers: int, kept: int, wanted: set[int]) -> None:
    assert evenly(range(layers), kept) == wanted


@pytest.mark.parametrize(
    ("policy", "wanted"), [("prefix", range(3)), ("suffix", range(4, 7)), ("middle-band", range(2, 5)), ("auto", range(2, 5))]
)
def test_bands(policy: str, wanted: range) -> None:
    assert band(7, 3, policy) == wanted
    assert band(8, 3, policy) == {"prefix": range(3), "suffix": range(5, 8)}.get(policy, range(2, 5))
