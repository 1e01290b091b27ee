"""A check: what was looked at, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["ok", "warning", "problem", "unknown"]
"""`warning`: it works, and could be better. `problem`: something will fail. `unknown`: it could not be found out."""


@dataclass(frozen=True, slots=True)
class Check:
    """One of them. `advice` is None where nothing is to be done; `figures` are what was measured, in bytes and seconds."""

    name: str
    state: State
    found: str
    advice: str | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The check as JSON has it."""
        return asdict(self)
