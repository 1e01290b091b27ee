"""The selector: which strategy keeps keys and values when nobody has named one, by a table of rules.

It is pure: the same inputs always give the same choice, with the rule that fired and what is tried when the choice cannot be
opened. It refuses to know how inputs are measured and stores opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .maths.attention import BLOCK
from .stores.presets import PRESETS

FEW = 2
"""Requests whose whole contexts have room at once before a history is best kept in memory: the second need not wait for the first."""
USUAL_TOKENS = 32_768
"""A context that is enough where nobody asked for a longer one, though the model could have it: it is cut to what memory has."""
SLOW = 20e6
"""Bytes per second of a drive that even writing would wait for: a share on a slow network, a memory card."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was measured or asked for; sizes in bytes. `share_nbytes` of `memory_nbytes` are for keys and values."""

    memory_nbytes: int
    """What the process may have besides what it has already."""
    share_nbytes: int
    kv_nbytes_per_token: int
    context_tokens: int
    """The longest context: the one asked for, or the model's own."""
    context_asked: bool
    """Whether it was asked for."""
    requests: int
    """Requests that may ride at once."""
    persistent: bool = False
    """Whether keys and values are to outlive the runtime."""
    drive_bytes_per_second: float | None = None
    """None where nothing turns on it, and where the cache is not on the drive that was measured."""
    disk_free_nbytes: int | None = None
    """Room on the drive of the cache; None where it is not known."""
    window_tokens: int | None = None
    """The window that was asked for."""

    @property
    def context_nbytes(self) -> int:
        """Keys and values of one request with the whole context."""
        return self.kv_nbytes_per_token * self.context_tokens

    def fits(self, requests: int) -> bool:
        """Whether the whole contexts of so many requests fit the share, or of all that may ride where those are fewer."""
        return self.context_nbytes * min(requests, self.requests) <= self.share_nbytes

    @property
    def usual_fits(self) -> bool:
        """Whether memory has a context that nobody asked to be longer."""
        return not self.context_asked and self.kv_nbytes_per_token * USUAL_TOKENS <= self.share_nbytes

    @property
    def tight_drive(self) -> bool:
        """Whether the drive has less room than memory."""
        return self.disk_free_nbytes is not None and self.disk_free_nbytes < self.share_nbytes

    @property
    def slow_drive(self) -> bool:
        """Whether even writing would wait for the drive."""
        return self.drive_bytes_per_second is not None and self.drive_bytes_per_second < SLOW


@dataclass(frozen=True, slots=True)
class Rule:
    """When it holds, `choice` is taken, and the `fallbacks` in their order where that cannot be opened."""

    profile: str
    name: str
    holds: Callable[[Inputs], bool]
    choice: str
    fallbacks: tuple[str, ...]
    text: str

    @property
    def id(self) -> str:
        """Its name among all rules."""
        return f"{self.profile}.{self.name}"


@dataclass(frozen=True, slots=True)
class Tried:
    """A strategy that could not be opened, and why."""

    strategy: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """What the rules chose, why, and what of it could not be had. `window_tokens` is for strategies with a window."""

    profile: str
    rule: str
    text: str
    inputs: Inputs
    choice: str
    fallbacks: tuple[str, ...]
    window_tokens: int
    tried: tuple[Tried, ...] = ()

    @property
    def strategy(self) -> str:
        """The one in force: the choice, or the first fallback that was not tried in vain."""
        return (self.choice, *self.fallbacks)[len(self.tried)]

    def without(self, reason: str) -> Selection | None:
        """The next in the chain, because the one in force could not be opened for `reason`; None after the last."""
        if len(self.tried) == len(self.fallbacks):
            return None
        return replace(self, tried=(*self.tried, Tried(self.strategy, reason)))


def _resident_or_paged(profile: str, requests: int, whose: str) -> tuple[Rule, ...]:
    """Both keep every bit, so neither gives way to one that does not."""
    resident, paged = ("resident", ("paged",)), ("paged", ("resident",))
    return (
        Rule(profile, "fits", lambda i: not i.persistent and i.fits(requests), *resident, f"{whose} fits the share of memory"),
        Rule(
            profile, "usual", lambda i: not i.persistent and i.usual_fits, *resident,
            f"{whose} does not fit, but nobody asked for it and {USUAL_TOKENS} tokens do: contexts are as long as memory allows",
        ),
        Rule(profile, "persistent", lambda i: i.persistent, *paged, "keys and values are to outlive the runtime"),
        Rule(profile, "tight-drive", lambda i: i.tight_drive, *resident, f"{whose} does not fit, and the drive has less room than memory"),
        Rule(
            profile, "slow-drive", lambda i: i.slow_drive, *resident,
            f"{whose} does not fit, and the drive gives less than {SLOW / 1e6:.0f} MB/s: contexts are as long as memory allows",
        ),
        Rule(profile, "long", lambda i: True, *paged, f"{whose} does not fit the share of memory"),
    )  # fmt: skip


RULES: tuple[Rule, ...] = (
    *_resident_or_paged("balanced", FEW, f"the whole context of {FEW} requests (of one, where one rides)"),
    *_resident_or_paged("latency", 1, "the whole context of one request"),
    Rule(
        "capacity", "fits", lambda i: not i.persistent and 2 * i.context_nbytes * i.requests <= i.share_nbytes,
        "resident", ("quantized-cold-tier", "paged"), "the whole contexts of all requests fit half the share of memory",
    ),
    Rule(
        "capacity", "tight-drive", lambda i: not i.persistent and i.tight_drive,
        "resident", ("quantized-cold-tier", "paged"), "the drive has less room than memory",
    ),
    Rule("capacity", "long", lambda i: True, "quantized-cold-tier", ("paged", "resident"), "as much history as possible: int8 on disk"),
    Rule(
        "bounded-window", "window", lambda i: True, "sliding-window-ring-buffer", ("paged", "resident"),
        "the last tokens alone are kept; as many as fit, for two requests, where the window was not given",
    ),
)  # fmt: skip
"""The first that holds for its profile is taken. What cannot outlive the runtime is no fallback for what is to."""


def select(profile: str, inputs: Inputs) -> Selection:
    """The strategy for `inputs`, by the rules of `profile`, the last of which always holds."""
    rule = next(rule for rule in RULES if rule.profile == profile and rule.holds(inputs))
    fallbacks = tuple(name for name in rule.fallbacks if not inputs.persistent or PRESETS[name].layout is not None)
    return Selection(profile, rule.id, rule.text, inputs, rule.choice, fallbacks, _window(inputs))


def _window(inputs: Inputs) -> int:
    """Tokens of a window: what was asked for, or what `FEW` requests have room for, in whole blocks."""
    if inputs.window_tokens is not None:
        return inputs.window_tokens
    tokens = inputs.share_nbytes // max(inputs.kv_nbytes_per_token, 1) // min(inputs.requests, FEW)
    return max(min(tokens // BLOCK * BLOCK or tokens, inputs.context_tokens), 1)
