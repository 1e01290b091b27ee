"""Devices: where layers are computed, and how bytes come to memory of its own, if it has such.

The host computes in its own memory: nothing moves, and what `Host` is given it gives back. Elsewhere bytes are copied ahead
of need, beside what is computed, and come back when they are wanted. It refuses to know what the bytes are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import Arena
from .errors import ConfigError

Mark = Any
"""A moment in the work of the compute thread, as `Device.mark` gives it."""


class Memory(Protocol):
    """`nbytes` of memory on a device."""

    nbytes: int

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The bytes at `offset` as a tensor there."""
        ...

    def fill(self, offset: int, source: Tensor, after: Mark) -> None:
        """Copy a tensor of the host to `offset`, while other things are computed; returns when it is there. `after` is the mark
        behind the last use of what was there before, None where nothing was."""
        ...

    def forget(self) -> None:
        """Give the memory back."""
        ...


class Device(Protocol):
    """Where layers are computed. `put`, `fetch` and `mark` are for the compute thread, in which all of that is done."""

    name: str
    apart: bool
    """Whether its memory is another than the host's."""
    overhead_nbytes: int
    """What its libraries take of its memory."""

    @property
    def free_nbytes(self) -> int:
        """What is free of its memory."""
        ...

    def memory(self, nbytes: int) -> Memory:
        """Memory there, for weights; `MemoryBudgetError` when it is refused."""
        ...

    def register(self, arena: Arena) -> Callable[[], None]:
        """Have copies from `arena` go at full speed; to be undone by what is returned, before the arena goes."""
        ...

    def put(self, tensor: Tensor) -> Tensor:
        """The same numbers there; the tensor itself if it is there."""
        ...

    def fetch(self, tensor: Tensor) -> Tensor:
        """The same numbers in the host's memory, once they are computed; the tensor itself if it is there."""
        ...

    def mark(self) -> Mark:
        """The end of what was asked of it so far."""
        ...

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in its memory."""
        ...


class HostMemory:
    """Memory of the host in the place of a device's."""

    def __init__(self, nbytes: int) -> None:
        self._arena = Arena(nbytes)
        self.nbytes = self._arena.nbytes

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of the bytes at `offset`."""
        return self._arena.tensor(offset, dtype, shape)

    def fill(self, offset: int, source: Tensor, after: Mark) -> None:
        """Copy a tensor to `offset`."""
        self._arena.tensor(offset, source.dtype, tuple(source.shape)).copy_(source)

    def forget(self) -> None:
        """Give the memory back."""
        self._arena = Arena(0)


class Host:
    """The host's processor, in the host's memory."""

    name = "cpu"
    apart = False
    overhead_nbytes = 0
    free_nbytes = 0  # of memory that is not the host's

    def memory(self, nbytes: int) -> Memory:
        """Memory of the host."""
        return HostMemory(nbytes)

    def register(self, arena: Arena) -> Callable[[], None]:
        """Nothing is copied from it."""
        return lambda: None

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def fetch(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def mark(self) -> Mark:
        """None: what was asked is done."""
        return None

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is an ordinary tensor."""
        return tensor.device.type == "cpu"

    def __repr__(self) -> str:
        return "<Host>"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A device, why it is that one, and what was free of its own memory when it was chosen."""

    device: Device
    reason: str
    free_nbytes: int


def choose_device(setting: str, given: Device | None = None) -> Chosen:
    """The device that `setting` (`auto`, `cpu`, `cuda`, `cuda:N`) means, or the one that is given, and why it is that one.

    Raises `ConfigError` for a CUDA device that is not there. Nothing of CUDA is loaded before one is chosen.
    """
    device, reason = (given, "as given") if given is not None else _find(setting)
    return Chosen(device, reason, device.free_nbytes)


def _find(setting: str) -> tuple[Device, str]:
    if setting == "cpu":
        return Host(), "as asked for"
    index = int(setting.partition(":")[2] or 0)
    if (why := _no_cuda(index)) is None:
        from .cuda import Cuda

        return Cuda(index), "as asked for" if setting != "auto" else "the first CUDA device"
    if setting != "auto":
        raise ConfigError(f"device: there is no {setting}: {why}; or leave device out, to compute on the processor")
    return Host(), f"no CUDA device ({why.partition(';')[0]})"


def _no_cuda(index: int) -> str | None:
    """Why there is no CUDA device `index`, and what to do; None if there is one."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it (https://pytorch.org/get-started)"
    count = torch.cuda.device_count()
    if count == 0:
        return f"torch {torch.__version__} finds no CUDA device; look at nvidia-smi and at CUDA_VISIBLE_DEVICES"
    if index >= count:
        return f"torch {torch.__version__} finds {count}; take cuda:0" + (f" to cuda:{count - 1}" if count > 1 else "")
    return None
