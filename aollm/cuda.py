"""A CUDA device: weights are copied on a stream of their own, beside the stream that computes.

A slot of the ring is refilled when the kernels that read it are done (an event that the copy waits for on the device), and used
when its copy is done (an event that the copying thread waits for, without holding anybody up). The host's memory is registered
with the driver where it is, so that drives read into it and the device reads from it.

This was written against torch's interface on machines without such a device, and is measured elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .buffers import Arena, size
from .errors import MemoryBudgetError

cuda: Any = torch.cuda  # whose functions have few annotations
FREE = 0.9
"""Share of the free memory that is taken when nobody says how much."""


class CudaMemory:
    """One allocation on a device, filled by copies on `stream`."""

    def __init__(self, nbytes: int, device: torch.device, stream: Any) -> None:
        self.nbytes, self._stream = nbytes, stream
        try:
            self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise MemoryBudgetError(f"{device} refuses {size(nbytes)} for weights; lower device_memory or offload_gpu_layers") from error

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A view of the bytes at `offset`; a copy where they lie so that a view cannot be."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        part = self._bytes[offset : offset + nbytes]
        return (part if offset % dtype.itemsize == 0 else part.clone()).view(dtype).view(shape)

    def fill(self, offset: int, source: Tensor, after: Any) -> None:
        """Copy a tensor of the host to `offset`, behind `after`; returns when it is there."""
        with cuda.stream(self._stream):
            if after is not None:
                self._stream.wait_event(after)
            self._bytes[offset : offset + source.nbytes].copy_(source.reshape(-1).view(torch.uint8), non_blocking=True)
            arrived = cuda.Event(blocking=True)
            arrived.record(self._stream)
        arrived.synchronize()

    def forget(self) -> None:
        """Give the memory back to the driver."""
        self._bytes = self._bytes[:0].clone()
        cuda.empty_cache()


class Cuda:
    """CUDA device `index`."""

    apart = True
    overhead_nbytes = 256 << 20
    """Workspaces of its libraries, and what the allocator leaves between allocations."""

    def __init__(self, index: int) -> None:
        self.name = f"cuda:{index}"
        self._device = torch.device("cuda", index)
        self._copies = cuda.Stream(self._device)

    @property
    def free_nbytes(self) -> int:
        """Nearly all that is free there."""
        return int(cuda.mem_get_info(self._device)[0] * FREE)

    def memory(self, nbytes: int) -> CudaMemory:
        """One allocation there."""
        return CudaMemory(nbytes, self._device, self._copies)

    def register(self, arena: Arena) -> Callable[[], None]:
        """Lock the arena in memory, as a source of copies that the processor has no part in."""
        runtime = cuda.cudart()
        address = arena.tensor(0, torch.uint8, (arena.nbytes,)).data_ptr()
        try:
            cuda.check_error(int(runtime.cudaHostRegister(address, arena.nbytes, 0)))
        except RuntimeError as error:
            raise MemoryBudgetError(f"the driver cannot lock {size(arena.nbytes)} of the host's memory ({error}); lower memory") from error
        return lambda: runtime.cudaHostUnregister(address)

    def put(self, tensor: Tensor) -> Tensor:
        """The same numbers there."""
        return tensor.to(self._device)

    def fetch(self, tensor: Tensor) -> Tensor:
        """The same numbers in the host's memory; waits for what computes them."""
        return tensor.cpu()

    def mark(self) -> Any:
        """An event behind what was launched so far."""
        event = cuda.Event()
        event.record(cuda.current_stream(self._device))
        return event

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is in its memory."""
        return tensor.device == self._device

    def __repr__(self) -> str:
        return f"<Cuda {self.name}>"
