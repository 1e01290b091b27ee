"""The profiles: which lanes there are, and how long each may take. `quick` has one target, `full` everything besides."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..families import FAMILIES
from ..settings import BenchmarkConfig, RuntimeConfig
from ..stores.presets import PRESETS
from .lane import Lane
from .tinies import OWN, T5

PROBED = ("cold", "warm", "prompt-scaling", "output-scaling", "session-growth", "reopen-session-growth")
SECONDS = {"quick": 1.2, "full": 8.0}
"""For the requests of a lane beyond those that were asked for."""
LIMITS_S = {"quick": 45.0, "full": 240.0}
FURTHER_PROMPT, FURTHER_OUTPUT = (1024, 2048), (256, 512)
"""Lengths that the full profile has besides."""
SHARED = {
    "device": "--device", "memory": "--memory", "models_dir": "--models-dir", "kv_cache_lifecycle": "--kv-cache-lifecycle",
    "backend": "--probe-backend", "kv_cache_strategy": "--probe-kv-cache-strategy",
    "kv_cache_window_tokens": "--probe-kv-cache-window-tokens", "strategy_selector_profile": "--probe-strategy-selector-profile",
    "offload_cpu_layers": "--probe-offload-cpu-layers", "offload_cpu_policy": "--probe-offload-cpu-policy",
    "offload_gpu_layers": "--probe-offload-gpu-layers",
}  # fmt: skip
"""The runtime's settings that are handed on to a lane, and how."""
OVERLAP = {name: f"--{name.replace('_', '-')}" for name in SHARED}
"""The same ones, as `overlap` has them."""


def lanes_of(benchmark: BenchmarkConfig, config: RuntimeConfig, given: Mapping[str, Any]) -> list[Lane]:
    """The lanes of a profile, in their order. `given`: the runtime's settings that were typed."""
    profile, model = benchmark.profile, config.model_reference
    limit_s = LIMITS_S[profile]
    common = [*_flags(SHARED, given), *_work(benchmark), "--probe-seconds", str(SECONDS[profile])]

    def probe(name: str, mode: str, *more: str) -> Lane:
        return Lane(name, ("--probe-runtime", "--probe-mode", mode, "--model", model, *common, *more), limit_s)

    streamed = {} if config.offload_cpu_layers is not None else {"offload_cpu_layers": 0}  # what stays in memory overlaps nothing
    overlapped = _flags(OVERLAP, {**streamed, **given})
    rounds = ("--rounds", "1" if profile == "quick" else "3", "--tokens", "16")
    plain = ("--probe-runtime", "--probe-mode", "plan", *_work(benchmark), "--probe-seconds", str(SECONDS[profile]))
    lanes = [
        probe("plan", "plan"),
        Lane("plan-unspecialized", (*plain, "--probe-tiny", T5), limit_s),
        *(probe(mode, mode) for mode in PROBED),
        Lane("overlap", ("overlap", model, *rounds, *overlapped), limit_s),
    ]
    if profile == "quick":
        return lanes
    lanes.append(Lane("overlap-8", ("overlap", model, *rounds, "--requests", "8", *overlapped), limit_s))
    lanes += [probe(f"cold-{number}", "cold") for number in (2, 3)]
    lanes += [
        probe(f"kv-{name}", "output-scaling", "--probe-kv-cache-strategy", name, *_window(name))
        for name in PRESETS
        if name != config.kv_cache_strategy
    ]
    lanes += [
        Lane(f"family-{kind}", ("--probe-runtime", "--probe-mode", "warm", *_work(benchmark), "--probe-tiny", kind), limit_s)
        for kind in OWN
        if kind in FAMILIES
    ]
    return lanes + [
        Lane(f"model-{folder.name}", ("--probe-runtime", "--probe-mode", "warm", "--model", str(folder), *common), limit_s)
        for folder in _models(config.models_dir, model)
    ]


def scaled(benchmark: BenchmarkConfig) -> BenchmarkConfig:
    """With the lengths that the profile has besides those that are set."""
    if benchmark.profile == "quick":
        return benchmark
    longer = {
        "prompt_scale_tokens": tuple(sorted({*benchmark.prompt_scale_tokens, *FURTHER_PROMPT})),
        "output_scale_tokens": tuple(sorted({*benchmark.output_scale_tokens, *FURTHER_OUTPUT})),
    }
    return benchmark.model_copy(update=longer)


def _work(benchmark: BenchmarkConfig) -> list[str]:
    """How much of everything, as a lane is told."""
    return [
        "--probe-iterations", str(benchmark.iterations),
        "--prompt-scale-tokens", ",".join(map(str, benchmark.prompt_scale_tokens)),
        "--output-scale-tokens", ",".join(map(str, benchmark.output_scale_tokens)),
        "--session-turns", str(benchmark.session_turns), "--session-max-new-tokens", str(benchmark.session_max_new_tokens),
    ]  # fmt: skip


def _flags(names: Mapping[str, str], given: Mapping[str, Any]) -> list[str]:
    return [text for name, flag in names.items() if given.get(name) is not None for text in (flag, str(given[name]))]


def _window(strategy: str) -> tuple[str, ...]:
    return ("--probe-kv-cache-window-tokens", "1024") if PRESETS[strategy].windowed else ()


def _models(folder: Path | None, target: str) -> Iterator[Path]:
    """Folders of models in `folder`, which a run of all families takes besides the target."""
    if folder is None:
        return
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        if (path / "config.json").is_file() and os.path.realpath(path) != os.path.realpath(target):
            yield path
