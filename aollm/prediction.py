"""What a plan foretells: speeds, first tokens, memory and disk, as it is shown and compared with what came."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Limiter = Literal["disk", "memory", "compute"]


@dataclass(frozen=True, slots=True)
class Speed:
    """`requests` that decode together, each with `context` tokens behind it: what a pass takes, reads, and is limited by."""

    requests: int
    context: int
    seconds_per_pass: float
    bytes_per_pass: int
    tokens_per_second: float
    limiter: Limiter


@dataclass(frozen=True, slots=True)
class FirstToken:
    """Seconds until the first token of the answer to a prompt of `prompt_tokens`, by itself."""

    prompt_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan foretells. `peak_nbytes` is the most memory that the process will have, `disk_nbytes` what keys and values
    can come to on disk. `drive_bytes_per_second` is None where nothing is read again."""

    drive_bytes_per_second: float | None
    speeds: tuple[Speed, ...]
    first_tokens: tuple[FirstToken, ...]
    peak_nbytes: int
    disk_nbytes: int
