"""How near does a run come to what its drive and its processor allow, and what stands between?

Each round holds a run of requests between two probes of the drive. The bound of a pass is the longer of reading its bytes
at the drive's own speed and of its computations; the fraction of it that is reached is the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import anyio.to_thread

from ..errors import ModelError
from ..reference import find
from ..runtime import Runtime
from ..runtime_plan import RuntimePlan
from ..settings import RuntimeConfig
from .drive import Drive
from .figures import lateness_ms
from .interval import Interval, interval_of
from .machine import machine_card
from .measure import Round, random_prompts, run_round, settle
from .process import peak_rss_nbytes
from .scratch import Scratch

SUMMED_UP = (
    "seconds_per_pass", "bytes_per_pass", "drive_bytes_per_second", "disk_seconds_per_pass", "compute_seconds_per_pass",
    "bound_seconds_per_pass", "fraction_of_bound", "stall_share", "other_share", "tokens_per_second", "io_cpu_share",
    "first_token_seconds", "first_token_bound_seconds",
)  # fmt: skip
"""Figures of which the result is the median of all rounds."""
WORK = ("requests", "tokens", "rounds", "prompt_tokens", "seed")
SETTINGS = (
    "memory", "device", "backend", "kv_cache_strategy", "kv_cache_window_tokens", "strategy_selector_profile", "kv_cache_lifecycle",
    "offload_cpu_layers", "offload_cpu_policy", "offload_gpu_layers", "disk_backend", "prefetch_depth",
)  # fmt: skip
"""Those of the runtime that a result tells."""
PLANNED = (
    "device", "backend", "kv_cache_strategy", "weights_nbytes", "pinned_nbytes", "streamed_nbytes_per_pass", "ring_nbytes",
    "max_rows", "chunk_rows", "disk_backend", "disk_reason",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What is run: `rounds` times `requests` prompts of `prompt_tokens` random tokens, each continued by `tokens`; the runtime's
    `settings` are those that were given, and the others as they are configured."""

    model: str
    memory: str | None = None
    requests: int = 1
    tokens: int = 8
    rounds: int = 3
    prompt_tokens: int = 32
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name, without the folders that it lies in."""
        return Path(self.model).name

    @property
    def disk_backend(self) -> str:
        """What reads, in the drive's probes too."""
        return self.config.disk_backend

    @property
    def config(self) -> RuntimeConfig:
        """How the runtime is opened; `ConfigError` for a value that it does not take."""
        fields = {name: value for name, value in {"memory": self.memory, **self.settings}.items() if value is not None}
        context = self.prompt_tokens + self.tokens + 1
        return RuntimeConfig.of(self.model, {**fields, "max_context_tokens": context, "max_concurrent_requests": self.requests})


class Overlap:
    """Call `run`; `result` tells the rounds that are measured, which may be fewer when `run` was interrupted."""

    def __init__(self, work: Work, say: Callable[[str], None]) -> None:
        """`say` is told of each round. Raises `ConfigError`."""
        self._work, self._say, self._config = work, say, work.config
        self.rounds: list[Round] = []
        self._probes: list[float] = []
        self._plan: RuntimePlan
        self._lanes: Interval

    async def run(self) -> None:
        """Measure. Raises what `Runtime.open` and `Runtime.stream` do, `ModelError` for a model that no native passes run, and
        `StoreError` where no cache can be made."""
        work, config = self._work, self._config
        folder = await find(config.model_reference, config.models_dir)
        drive = Drive(folder, config.disk_backend)
        await drive.probe()
        with await anyio.to_thread.run_sync(Scratch, config.cache_dir) as scratch:
            async with Runtime.open(config.model_copy(update={"cache_dir": scratch})) as runtime:
                self._plan = plan = runtime.plan
                if plan.backend != "optimized-native":
                    raise ModelError(f"{work.name} runs on {plan.backend}, which tells nothing of passes that read: no overlap to measure")
                self._say(f"{runtime!r}")
                await settle()
                self._probes.append(await drive.probe())
                for number in range(work.rounds):
                    prompts = random_prompts(runtime, plan.vocabulary, work.requests, work.prompt_tokens, f"{work.seed}-{number}")
                    measured = await run_round(runtime, prompts, work.tokens)
                    last = measured.decode[-1]
                    lanes = interval_of(runtime.trace.between(last.start, last.end), last.start, last.end)
                    self._probes.append(await drive.probe())
                    self._lanes = lanes
                    self.rounds.append(measured)
                    told = f"{measured.seconds_per_pass:.3f} s a pass, the drive alone reads {median(self._probes[-2:]) / 1e9:.2f} GB/s"
                    self._say(f"round {number + 1} of {work.rounds}: {told}")

    def result(self) -> tuple[dict[str, Any], Interval]:
        """What is measured, and the lanes of the last pass; for when there is at least one round."""
        work, config, plan, rounds = self._work, self._config, self._plan, self.rounds
        by_round = [figures(measured, median(self._probes[at : at + 2])) for at, measured in enumerate(rounds)]
        last = by_round[-1]
        speed, fraction = last["drive_bytes_per_second"], last["bound_seconds_per_pass"] / rounds[-1].decode[-1].seconds
        summed_up = {name: _median(each[name] for each in by_round) for name in SUMMED_UP}
        disk_s, compute_s = (median(each[f"{what}_seconds_per_pass"] for each in by_round) for what in ("disk", "compute"))
        result = {
            "bench": "overlap", "model": work.name, **{name: getattr(work, name) for name in WORK},
            **{name: getattr(config, name) for name in SETTINGS}, **summed_up,
            "loop_lateness_ms": lateness_ms([late_s for each in rounds for late_s in each.lateness_s]),
            "tokens_made": sum(each.tokens for each in rounds), "decode_passes": sum(len(each.decode) for each in rounds),
            "peak_rss_nbytes": peak_rss_nbytes(), "memory_nbytes": plan.memory,
            "plan": {name: getattr(plan, name) for name in PLANNED}, "interrupted": len(rounds) < work.rounds,
            "drive_probes": self._probes, "by_round": by_round,
            "lanes": self._lanes.lanes() | {"drive_bytes_per_second": speed, "fraction_of_bound": fraction}, "machine": machine_card(),
            "limiter": "disk" if disk_s >= compute_s else "compute",
        }  # fmt: skip
        return result, replace(self._lanes, model=work.name, drive_bytes_per_second=speed, fraction_of_bound=fraction)

    def __repr__(self) -> str:
        return f"<Overlap of {self._work.name}, {len(self.rounds)} rounds>"


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


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
