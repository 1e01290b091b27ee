"""Sequences whose keys and values follow from their names, so that a row that is stale, torn or in another's place shows.

A name is a path of labels, one for each block of tokens; what a block holds depends on the whole path up to it, as in a
model. It refuses to know where anything is stored.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

from aollm.maths.attention import BLOCK
from aollm.stores.records import Shape

Name = tuple[int, ...]
SHAPE = Shape(layers=2, heads=1, head_dim=2, dtype=torch.float32)


def ids(name: Name, tokens: int | None = None) -> list[int]:
    """The first `tokens` token ids of a sequence."""
    return [label * BLOCK + at for label in name for at in range(BLOCK)][:tokens]


def rows(name: Name, layer: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Keys and values [last - first, heads, head_dim] of positions `first` to `last`."""
    blocks = [block(name[: index + 1], layer) for index in range(first // BLOCK, -(-last // BLOCK))]
    cut = slice(first % BLOCK, first % BLOCK + last - first)
    return torch.cat([keys for keys, _ in blocks])[cut], torch.cat([values for _, values in blocks])[cut]


@lru_cache(2048)
def block(path: Name, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the block that `path` ends with, between -1 and 1."""
    count = BLOCK * SHAPE.heads * SHAPE.head_dim
    raw = hashlib.shake_256(repr((path, layer)).encode()).digest(4 * count)
    values = torch.frombuffer(bytearray(raw), dtype=torch.int16).float().div_(1 << 15)
    both = values.view(2, BLOCK, SHAPE.heads, SHAPE.head_dim)
    return both[0], both[1]
