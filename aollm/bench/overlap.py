"""How near does a run come to what its drive and its processor allow, and what stands between?

Each round holds a run of requests between two probes of the drive. The bound of a pass is the longer of reading its bytes
at the drive's own speed and of its computations; the fraction of it that is reached is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ..reference import find
from ..runtime import Runtime
from ..settings import RuntimeConfig
from .drive import Drive
from .interval import Interval, interval_of
from .machine import machine_card
from .measure import Round, random_prompts, run_round, settle
from .process import peak_rss_nbytes

SUMMED_UP = (
    "seconds_per_pass", "bytes_per_pass", "drive_bytes_per_second", "disk_seconds_per_pass", "compute_seconds_per_pass",
    "bound_seconds_per_pass", "fraction_of_bound", "stall_share", "other_share", "tokens_per_second", "io_cpu_share",
    "first_token_seconds", "first_token_bound_seconds",
)  # fmt: skip
"""Figures of which the result is the median of all rounds."""
PLANNED = (
    "weights_nbytes", "pinned_nbytes", "streamed_nbytes_per_pass", "ring_nbytes", "max_rows", "chunk_rows", "disk_backend", "disk_reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What is run: `rounds` times `requests` prompts of `prompt_tokens` random tokens, each continued by `tokens`."""

    model: str
    memory: str | None = None
    requests: int = 1
    tokens: int = 8
    rounds: int = 3
    prompt_tokens: int = 32
    disk_backend: str = "auto"
    prefetch_depth: int = 2
    offload_cpu_layers: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The model's name, without the folders that it lies in."""
        return Path(self.model).name

    @property
    def config(self) -> RuntimeConfig:
        """How the runtime is opened; `ConfigError` for a value that it does not take."""
        fields = {name: value for name, value in asdict(self).items() if name in RuntimeConfig.model_fields}
        context = self.prompt_tokens + self.tokens + 1
        return RuntimeConfig.of(self.model, {**fields, "max_context_tokens": context, "max_concurrent_requests": self.requests})


async def overlap(work: Work, say: Callable[[str], None]) -> tuple[dict[str, Any], Interval]:
    """Measure, and return the result and the lanes of the last pass. Raises what `Runtime.open` and `Runtime.stream` do."""
    config, folder = work.config, await find(work.model)
    drive = Drive(folder, work.disk_backend)
    await drive.probe()
    async with Runtime.open(config) as runtime:
        say(f"{runtime!r}")
        await settle()
        probes, rounds = [await drive.probe()], list[Round]()
        for number in range(work.rounds):
            prompts = random_prompts(runtime, runtime.plan.vocabulary, work.requests, work.prompt_tokens, f"{work.seed}-{number}")
            rounds.append(await run_round(runtime, prompts, work.tokens))
            probes.append(await drive.probe())
            told = f"{rounds[-1].seconds_per_pass:.3f} s a pass, the drive alone reads {median(probes[-2:]) / 1e9:.2f} GB/s"
            say(f"round {number + 1} of {work.rounds}: {told}")
        last = rounds[-1].decode[-1]
        lanes = interval_of(runtime.trace.between(last.start, last.end), last.start, last.end)
        by_round = [figures(measured, median(probes[at : at + 2])) for at, measured in enumerate(rounds)]
        result = {
            "bench": "overlap", **asdict(work), "model": work.name,
            **{name: _median(each[name] for each in by_round) for name in SUMMED_UP},
            "loop_lateness_ms": lateness_ms(rounds),
            "tokens_made": sum(each.tokens for each in rounds), "decode_passes": sum(len(each.decode) for each in rounds),
            "peak_rss_nbytes": peak_rss_nbytes(), "memory_nbytes": runtime.plan.memory,
            "plan": {name: getattr(runtime.plan, name) for name in PLANNED},
            "drive_probes": probes, "by_round": by_round, "lanes": lanes.lanes(), "machine": machine_card(),
        }  # fmt: skip
    result["limiter"] = "disk" if result["disk_seconds_per_pass"] >= result["compute_seconds_per_pass"] else "compute"
    last_round = by_round[-1]
    speed, fraction = last_round["drive_bytes_per_second"], last_round["bound_seconds_per_pass"] / last.seconds
    result["lanes"] |= {"drive_bytes_per_second": speed, "fraction_of_bound": fraction}
    return result, replace(lanes, model=work.name, drive_bytes_per_second=speed, fraction_of_bound=fraction)


def figures(measured: Round, drive_bytes_per_second: float) -> dict[str, Any]:
    """One round against the drive's speed in these minutes."""
    nbytes = median(each.nbytes for each in measured.decode)
    disk_s = nbytes / drive_bytes_per_second
    compute_s = median(each.compute_s for each in measured.decode)
    bound_s, pass_s = max(disk_s, compute_s), measured.seconds_per_pass
    return {
        "seconds_per_pass": pass_s, "bytes_per_pass": nbytes, "drive_bytes_per_second": drive_bytes_per_second,
        "disk_seconds_per_pass": disk_s, "compute_seconds_per_pass": compute_s, "bound_seconds_per_pass": bound_s,
        "fraction_of_bound": bound_s / pass_s,
        "stall_share": fmean(each.stall_s / each.seconds for each in measured.decode),
        "other_share": fmean(1 - (each.stall_s + each.compute_s) / each.seconds for each in measured.decode),
        "tokens_per_second": measured.tokens_per_second, "io_cpu_share": measured.io_cpu_share,
        "first_token_seconds": median(measured.first_token_s), "prefill_passes": len(measured.prefill),
        "first_token_bound_seconds": max(pass_s, sum(each.compute_s for each in measured.prefill)),
        "pass_seconds": [each.seconds for each in measured.decode], "pass_rows": [each.rows for each in measured.decode],
    }  # fmt: skip


def lateness_ms(rounds: Iterable[Round]) -> dict[str, float]:
    """How late the event loop's beats of 5 ms came."""
    late = sorted(late_s * 1e3 for each in rounds for late_s in each.lateness_s) or [0.0]
    return {"p50": median(late), "p99": late[int(0.99 * (len(late) - 1))], "max": late[-1], "beats": len(late)}


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
