"""A device whose memory is another than the host's, as far as anybody can tell, though both are the same memory.

Its tensors know each other: an operation on one of them and one of the host's raises, as on a CUDA device. It counts what
is there, refuses more than its limit, and notices when memory is filled again before what was there is used up.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from aollm.buffers import Arena

MIXED = "Expected all tensors to be on the same device, but found at least two devices, fake:0 and cpu!"
UNSEEN = {"__get__", "to"}
"""What makes no use of a tensor's numbers: asking for its shape, and conversions to what it is already."""


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


class FakeDevice:
    """`limit` bytes of memory that are told from the host's."""

    name = "fake:0"
    apart = True
    overhead_nbytes = 0

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.nbytes = self.peak = 0
        self.filled: list[int] = []
        """Bytes of each copy into memory for weights."""
        self.registered = 0
        self._lock = threading.RLock()
        self._storages: dict[int, list[int]] = {}  # by address: bytes, tensors
        self._uses: dict[int, dict[tuple[int, int], int]] = {}  # of memories, by address: which operation used a range last
        self._operations = 0
        owner = self

        class Away(Tensor):
            @classmethod
            def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                return owner._call(function, args, kwargs or {})

        self._away = Away

    @property
    def free_nbytes(self) -> int:
        return self.limit - self.nbytes

    def memory(self, nbytes: int) -> "FakeMemory":
        return FakeMemory(self, nbytes)

    def register(self, arena: Arena) -> Callable[[], None]:
        self.registered += 1

        def undo() -> None:
            self.registered -= 1

        return undo

    def put(self, tensor: Tensor) -> Tensor:
        return tensor if self.holds(tensor) else self.own(tensor.clone())

    def fetch(self, tensor: Tensor) -> Tensor:
        if not self.holds(tensor):
            return tensor
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.as_subclass(Tensor).clone()

    def mark(self) -> int:
        return self._operations

    def holds(self, tensor: Tensor) -> bool:
        return isinstance(tensor, self._away)

    def own(self, tensor: Tensor) -> Tensor:
        """The same memory, as this device's."""
        with torch._C.DisableTorchFunctionSubclass(), self._lock:
            storage = tensor.untyped_storage()
            address, nbytes = storage.data_ptr(), storage.nbytes()
            if address not in self._storages:
                if self.nbytes + nbytes > self.limit:
                    raise torch.OutOfMemoryError(f"fake out of memory: {self.nbytes} of {self.limit} bytes in use, {nbytes} more wanted")
                self._storages[address] = [nbytes, 0]
                self.nbytes += nbytes
                self.peak = max(self.peak, self.nbytes)
            self._storages[address][1] += 1
            found = tensor.as_subclass(self._away)
            weakref.finalize(found, self._gone, address).atexit = False
            return found

    def fills(self, address: int, offset: int, nbytes: int, after: int | None) -> None:
        """A copy to a memory begins: what was there must have been used before `after`."""
        with self._lock:
            uses = self._uses[address]
            for low, high in [span for span in uses if span[0] < offset + nbytes and span[1] > offset]:
                assert after is not None and uses.pop((low, high)) <= after, "memory is filled again while it is in use"
            self.filled.append(nbytes)

    def _call(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = function.__name__
        if name in ("numpy", "data_ptr", "__array__"):
            raise TypeError(f"can't convert fake:0 device type tensor with {name}; use fetch")
        found = list(tensors_in((args[:1] + args[2:], kwargs) if name in ("__getitem__", "__setitem__") else (args, kwargs)))
        if any(not self.holds(tensor) and tensor.dim() for tensor in found):
            raise RuntimeError(f"{MIXED} (in {name})")
        with torch._C.DisableTorchFunctionSubclass():
            if name not in UNSEEN:
                self._use(found)
            out = function(*args, **kwargs)
        return self._wrapped(out)

    def _use(self, found: Iterable[Tensor]) -> None:
        with self._lock:
            self._operations += 1
            for tensor in found:
                if self.holds(tensor) and (uses := self._uses.get(tensor.untyped_storage().data_ptr())) is not None:
                    at = tensor.storage_offset() * tensor.itemsize
                    uses[at, at + tensor.nbytes] = self._operations

    def _wrapped(self, out: Any) -> Any:
        if isinstance(out, Tensor):
            return out if self.holds(out) else self.own(out)
        return (
            type(out)(map(self._wrapped, out))
            if type(out) in (list, tuple)
            else tuple(map(self._wrapped, out))
            if isinstance(out, tuple)
            else out
        )

    def _gone(self, address: int) -> None:
        with self._lock:
            storage = self._storages[address]
            storage[1] -= 1
            if not storage[1]:
                del self._storages[address]
                self._uses.pop(address, None)
                self.nbytes -= storage[0]


class FakeMemory:
    """Memory for weights on a fake device."""

    def __init__(self, device: FakeDevice, nbytes: int) -> None:
        self._device = device
        arena = Arena(nbytes)
        self.nbytes = arena.nbytes
        plain = arena.tensor(0, torch.uint8, (arena.nbytes,))
        self._address = plain.data_ptr()
        self._bytes: Tensor | None = device.own(plain)
        device._uses[self._address] = {}

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        assert self._bytes is not None
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        with torch._C.DisableTorchFunctionSubclass():
            return self._device.own(self._bytes[offset : offset + nbytes].view(dtype).view(shape))

    def fill(self, offset: int, source: Tensor, after: int | None) -> None:
        assert self._bytes is not None and not self._device.holds(source)
        self._device.fills(self._address, offset, source.nbytes, after)
        with torch._C.DisableTorchFunctionSubclass():
            self._bytes[offset : offset + source.nbytes].copy_(source.reshape(-1).view(torch.uint8))

    def forget(self) -> None:
        self._bytes = None
