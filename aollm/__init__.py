"""aollm runs language models that are larger than memory: weights stream from disk while the processor computes.

Names are imported on first use, so that `import aollm` costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import RuntimeClient, Tokens
    from .disk.memory import MemoryDisk
    from .errors import AollmError, CheckpointError, ConfigError, DiskError, MemoryBudgetError, ModelError, RequestError, StoreError
    from .inference import AutoInference, DiskCache, Inference, TextStreamer, file_get_contents
    from .planning import plan
    from .request import Token
    from .runtime import Runtime
    from .session import Session
    from .settings import GenerationConfig, RuntimeConfig
    from .stream import Completion, TokenStream

__version__ = "0.1.0"

# torch's threads meet after every operation, and by default each burns its core until the slowest is there. Beside any
# other busy process that makes a pass 3 to 4 times slower; with short spins it does not. Read once, when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

_HOMES = {
    "errors": (
        "AollmError",
        "CheckpointError",
        "ConfigError",
        "DiskError",
        "MemoryBudgetError",
        "ModelError",
        "RequestError",
        "StoreError",
    ),
    "client": ("RuntimeClient", "Tokens"),
    "disk.memory": ("MemoryDisk",),
    "inference": ("AutoInference", "DiskCache", "Inference", "TextStreamer", "file_get_contents"),
    "planning": ("plan",),
    "request": ("Token",),
    "runtime": ("Runtime",),
    "session": ("Session",),
    "settings": ("GenerationConfig", "RuntimeConfig"),
    "stream": ("Completion", "TokenStream"),
}

__all__ = [
    "AollmError", "AutoInference", "CheckpointError", "Completion", "ConfigError", "DiskCache", "DiskError", "GenerationConfig",
    "Inference", "MemoryBudgetError", "MemoryDisk", "ModelError", "RequestError", "Runtime", "RuntimeClient", "RuntimeConfig",
    "Session", "StoreError", "TextStreamer", "Token", "TokenStream", "Tokens", "file_get_contents", "plan",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({"__version__", *__all__})
