"""Adaptation: what the run so far says of where keys and values are kept, and a move to where they are kept better.

A recommendation is a table of rules over signals that were measured since the last decision. Carrying one out waits until nobody
rides; what moves goes on with the same tokens. It refuses to know how a cache moves.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any

import anyio

from .disk.base import Disk
from .engine import Engine
from .errors import AollmError
from .kv import cache_state
from .passes import writes
from .request import Request
from .runtime_plan import RuntimePlan, moved
from .settings import RuntimeConfig
from .stores.cache import Cache
from .stores.home import Home
from .stores.moving import move
from .stores.presets import PRESETS
from .trace import Trace

WAITS = 2
"""Requests that wait for room before it is too little: one may have come at a bad moment."""
QUIET = 8
"""Requests after which it is known that a disk is not needed."""
LOST = 3
"""Blocks that could not be had before a drive is not trusted."""
STALLED = 0.5
"""The part of the passes' time that attention waits for stored blocks, above which there are too many bytes of them."""
KEPT = 16
"""Moves that are told of: the newest."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What was measured since the last decision, and where the cache is."""

    strategy: str
    profile: str
    persistent: bool
    served: int = 0
    """Requests that have ridden."""
    waited: int = 0
    """Requests that had to wait until there was room for their keys and values."""
    refused: int = 0
    """Requests that would never have had it."""
    displaced: int = 0
    """Conversations whose keys and values were given up to make room."""
    most_tokens: int = 0
    """What riders could come to at once, with what conversations kept."""
    kv_tokens: int = 0
    """What memory has room for."""
    resident_tokens: int = 0
    """What is in memory now."""
    dropped_blocks: int = 0
    """Blocks that left memory because others needed their room."""
    spilled_tokens: int = 0
    spilled_nbytes: int = 0
    stall_share: float = 0.0
    """The part of the passes' time in which attention waited for stored blocks."""
    misses: int = 0
    """Blocks that were damaged, or could not be read."""
    trouble: str | None = None
    """Why the store could not be written."""

    @property
    def on_disk(self) -> bool:
        """Whether there is a store that its history could leave, or go on in."""
        return PRESETS[self.strategy].layout is not None and not PRESETS[self.strategy].windowed

    @property
    def crowded(self) -> bool:
        """Whether memory was too little for those who came."""
        return not self.on_disk and not PRESETS[self.strategy].windowed and bool(self.refused or self.displaced or self.waited >= WAITS)

    def fits(self, part: float = 1.0) -> bool:
        """Whether all that was asked for would fit in that part of the memory, without a disk."""
        return not self.persistent and self.most_tokens <= self.kv_tokens * part


@dataclass(frozen=True, slots=True)
class Rule:
    """When it holds, `choice` would be better, for `reason`."""

    id: str
    holds: Callable[[Signals], bool]
    choice: str
    reason: str


RULES: tuple[Rule, ...] = (
    Rule(
        "memory.crowded.capacity", lambda seen: seen.crowded and seen.profile == "capacity", "quantized-cold-tier",
        "requests waited for room in memory, were refused, or had conversations given up",
    ),
    Rule(
        "memory.crowded", lambda seen: seen.crowded, "paged",
        "requests waited for room in memory, were refused, or had conversations given up",
    ),
    Rule(
        "disk.trouble", lambda seen: seen.on_disk and seen.trouble is not None and seen.fits(), "resident",
        "the store cannot be written, and all that was asked for fits in memory",
    ),
    Rule(
        "disk.lost", lambda seen: seen.on_disk and seen.misses >= LOST and seen.fits(), "resident",
        "stored blocks could not be had again, and all that was asked for fits in memory",
    ),
    Rule(
        "disk.unused", lambda seen: seen.on_disk and seen.served >= QUIET and not seen.dropped_blocks and seen.fits(0.5), "resident",
        f"nothing has left memory in {QUIET} requests or more, and what they came to fits in half of it",
    ),
    Rule(
        "disk.stalled",
        lambda seen: seen.on_disk and seen.profile == "capacity" and seen.stall_share > STALLED and _exact(seen),
        "quantized-cold-tier", "attention waits for stored blocks most of the time; as int8 they are half as many bytes",
    ),
)  # fmt: skip
"""The first that holds is the recommendation. What changes the answers is recommended to the profile `capacity` alone."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """A strategy that would be better, and why."""

    strategy: str
    rule: str
    reason: str
    signals: Signals


@dataclass(frozen=True, slots=True)
class Applied:
    """A recommendation that was carried out, or why it could not be."""

    rule: str
    source: str
    strategy: str
    reason: str
    seconds: float
    cut_off_tokens: int = 0
    """Tokens of conversations that could not come along: the next turn computes them again."""
    observed: str | None = None
    """What was seen of the new store."""
    failed: str | None = None


def recommend(signals: Signals) -> Recommendation | None:
    """What `signals` speak for, if it is anything else than what there is."""
    rule = next((rule for rule in RULES if rule.holds(signals)), None)
    return None if rule is None else Recommendation(rule.choice, rule.id, rule.reason, signals)


class Adaptation:
    """Watches `engine` and `cache`, and moves the cache where it may. `config` names the strategy in force.

    `open_home` makes a home for a configuration; a pass has `least_rows` rows in any case.
    """

    def __init__(
        self, config: RuntimeConfig, plan: RuntimePlan, engine: Engine, cache: Cache, disk: Disk, trace: Trace,
        open_home: Callable[[RuntimeConfig], Awaitable[Home]], least_rows: int,
    ) -> None:  # fmt: skip
        self.config = config
        self.applied: tuple[Applied, ...] = ()
        self.plan = plan
        """As it is carried out at this moment."""
        self._engine, self._cache, self._disk, self._trace = engine, cache, disk, trace
        self._open_home, self._least_rows = open_home, least_rows
        self._looked = -1, -1
        self._begin()

    def signals(self) -> Signals:
        """What was measured since the last decision."""
        cache, now = self._cache, self._counts()
        served, waited, refused, displaced, dropped, spilled_tokens, spilled_nbytes, misses = (
            count - before for count, before in zip(now, self._before, strict=True)
        )
        writer = cache.writer
        trouble = (writer.failure or writer.trouble) if writer is not None else None
        return Signals(
            self.config.kv_cache_strategy, self.config.strategy_selector_profile, cache.lifecycle.persistent,
            served, waited, refused, displaced, self._engine.most_tokens, self.plan.kv_tokens,
            cache.pool.all_rows // max(cache.pool.layers, 1), dropped, spilled_tokens, spilled_nbytes, self._stall_share(), misses,
            str(trouble) if trouble is not None else None,
        )  # fmt: skip

    def note(self, request: Request) -> None:
        """A request is over: its cache state is that of now, before it gives back what it held."""
        request.cache_state = self.state()

    async def between(self) -> None:
        """Nobody rides: carry out what is recommended, if that was asked for. Errors are told of, and nothing has changed then."""
        seen = self._engine.served, self._engine.refused
        if self.config.kv_cache_adaptation_mode != "automatic" or seen == self._looked:
            await anyio.lowlevel.checkpoint()
            return
        self._looked = seen
        if (found := recommend(self.signals())) is not None:
            self.applied = (*self.applied[1 - KEPT :], await self._carry_out(found))
            self._begin()

    def state(self) -> dict[str, Any]:
        """`cache_state`, with what is recommended and what was done."""
        found = cache_state(self.config, self._cache)
        found |= {"kv_cache_strategy": self.config.kv_cache_strategy, "cache_mode": self.plan.cache_mode}
        found["adaptation"] = None
        if self.config.kv_cache_adaptation_mode != "disabled":
            signals = self.signals()
            better = recommend(signals)
            found["adaptation"] = {
                "mode": self.config.kv_cache_adaptation_mode,
                "recommendation": None if better is None else better.strategy,
                "rule": None if better is None else better.rule,
                "reason": None if better is None else better.reason,
                "signals": asdict(signals),
                "applied": [asdict(applied) for applied in self.applied],
            }
        return found

    async def _carry_out(self, found: Recommendation) -> Applied:
        start, source = perf_counter(), self.config.kv_cache_strategy
        done = Applied(found.rule, source, found.strategy, found.reason, 0.0)
        if found.signals.persistent:
            told = f"what outlives the runtime stays where it is; open the next one with kv_cache_strategy={found.strategy}"
            return replace(done, failed=told)
        config = self.config.model_copy(update={"kv_cache_strategy": found.strategy})
        try:
            home = await self._open_home(config)
            try:
                root = config.cache_dir / PRESETS[found.strategy].root
                observed = await writes(home.records, root, self._disk) if home.records is not None else None
                cut_off, trouble = await move(self._cache, home)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await home.aclose()
                raise
        except AollmError as error:
            return replace(done, failed=str(error), seconds=perf_counter() - start)
        self.config = config
        self._engine.limits = replace(self._engine.limits, rows=max(home.most_rows, self._least_rows))
        self.plan = moved(self.plan, found.strategy, self._engine.limits.rows, observed)
        seen = observed if trouble is None else f"what was left could not be removed: {trouble}"
        return replace(done, seconds=perf_counter() - start, cut_off_tokens=cut_off, observed=seen)

    def _begin(self) -> None:
        """From now on signals are of what comes."""
        self._before, self._since = self._counts(), perf_counter()
        self._engine.most_tokens = 0

    def _counts(self) -> tuple[int, ...]:
        engine, cache = self._engine, self._cache
        done = cache.tallies()
        return (
            engine.served, engine.waited, engine.refused, cache.displaced, cache.memory.dropped,
            sum(tally.spilled_tokens for tally in done), sum(tally.written_nbytes for tally in done),
            sum(tally.corrupt + tally.unreadable for tally in done),
        )  # fmt: skip

    def _stall_share(self) -> float:
        """Of the time that passes took since then, as far as the trace remembers."""
        if self._cache.records is None:
            return 0.0
        stalled = whole = 0.0
        for event in self._trace.between(self._since, perf_counter()):
            if event.name in ("compute", "stall"):
                whole += event.end - event.start
                stalled += event.end - event.start if event.label == WAITING else 0.0
        return stalled / whole if whole else 0.0

    def __repr__(self) -> str:
        return f"<Adaptation {self.config.kv_cache_adaptation_mode}, {self.config.kv_cache_strategy}, {len(self.applied)} moves>"


WAITING = "gather"
"""The label of stalls in which a pass waits for stored blocks."""


def _exact(signals: Signals) -> bool:
    return not PRESETS[signals.strategy].codec.representation
