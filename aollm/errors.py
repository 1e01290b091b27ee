"""What can go wrong, as one tree. Each message says what happened and what to do.

AollmError
├── ConfigError          a setting is unknown, malformed or contradicts another
├── ModelError           the model folder cannot be used
│   ├── CheckpointError  its weights are missing, truncated or lie about themselves
│   └── SpecializationError  the native tier does not compute it; transformers may
├── MemoryBudgetError    what was asked for does not fit the memory that was given
├── DiskError            a read or write failed, or a file changed while in use
├── StoreError           a KV store cannot be opened or continued
└── RequestError         one request is malformed; others are not affected
    └── CancelledRequest its reader cancelled it, or the runtime is closing
"""

from __future__ import annotations

from collections.abc import Mapping


class AollmError(Exception):
    """Root of every error that reaches a caller for bad input, a bad file or a failing disk."""


class ConfigError(AollmError):
    """A setting is unknown, malformed or contradicts another; the message names the field and what is accepted."""


class ModelError(AollmError):
    """The model folder cannot be used: missing, incomplete, or of a kind that is not known."""


class CheckpointError(ModelError):
    """The weights are missing, truncated, or their header lies."""


class SpecializationError(ModelError):
    """The native tier does not compute this model; the generic tier may, through transformers."""


class MemoryBudgetError(AollmError):
    """The plan does not fit; the message names the largest parts, the floor and the setting to change.

    `changes`: values of single settings with which it would fit, as far as they were looked for.
    """

    def __init__(self, message: str, changes: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.changes = dict(changes or {})


class DiskError(AollmError):
    """A read or write failed, came back short, or met a file that changed while in use."""


class StoreError(AollmError):
    """A KV store cannot be opened, extended or trusted."""


class RequestError(AollmError):
    """One request is malformed or cannot be served; the others go on."""


def first_of(error: BaseException) -> BaseException:
    """The first leaf of what may be a group: callers at the public edge catch errors, not groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
