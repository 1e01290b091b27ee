"""Settings: what a caller may say about a runtime and about one generation, checked once, here, by types.

Errors name the field and what is accepted. Inside, nothing is checked again.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .configuration import Said, section
from .errors import ConfigError, RequestError
from .sampling import Sampling
from .stores.presets import PRESETS
from .values import Device, File, Folder, Numbers, Size, Texts

MAX_ANSWERS = 16
"""Answers to one request."""
RIVALS = {"verbose": "quiet", "quiet": "verbose"}
"""What the caller says of one takes back what was configured of the other."""

Strategy = Literal[
    "auto", "resident", "chunked", "paged", "streamed-segmented", "log-structured-journal", "sliding-window-ring-buffer",
    "quantized-cold-tier", "tiered-write-back",
]  # fmt: skip


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aollm"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    section: ClassVar[str]
    """What these settings are called in `aollm.toml`, and between `AOLLM_` and `__` in the environment."""

    @classmethod
    def said(cls) -> dict[str, Said]:
        """What the environment and `aollm.toml` say of these settings, which holds where the caller says nothing else.

        Raises `ConfigError` for a file that cannot be read, an unknown name in any section, and text that cannot be taken.
        """
        known = {each.section: each.model_fields for each in (RuntimeConfig, GenerationConfig, BenchmarkConfig)}
        return section(cls.section, cls, {**known, "server": ()})

    @classmethod
    def given(cls, error: type[ConfigError | RequestError], values: Mapping[str, Any], said: Mapping[str, Said] | None = None) -> Self:
        """Check `values`, and what was `said` of others; raises `error` that names the field and what is accepted, `ConfigError`
        with the source as well if it was said there."""
        others = {name: each for name, each in (said or {}).items() if name not in values}
        try:
            return cls(**{name: each.value for name, each in others.items()}, **values)
        except ValidationError as invalid:
            problems = invalid.errors()
            if any(problem["loc"][0] in others for problem in problems if problem["loc"]):
                error = ConfigError
            raise error("; ".join(_told(cls, problem["loc"], problem["type"], problem["msg"], others) for problem in problems)) from None


class RuntimeConfig(_Settings):
    """How a model is run. `memory` bounds the whole process in bytes (or `"3GiB"`); None is what is free on the machine.

    A model of the Hub is downloaded into `models_dir`, None being huggingface_hub's own cache; what is whole there is not
    fetched again without `force_download`.
    `backend` names a tier, `auto` is the native one where it can, unless not `use_specialization`, else transformers'.
    `device` computes (`auto` is a CUDA device where there is one), with at most `device_memory` of its memory. `offload_gpu_layers`
    keeps just so many layers there, `offload_cpu_layers` so many in the host's memory, chosen by `offload_cpu_policy`; None keeps
    as much as fits.
    Without `multimodal` a model's towers for images or sound are left out, and memory is not set aside for them.
    `adapter_dir` is a LoRA adapter's folder, or one with such folders in it, or folders by name; requests choose by name.
    `expert_memory` bounds what experts may have of the memory, though four always have room; None is all that is left.
    `kv_cache_strategy` says where keys and values are kept (`auto`: as `strategy_selector_profile` chooses), `kv_cache_memory` how
    much of the memory they may have, `kv_cache_lifecycle` whether they outlive the runtime, in `cache_dir`, within
    `kv_cache_max_bytes` and `kv_cache_max_age_s`. `kv_cache_adaptation_mode`: whether another strategy is recommended, or taken,
    between requests. Without `use_cache` no prompt takes keys and values that were computed for another, nor a turn those of the
    turns before.
    `verbose` and `quiet`: how much commands say on stderr besides; a runtime itself says nothing.
    """

    section: ClassVar[str] = "runtime"

    model_reference: str
    backend: Literal["auto", "optimized-native", "transformers-generic"] = "auto"
    use_specialization: bool = True
    models_dir: Folder | None = None
    force_download: bool = False
    memory: Size | None = None
    device: Device = "auto"
    device_memory: Size | None = None
    max_context_tokens: int | None = Field(None, ge=1)
    max_concurrent_requests: int = Field(16, ge=1, le=4096)
    use_cache: bool = True
    kv_cache_strategy: Strategy = "auto"
    strategy_selector_profile: Literal["balanced", "latency", "capacity", "bounded-window"] = "balanced"
    kv_cache_adaptation_mode: Literal["disabled", "observe-only", "automatic"] = "observe-only"
    kv_cache_lifecycle: Literal["runtime-scoped", "persistent"] = "runtime-scoped"
    kv_cache_window_tokens: int | None = Field(None, ge=1)
    kv_cache_memory: Size | None = None
    expert_memory: Size | None = None
    multimodal: bool = True
    adapter_dir: Folder | dict[str, Folder] | None = None
    kv_cache_max_bytes: Size | None = None
    kv_cache_max_age_s: float | None = Field(None, gt=0)
    cache_dir: Folder = Field(default_factory=_cache_dir)
    disk_backend: Literal["auto", "threads", "uring", "gds", "portable"] = "auto"
    prefetch_depth: int = Field(2, ge=1, le=64)
    dense_projection_chunk_rows: int | None = Field(None, ge=1, le=16384)
    offload_cpu_layers: int | None = Field(None, ge=0)
    offload_cpu_policy: Literal["auto", "prefix", "suffix", "middle-band"] = "auto"
    offload_gpu_layers: int | None = Field(None, ge=0)
    verbose: bool = False
    quiet: bool = False

    @property
    def max_answers(self) -> int:
        """Answers that may be in the making at once: one a request, or one request's many."""
        return max(self.max_concurrent_requests, MAX_ANSWERS)

    @classmethod
    def of(cls, model: RuntimeConfig | str | Path | None, values: Mapping[str, Any]) -> RuntimeConfig:
        """A configuration from another one, or from a model's reference and what the environment and `aollm.toml` say (which may
        name the model too: None), changed by `values`. Raises `ConfigError`."""
        said: dict[str, Said] = {}
        if isinstance(model, RuntimeConfig):
            values = {**dict(model), **values}
        else:
            said = cls.said()
            if model is not None:
                values = {"model_reference": str(model), **values}
            if not {*values, *said} & {"model_reference"}:
                raise ConfigError(
                    "model_reference: name a model: a folder, an alias such as demo, or org/repo[@rev]; here, by "
                    "AOLLM_RUNTIME__MODEL_REFERENCE, or below [runtime] in aollm.toml"
                )
            for one, other in RIVALS.items():
                if values.get(one) is True and other not in values:  # the last word on how much is said
                    said.pop(other, None)
        config = cls.given(ConfigError, values, said)
        for names, message in _conflicts(config):
            sources = [f"{name} is from {said[name].source}" for name in names if name in said and name not in values]
            raise ConfigError(message + (f" ({', '.join(sources)})" if sources else ""))
        return config


def _conflicts(config: RuntimeConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """All pairs of settings that contradict each other: their names, and what to do."""
    strategy, persistent = config.kv_cache_strategy, config.kv_cache_lifecycle == "persistent"
    preset = PRESETS.get(strategy)  # none for auto, which chooses what goes with the others
    windowed, window = [name for name, other in PRESETS.items() if other.windowed], config.kv_cache_window_tokens is not None
    if config.backend == "optimized-native" and not config.use_specialization:
        yield (
            ("backend", "use_specialization"),
            "use_specialization: the backend optimized-native is the specialized one; leave out one of the two",
        )
    if preset is not None and preset.windowed != window:
        told = "the last tokens: say how many" if preset.windowed else f"the full history; a window is for {', '.join(windowed)}"
        yield ("kv_cache_window_tokens", "kv_cache_strategy"), f"kv_cache_window_tokens: {strategy} keeps {told}"
    if preset is None and window and config.strategy_selector_profile != "bounded-window":
        told = "auto keeps the full history unless strategy_selector_profile is bounded-window; a window is for that, or for "
        yield ("kv_cache_window_tokens", "strategy_selector_profile"), f"kv_cache_window_tokens: {told}{', '.join(windowed)}"
    if preset is not None and preset.layout is None and persistent:
        told = f"{strategy} keeps nothing between runs; choose a strategy that writes, such as paged"
        yield ("kv_cache_lifecycle", "kv_cache_strategy"), f"kv_cache_lifecycle: {told}"
    if persistent and not config.use_cache:
        told = "persistent is for using again what was computed before; leave out use_cache=False, or take runtime-scoped"
        yield ("use_cache", "kv_cache_lifecycle"), f"kv_cache_lifecycle: {told}"
    for name in ("kv_cache_max_bytes", "kv_cache_max_age_s"):
        if getattr(config, name) is not None and not persistent:
            told = "it bounds what is kept between runs, and runtime-scoped keeps nothing; take kv_cache_lifecycle=persistent"
            yield (name, "kv_cache_lifecycle"), f"{name}: {told}"
    for name in ("device_memory", "offload_gpu_layers"):
        if getattr(config, name) is not None and config.device == "cpu":
            yield (name, "device"), f"{name}: device=cpu uses no device's memory; leave out one of the two"
    if config.offload_cpu_policy != "auto" and config.offload_cpu_layers is None:
        told = "it says which layers offload_cpu_layers keeps, and that is not given: say how many, or leave it out"
        yield ("offload_cpu_policy", "offload_cpu_layers"), f"offload_cpu_policy: {told}"
    if config.verbose and config.quiet:
        yield ("verbose", "quiet"), "verbose: it is the contrary of quiet; leave out one of the two"


class GenerationConfig(_Settings):
    """How one answer is generated. Greedy unless `temperature` is positive; see `Sampling` for the filters.

    `context_shift`: what happens when the context is full. `stop` ends the answer; the others leave out the older half of
    what follows the first `keep_tokens` tokens, and turn the kept keys to their new positions or `prefill` them again.
    `adapter` names one of the runtime's adapters, None the model as it is.
    Prompts with different `cache_salt`s never share what is stored.
    Without `stream`, whoever prints or sends an answer (the command line) does so when it is whole. A `TokenStream` has no other
    use of it: its tokens come one by one in any case.
    """

    section: ClassVar[str] = "generation"

    max_new_tokens: int = Field(256, ge=1)
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int = 0
    n: int = Field(1, ge=1, le=MAX_ANSWERS)
    stream: bool = True
    context_shift: Literal["stop", "rotate", "prefill"] = "stop"
    keep_tokens: int = Field(4, ge=0)
    cache_salt: str = Field("", max_length=256)
    adapter: str | None = Field(None, max_length=256)
    stop: Texts = Field((), max_length=16)

    @classmethod
    def of(cls, base: GenerationConfig | None, values: Mapping[str, Any]) -> GenerationConfig:
        """`base`, or what the environment and `aollm.toml` say, changed by `values`; `stop` may be one string.

        Raises `RequestError` for what is wrong in `values`, `ConfigError` for what is wrong elsewhere.
        """
        if base is not None and not isinstance(base, GenerationConfig):
            raise RequestError(f"a generation is a GenerationConfig, not {type(base).__name__}; give single settings by their names")
        if base is not None:
            return cls.given(RequestError, {**dict(base), **values})
        said = cls.said()
        config = cls.given(RequestError, values, said)
        if said.keys() - values.keys():
            told = {name: each.value for name, each in said.items() if name in Sampling.__dataclass_fields__}
            try:
                Sampling(**told)
            except RequestError as error:
                raise ConfigError(f"{error} (from {said[str(error).partition('=')[0]].source})") from None
        return config

    @property
    def sampling(self) -> Sampling:
        """The part that the sampler reads; it checks its own ranges."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed, self.logprobs)


class BenchmarkConfig(_Settings):
    """What `python -m aollm.bench` measures, and what becomes of the results.

    The profile `quick` has one target and tight budgets, `full` families, scaling and sessions too. Each measurement is repeated
    `iterations` times; prompts have `prompt_scale_tokens` and answers `output_scale_tokens` tokens, one lane after the other; a
    session has `session_turns` of `session_max_new_tokens`. Results are compared with those of runs like it in `history_dir`, and
    kept there if `record_history`; `history_codebase_label` says whose they are (None: the address of `origin`), and a regression
    is an exit code under `fail_on_regression`. `output` is a file for the JSON besides stdout.
    """

    section: ClassVar[str] = "benchmark"

    profile: Literal["quick", "full"] = "quick"
    iterations: int = Field(3, ge=1, le=1000)
    prompt_scale_tokens: Numbers = Field((32, 128, 512), min_length=1, max_length=16)
    output_scale_tokens: Numbers = Field((16, 64, 128), min_length=1, max_length=16)
    session_turns: int = Field(3, ge=1, le=1000)
    session_max_new_tokens: int = Field(32, ge=1)
    history_dir: Folder = Path(".aollm/benchmark-history")
    record_history: bool = True
    history_codebase_label: str | None = Field(None, min_length=1, max_length=1024)
    fail_on_regression: bool = False
    output: File | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> BenchmarkConfig:
        """What the environment and `aollm.toml` say, changed by `values`. Raises `ConfigError`."""
        return cls.given(ConfigError, values, cls.said())


def _told(cls: type[BaseModel], where: tuple[int | str, ...], kind: str, message: str, said: Mapping[str, Said]) -> str:
    name = str(where[0]) if where else cls.__name__
    source = f" (from {said[name].source})" if name in said else ""
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, cls.model_fields, 1)
        return f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(cls.model_fields)}")
    return f"{name}: {message.removeprefix('Value error, ').removeprefix('Input ')}{source}"
