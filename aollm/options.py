"""Options: how each setting is typed on the command line, and which words it takes where those are few.

It imports nothing heavy, so that help, mistakes and completion are answered at once, and checks nothing: `settings` says
what is accepted, and a test that both know the same names and the same words.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MODELS = (
    "demo", "llama3-1B-chat", "llama3-3B-chat", "llama3-8B-chat", "gemma3-12B", "qwen3-next-80B", "gpt-oss-20B", "voxtral-small-24B",
)  # fmt: skip
"""Aliases that MODEL may be."""
BACKENDS = ("auto", "optimized-native", "transformers-generic")
DISKS = ("auto", "threads", "uring", "gds", "portable")
STRATEGIES = (
    "auto", "resident", "chunked", "paged", "streamed-segmented", "log-structured-journal", "sliding-window-ring-buffer",
    "quantized-cold-tier", "tiered-write-back",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Option:
    """One setting. Without a `metavar` it is a switch, `--name` or `--no-name`; `many` may be given more than once."""

    help: str
    metavar: str = ""
    type: type[int] | type[float] | type[str] = str
    words: tuple[str, ...] = ()
    many: bool = False
    flag: str = ""
    """What it is called where that is not its name."""
    default: str = ""
    """The one of the words that is taken where nothing is said, if it is not the first."""

    def add_to(self, group: argparse._ActionsContainer, name: str) -> None:
        """Have `group` take it, for the setting `name`."""
        flag = self.flag or f"--{name.replace('_', '-')}"
        default = self.default or next(iter(self.words), "")
        told = listed(f"{word} (default)" if word == default else word for word in self.words) if self.words else ""
        fields: dict[str, Any] = {"dest": name, "help": f"{self.help}: {told}" if told else self.help}
        if not self.metavar:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **fields)
            return
        fields |= {"action": "append"} if self.many else {"type": self.type}
        group.add_argument(flag, metavar=self.metavar, **fields)


def listed(words: Iterable[str]) -> str:
    """`one, two or three`."""
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True, slots=True)
class Group:
    """Options under one heading."""

    title: str
    options: Mapping[str, Option] = field(default_factory=dict)

    def add_to(self, parser: argparse.ArgumentParser, without: Iterable[str] = ()) -> argparse._ArgumentGroup:
        """Have `parser` take the options, all but those named in `without`; what else belongs there may be added."""
        group = parser.add_argument_group(self.title)
        for name, option in self.options.items():
            if name not in without:
                option.add_to(group, name)
        return group


GENERATION = Group("generation", {
    "max_new_tokens": Option("tokens of an answer at most (default 256)", "N", int),
    "temperature": Option("0 always takes the likeliest token (default)", "T", float),
    "top_p": Option("draw from the likeliest tokens that together have P", "P", float),
    "top_k": Option("draw from the K likeliest tokens", "K", int),
    "min_p": Option("leave out what is less than P times as likely as the likeliest", "P", float),
    "repetition_penalty": Option("above 1: what was said becomes less likely", "R", float),
    "seed": Option("the same seed draws the same tokens", "S", int),
    "stop": Option("end before this text; may be given more than once", "TEXT", many=True),
    "n": Option("answers to the same prompt; they share each pass (default 1)", "N", int, flag="-n"),
    "logprobs": Option("with --json, tell of each token's N likeliest (default 0)", "N", int),
    "adapter": Option("answer with this one of the adapters in --adapter-dir (default: with none)", "NAME"),
    "context_shift": Option("when the context is full", "HOW", words=("stop", "rotate", "prefill")),
    "keep_tokens": Option("first tokens that a context shift keeps (default 4)", "N", int),
    "cache_salt": Option("share stored prompts only with runs that give the same text", "TEXT"),
    "stream": Option("show the answer as it is written, or only when it is whole (default: as it is written)"),
})  # fmt: skip

RUNTIME = Group("runtime", {
    "memory": Option("limit for the whole process, such as 3GiB (default: what is free)", "SIZE"),
    "device": Option("what computes, cuda:1 being the second of several", "NAME", words=("auto", "cpu", "cuda")),
    "device_memory": Option("limit for the device's memory (default: what is free)", "SIZE"),
    "backend": Option("which tier answers", "NAME", words=BACKENDS),
    "use_specialization": Option("our own layers where there are some, or else transformers' (default: our own)"),
    "multimodal": Option("take pictures or sound where the model can, and set memory aside for them (default: yes)"),
    "max_context_tokens": Option("the longest prompt and answer together", "N", int),
    "max_concurrent_requests": Option("requests that may ride on one pass", "N", int),
    "models_dir": Option("where models of the Hub are kept (default: huggingface_hub's cache)", "FOLDER"),
    "force_download": Option("fetch a model of the Hub again, all of it"),
    "adapter_dir": Option("a LoRA adapter, or a folder with several", "FOLDER"),
})  # fmt: skip

PLACEMENT = Group("disk and placement", {
    "disk_backend": Option("how files are read", "NAME", words=DISKS),
    "prefetch_depth": Option("pieces that are read ahead of need (default 2)", "N", int),
    "dense_projection_chunk_rows": Option("rows that are computed at a time", "N", int),
    "expert_memory": Option("what experts may have of the memory (default: all that is left)", "SIZE"),
    "offload_cpu_layers": Option("keep just N layers in memory (default: all that fit)", "N", int),
    "offload_cpu_policy": Option("which layers those are", "WHICH", words=("auto", "prefix", "suffix", "middle-band")),
    "offload_gpu_layers": Option("keep just N layers in the device's memory (default: all that fit)", "N", int),
})  # fmt: skip

KV_CACHE = Group("KV cache", {
    "kv_cache_strategy": Option("where keys and values are kept; resident is in memory, auto chooses", "NAME", words=STRATEGIES),
    "strategy_selector_profile": Option(
        "what auto goes by", "NAME", words=("balanced", "latency", "capacity", "bounded-window")
    ),
    "kv_cache_adaptation_mode": Option(
        "whether another strategy is recommended, or taken, between requests", "MODE",
        words=("disabled", "observe-only", "automatic"), default="observe-only",
    ),
    "use_cache": Option("prompts may take what was computed for others (default: yes)"),
    "kv_cache_lifecycle": Option("whether they outlive the run", "WHICH", words=("runtime-scoped", "persistent")),
    "kv_cache_window_tokens": Option("tokens kept by sliding-window-ring-buffer", "N", int),
    "kv_cache_memory": Option("memory for keys and values (default: a share of --memory)", "SIZE"),
    "kv_cache_max_bytes": Option("room on disk for what is persistent; the oldest goes first", "SIZE"),
    "kv_cache_max_age_s": Option("seconds for which what is persistent is kept", "S", float),
    "cache_dir": Option("where the KV cache is stored (default: aollm in your cache folder)", "FOLDER"),
})  # fmt: skip

OUTPUT = Group("output", {
    "verbose": Option("say more on stderr of what is done, and why"),
    "quiet": Option("no status and no summary on stderr"),
})  # fmt: skip

RUNTIME_GROUPS = (RUNTIME, PLACEMENT, KV_CACHE, OUTPUT)
NO_OPTION = {
    "model_reference": "it is MODEL, the first word behind the command",
}
"""Settings that have no option, and why."""


def known(name: str) -> Option | None:
    """The option of the setting `name`."""
    return next((group.options[name] for group in (GENERATION, *RUNTIME_GROUPS) if name in group.options), None)
