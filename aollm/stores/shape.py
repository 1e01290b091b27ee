"""The shape of the keys and values that one cache holds.

Everyone who lays them out, in memory or on disk, has it from here. It refuses to know models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shape:
    """Keys (or values) of a layer's tokens: [tokens, heads, head_dim] of dtype, in `layers` layers."""

    layers: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def row_nbytes(self) -> int:
        """Bytes of one token's keys in one layer."""
        return self.heads * self.head_dim * self.dtype.itemsize
