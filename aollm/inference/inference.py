"""Inference as in oLLM: an object that is told which model, where and with what, and opens a runtime when it is first asked.

What is set later takes effect too: the runtime is opened anew. It refuses to know how anything is done.
"""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import anyio.from_thread
import torch

from ..client import RuntimeClient
from ..errors import ConfigError, ModelError, RequestError
from ..families import FAMILIES
from ..meter import amount
from ..reference import find
from ..settings import RuntimeConfig
from ..text import read_json
from .generator import Generator

ADAPTER = "default"
PARTS = ("tokenizer", "processor")
"""What is loaded once, for one model."""
KEPT = ("offload_gpu_layers", "offload_cpu_layers")
"""How many layers stay in whose memory."""
FOREIGN = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError)
"""What transformers raises for a tokenizer or a processor that it cannot load."""


@dataclass(frozen=True, slots=True)
class DiskCache:
    """Where keys and values are kept, for `generate(past_key_values=...)`: a preset, in a folder, for `cache_lifecycle`."""

    cache_dir: str | Path = "./kv_cache"
    cache_strategy: str = "paged"
    cache_lifecycle: str = "runtime-scoped"
    cache_window_tokens: int | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The runtime's settings."""
        window = {} if self.cache_window_tokens is None else {"kv_cache_window_tokens": self.cache_window_tokens}
        where = {"cache_dir": self.cache_dir, "kv_cache_strategy": self.cache_strategy}
        return {**where, "kv_cache_lifecycle": self.cache_lifecycle, **window}


Kept = DiskCache  # a method of `Inference` has oLLM's name for it


class Inference:
    """A model by its name, asked as in oLLM; `fields` are those of `RuntimeConfig` besides, such as `memory`.

    o = Inference("llama3-1B-chat", device="cpu", logging=False)
    o.ini_model(models_dir="./models/")
    input_ids = o.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(o.device)
    output_ids = o.model.generate(input_ids=input_ids, past_key_values=o.DiskCache("./kv_cache/"), max_new_tokens=20)

    A `device` that is not here gives a warning, and the CPU is used. Raises `ConfigError` for a device that cannot be.
    """

    def __init__(
        self, model_id: str, device: str | torch.device = "cuda:0", logging: bool = True, multimodality: bool = False, **fields: Any
    ) -> None:  # fmt: skip
        self.model_id = model_id
        self.device = usable(device)
        self.multimodality = multimodality
        self.logging = logging
        self._adapter: str | None = None
        self._folder: Path | None = None
        self._lock = threading.Lock()
        self._client: RuntimeClient | None = None
        self._fields: dict[str, Any] = {}
        self._kept: dict[str, int | None] = {name: fields.get(name) for name in KEPT}
        self._opened: dict[str, Any] = {}
        self._set(device=str(self.device), multimodal=multimodality, **fields)

    def ini_model(self, models_dir: str | Path = "./models/", force_download: bool = False) -> None:
        """Find the model: in the folder `models_dir/model_id`, else as everywhere (`aollm run --help`), downloading into `models_dir`.

        No weights are read. Raises `ModelError`.
        """
        own = Path(models_dir, self.model_id)
        reference = str(own) if (own / "config.json").is_file() and not force_download else self.model_id
        self._found(reference, Path(models_dir), force_download)

    @property
    def folder(self) -> Path:
        """Where the model is. Raises `RequestError` before `ini_model`."""
        if self._folder is None:
            raise RequestError("there is no model yet: call ini_model(models_dir=...) first")
        return self._folder

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer of this model; its `apply_chat_template` gives ids, not a dict, unless told `return_dict=True`."""
        from transformers import AutoTokenizer

        found = self._transformers(AutoTokenizer, "tokenizer")
        # oLLM's scripts were written when that was what transformers gave; what they do next needs a tensor
        found.apply_chat_template = functools.partial(found.apply_chat_template, return_dict=False)
        return found

    @cached_property
    def processor(self) -> Any:
        """transformers' processor of a model that takes images or sound."""
        from transformers import AutoProcessor

        return self._transformers(AutoProcessor, "processor")

    @property
    def model(self) -> Generator:
        """What generates."""
        return Generator(self.folder, self.device, self.client, self._adapter, self.logging)

    def offload_layers_to_cpu(self, layers_num: int = 2, policy: str = "auto") -> None:
        """Keep just so many layers in the host's memory, chosen by `policy` (see `RuntimeConfig`); without it, as many as fit."""
        self._keep(offload_cpu_policy=policy, offload_cpu_layers=layers_num)

    def offload_layers_to_gpu(self, layers_num: int = 2) -> None:
        """Keep just so many layers in the device's memory; where the CPU computes, in the host's beside those that are for it."""
        self._keep(offload_gpu_layers=layers_num)

    def offload_layers_to_gpu_cpu(self, gpu_layers_num: int | None = None, cpu_layers_num: int | None = None) -> None:
        """Both at once; what is not given stays as it was."""
        given = zip(KEPT, (gpu_layers_num, cpu_layers_num), strict=True)
        self._keep(**{name: count for name, count in given if count is not None})

    def DiskCache(
        self, cache_dir: str | Path = "./kv_cache", cache_strategy: str = "paged", cache_lifecycle: str = "runtime-scoped",
        cache_window_tokens: int | None = None,
    ) -> Kept | None:  # fmt: skip
        """What `generate` takes as `past_key_values`: keys and values on disk, by a preset of `RuntimeConfig.kv_cache_strategy`.

        None, with a warning, for a model that runs through transformers, which keeps them in memory. Raises `ConfigError`.
        """
        cache = DiskCache(cache_dir, cache_strategy, cache_lifecycle, cache_window_tokens)
        RuntimeConfig.of(self.model_id, {**self._fields, **cache.fields})
        if (kind := read_json(self.folder / "config.json").get("model_type")) not in FAMILIES:
            warnings.warn(f"DiskCache: {kind} runs through transformers, which keeps keys and values in memory", stacklevel=2)
            return None
        return cache

    def client(self, cache: Kept | None = None) -> RuntimeClient:
        """What answers: opened at the first call, and anew when settings have changed, which ends what is under way."""
        if cache is not None and not isinstance(cache, DiskCache):
            raise RequestError(f"past_key_values: give what DiskCache() returns, or None, not a {type(cache).__name__}")
        fields = {**self._fields, **(cache.fields if cache is not None else {}), "model_reference": str(self.folder)}
        with self._lock:
            if self._client is None or fields != self._opened:
                if self._client is not None:
                    self._client.close()
                self._client = None
                self._client, self._opened = RuntimeClient(**fields).open(), fields
            return self._client

    def close(self) -> None:
        """Give everything back. The next `generate` opens the model again."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _keep(self, **fields: Any) -> None:
        """Have so many layers in the device's and the host's memory; what is not given stays as it was, None is as many as fit.

        Raises `ConfigError`.
        """
        RuntimeConfig.given(ConfigError, {"model_reference": self.model_id, **fields})
        kept = {name: fields.pop(name, now) for name, now in self._kept.items()}
        counts = [count for count in kept.values() if count is not None]
        whole = {"offload_cpu_layers": sum(counts) if counts else None}  # a CPU has one memory for both
        self._set(**fields, **(whole if self.device.type == "cpu" else kept))
        self._kept = kept

    def _set(self, **fields: Any) -> None:
        """Raises `ConfigError` at once, and then changes nothing."""
        RuntimeConfig.of(self.model_id, {**self._fields, **fields})
        self._fields |= fields

    def _found(self, reference: str, models_dir: Path | None = None, force_download: bool = False) -> None:
        told = -1

        def tell(done: int, total: int, name: str) -> None:
            nonlocal told
            if self.logging and (share := 10 * done // max(total, 1)) > told:
                told = share
                print(f"aollm: downloading {reference}: {amount(done)} of {amount(total)}", file=sys.stderr, flush=True)

        with anyio.from_thread.start_blocking_portal() as portal:  # a loop of its own: this thread may have one that runs
            folder = portal.call(find, reference, models_dir, force_download, tell)
        if folder != self._folder:
            for part in PARTS:
                vars(self).pop(part, None)
        self._folder = folder

    def _transformers(self, kind: Any, what: str) -> Any:
        """One of transformers' parts of this model, from its folder alone, running none of its code."""
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False)
        except FOREIGN as error:
            raise ModelError(f"transformers cannot load the {what} in {self.folder}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.model_id} on {self.device}, {self._client or 'not open'}>"


class AutoInference(Inference):
    """A model in a folder, and the LoRA adapter in `adapter_dir`, if one is given, as PEFT saves it. Raises `ModelError`."""

    def __init__(
        self, model_dir: str | Path, adapter_dir: str | Path | None = None, device: str | torch.device = "cuda:0", logging: bool = True,
        multimodality: bool = False, **fields: Any,
    ) -> None:  # fmt: skip
        super().__init__(str(model_dir), device, logging, multimodality, **fields)
        if adapter_dir is not None:
            self._adapter = ADAPTER
            self._set(adapter_dir={ADAPTER: adapter_dir})
        self._found(str(model_dir))


def usable(device: str | torch.device) -> torch.device:
    """The device that was asked for, or the CPU, with a warning, where it is not here."""
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: {device!r} is none; give cpu, cuda or cuda:N") from error
    count = torch.cuda.device_count() if wanted.type == "cuda" else 0
    if wanted.type == "cpu" or (wanted.index or 0) < count:
        return wanted
    warnings.warn(f"{wanted} is not to be had here: the CPU computes", stacklevel=3)
    return torch.device("cpu")


def file_get_contents(name: str | Path) -> str:
    """The text of a file, in UTF-8. Raises `RequestError` where there is none."""
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RequestError(f"{name} cannot be read: {error}") from error
