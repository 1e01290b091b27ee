"""Settings: what a caller may say about a runtime and about one generation, checked once, here, by types.

Errors name the field and what is accepted. Inside, nothing is checked again.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .errors import ConfigError, RequestError
from .sampling import Sampling
from .stores.presets import PRESETS

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def nbytes(value: object) -> int:
    """Bytes from a whole number or a text such as `"3GiB"` or `"800 MB"`; `ValueError` says what is accepted."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([a-z]*)\s*", str(value).lower())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f"a size such as '3GiB', '800MB' or a positive number of bytes, not {value!r}")
    return int(float(found[1]) * UNITS[found[2]])


MAX_ANSWERS = 16
"""Answers to one request."""

Size = Annotated[int, BeforeValidator(nbytes)]


Strategy = Literal[
    "auto", "resident", "chunked", "paged", "streamed-segmented", "log-structured-journal", "sliding-window-ring-buffer",
    "quantized-cold-tier", "tiered-write-back",
]  # fmt: skip


def _path(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"the path of a folder, not {value!r}")
    return Path(os.path.abspath(os.path.expanduser(value)))


def _device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise ValueError(f"auto, cpu, cuda or cuda:N, not {value!r}")
    return value


def _cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aollm"


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def given(cls, error: type[ConfigError] | type[RequestError], values: dict[str, Any]) -> Self:
        """Check `values`; raises `error` that names the field and what is accepted."""
        try:
            return cls(**values)
        except ValidationError as invalid:
            raise error("; ".join(_told(cls, problem["loc"], problem["type"], problem["msg"]) for problem in invalid.errors())) from None


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
    between requests. Without `use_cache` no prompt takes anything from what was computed for another.
    `verbose` and `quiet`: how much is said on stderr besides.
    """

    model_reference: str
    backend: Literal["auto", "optimized-native", "transformers-generic"] = "auto"
    use_specialization: bool = True
    models_dir: Annotated[Path, BeforeValidator(_path)] | None = None
    force_download: bool = False
    memory: Size | None = None
    device: Annotated[str, BeforeValidator(_device)] = "auto"
    device_memory: Size | None = None
    max_context_tokens: int | None = Field(None, ge=1)
    max_concurrent_requests: int = Field(16, ge=1, le=4096)
    use_cache: bool = True
    kv_cache_strategy: Strategy = "resident"
    strategy_selector_profile: Literal["balanced", "latency", "capacity", "bounded-window"] = "balanced"
    kv_cache_adaptation_mode: Literal["disabled", "observe-only", "automatic"] = "observe-only"
    kv_cache_lifecycle: Literal["runtime-scoped", "persistent"] = "runtime-scoped"
    kv_cache_window_tokens: int | None = Field(None, ge=1)
    kv_cache_memory: Size | None = None
    expert_memory: Size | None = None
    multimodal: bool = True
    adapter_dir: Annotated[Path, BeforeValidator(_path)] | dict[str, Annotated[Path, BeforeValidator(_path)]] | None = None
    kv_cache_max_bytes: Size | None = None
    kv_cache_max_age_s: float | None = Field(None, gt=0)
    cache_dir: Annotated[Path, BeforeValidator(_path)] = Field(default_factory=_cache_dir)
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
    def of(cls, model: RuntimeConfig | str | Path, values: dict[str, Any]) -> RuntimeConfig:
        """A configuration from a model's reference, or from another configuration, changed by `values`."""
        base = dict(model) if isinstance(model, RuntimeConfig) else {"model_reference": str(model)}
        config = cls.given(ConfigError, {**base, **values})
        preset = PRESETS[config.kv_cache_strategy]
        if config.backend == "optimized-native" and not config.use_specialization:
            raise ConfigError("use_specialization: the backend optimized-native is the specialized one; leave out one of the two")
        if preset.windowed != (config.kv_cache_window_tokens is not None):
            names = ", ".join(name for name, other in PRESETS.items() if other.windowed)
            raise ConfigError(
                f"kv_cache_window_tokens: {config.kv_cache_strategy} keeps "
                + ("the last tokens: say how many" if preset.windowed else f"the full history; a window is for {names}")
            )
        if preset.layout is None and config.kv_cache_lifecycle == "persistent":
            raise ConfigError("kv_cache_lifecycle: resident keeps nothing between runs; choose a strategy that writes, such as paged")
        return config


class GenerationConfig(_Settings):
    """How one answer is generated. Greedy unless `temperature` is positive; see `Sampling` for the filters.

    `context_shift`: what happens when the context is full. `stop` ends the answer; the others leave out the older half of
    what follows the first `keep_tokens` tokens, and turn the kept keys to their new positions or `prefill` them again.
    `adapter` names one of the runtime's adapters, None the model as it is.
    Prompts with different `cache_salt`s never share what is stored.
    """

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
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1024)], ...] = Field((), max_length=16)

    @classmethod
    def of(cls, base: GenerationConfig | None, values: dict[str, Any]) -> GenerationConfig:
        """`base` changed by `values`; `stop` may be one string."""
        if base is not None and not isinstance(base, GenerationConfig):
            raise RequestError(f"a generation is a GenerationConfig, not {type(base).__name__}; give single settings by their names")
        merged = {**(dict(base) if base is not None else {}), **values}
        stop = merged.get("stop", ())
        merged["stop"] = (stop,) if isinstance(stop, str) else () if stop is None else tuple(stop) if isinstance(stop, list) else stop
        return cls.given(RequestError, merged)

    @property
    def sampling(self) -> Sampling:
        """The part that the sampler reads; it checks its own ranges."""
        return Sampling(self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed, self.logprobs)


def _told(cls: type[BaseModel], where: tuple[int | str, ...], kind: str, message: str) -> str:
    name = str(where[0]) if where else cls.__name__
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(name, cls.model_fields, 1)
        return f"{name} is not a setting" + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(cls.model_fields)}")
    return f"{name}: {message.removeprefix('Value error, ').removeprefix('Input ')}"
