"""An account of what was planned, opened and finished: lines on stderr for who asked for them by `verbose`."""

from __future__ import annotations

from time import perf_counter

from ..buffers import size
from ..meter import amount, count, memory, rate
from ..runtime import Runtime
from ..terminal import Terminal


class Account:
    """Of one runtime, which is about to be opened. Without `verbose` it says nothing."""

    def __init__(self, terminal: Terminal, runtime: Runtime) -> None:
        self._terminal, self._runtime = terminal, runtime
        self._start = perf_counter()

    def opened(self) -> None:
        """How the model is run, what reads it, and what was seen to hold."""
        runtime, plan = self._runtime, self._runtime.plan
        self._say(
            f"planned: {plan.backend}, {plan.family} in {plan.dtype}",
            f"{len(plan.pinned)} of {count(len(plan.pieces), 'piece')} in memory, {amount(plan.streamed_nbytes_per_pass)} read a pass",
            f"KV {plan.kv_cache_strategy}",
            f"{size(sum(plan.ledger.values()))} of {size(plan.memory)} set aside",
        )
        if plan.specialization_reason is not None:
            self._say(f"{plan.specialization_state}: {plan.specialization_reason}")
        drive = runtime.drive_bytes_per_second
        seen = ", ".join(one.id for one in plan.passes if one.observed is not None)
        self._say(
            f"opened in {perf_counter() - self._start:.1f} s",
            f"read by {plan.disk_backend}" + (f" at {rate(drive)}" if drive is not None else "") + f" ({plan.disk_reason})",
            *([f"seen to hold: {seen}"] if seen else []),
        )

    def finished(self) -> None:
        """What it took, from before the runtime was opened until now."""
        seconds, passes = perf_counter() - self._start, self._runtime.engine.passes
        self._say(f"finished after {seconds:.1f} s", f"passes: {passes}", memory(self._runtime))

    def _say(self, *parts: str) -> None:
        if self._runtime.config.verbose:
            self._terminal.say([(" · ".join(parts), "dim")])
