"""An io_uring of the kernel's, through ctypes: operations in, results out, a signal on an eventfd in between.

x86-64 Linux only: every submit is a system call and every reap follows a read of the eventfd, so nothing more is
needed there to keep memory in order. It refuses to know what is read, and holds no buffer: callers keep them alive.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
import sys

SETUP, ENTER, REGISTER = 425, 426, 427
REGISTER_EVENTFD, UNREGISTER_EVENTFD = 4, 5
READ = 22
SINGLE_MMAP, RW_CUR_POS = 1 << 0, 1 << 3
"""Features: both rings in one mapping; READ without a vector (Linux 5.6)."""
SQES_OFFSET = 0x10000000
MAP_POPULATE = 0x8000
SQE = struct.Struct("<BBHiQQIIQHHiQQ")
CQE = struct.Struct("<QiI")


class Ring:
    """`entries` operations at most; the kernel signals `eventfd` when one has ended. Raises `OSError`."""

    def __init__(self, entries: int, eventfd: int) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._maps: list[tuple[int, int]] = []
        parameters = (ctypes.c_uint32 * 30)()
        self._fd = self._call(SETUP, entries, parameters)
        try:
            self._map_rings(parameters)
            self._call(REGISTER, self._fd, REGISTER_EVENTFD, ctypes.byref(ctypes.c_int(eventfd)), 1)
        except OSError:
            self._give_back()
            raise
        self._unsubmitted = 0

    def read(self, key: int, fd: int, address: int, nbytes: int, offset: int) -> None:
        """Put in a read, to be handed over by the next `submit`; its result comes under `key`."""
        tail = self._sq_tail.value
        sqe = self._sqes + (tail & self._sq_mask) * SQE.size
        SQE.pack_into((ctypes.c_char * SQE.size).from_address(sqe), 0, READ, 0, 0, fd, offset, address, nbytes, 0, key, 0, 0, 0, 0, 0)
        self._sq_tail.value = (tail + 1) & 0xFFFFFFFF
        self._unsubmitted += 1

    def submit(self) -> bool:
        """Hand over what was put in; False if the kernel has no room for all of it just now."""
        while self._unsubmitted:
            try:
                self._unsubmitted -= self._call(ENTER, self._fd, self._unsubmitted, 0, 0, None, 0)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EBUSY):
                    return False
                raise
        return True

    def reap(self) -> list[tuple[int, int]]:
        """Keys and results of what has ended: bytes, or an errno negated."""
        head, tail = self._cq_head.value, self._cq_tail.value
        ended: list[tuple[int, int]] = []
        while head != tail:
            cqe = (ctypes.c_char * CQE.size).from_address(self._cqes + (head & self._cq_mask) * CQE.size)
            key, result, _ = CQE.unpack_from(cqe)
            ended.append((key, result))
            head = (head + 1) & 0xFFFFFFFF
        self._cq_head.value = head
        return ended

    def close(self) -> None:
        """Give everything back; nothing may be in flight."""
        self._call(REGISTER, self._fd, UNREGISTER_EVENTFD, None, 0)
        self._give_back()

    def _map_rings(self, parameters: ctypes.Array[ctypes.c_uint32]) -> None:
        sq_entries, cq_entries, features = parameters[0], parameters[1], parameters[5]
        if features & SINGLE_MMAP == 0 or features & RW_CUR_POS == 0:
            raise OSError(errno.ENOSYS, "the kernel's io_uring is too old")
        _, sq_tail, sq_mask, _, _, _, sq_array = parameters[10:17]
        cq_head, cq_tail, cq_mask, _, _, cqes = parameters[20:26]
        rings = self._map(max(sq_array + sq_entries * 4, cqes + cq_entries * CQE.size), 0)
        self._sqes = self._map(sq_entries * SQE.size, SQES_OFFSET)
        self._cqes = rings + cqes
        self._sq_tail = ctypes.c_uint32.from_address(rings + sq_tail)
        self._cq_head = ctypes.c_uint32.from_address(rings + cq_head)
        self._cq_tail = ctypes.c_uint32.from_address(rings + cq_tail)
        self._sq_mask = ctypes.c_uint32.from_address(rings + sq_mask).value
        self._cq_mask = ctypes.c_uint32.from_address(rings + cq_mask).value
        (ctypes.c_uint32 * sq_entries).from_address(rings + sq_array)[:] = list(range(sq_entries))

    def _map(self, nbytes: int, offset: int) -> int:
        """Mapped by libc, not by `mmap.mmap`, which cannot be closed while ctypes looks into it."""
        flags = mmap.MAP_SHARED | MAP_POPULATE
        at = self._libc.mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, self._fd, offset)
        if at == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._maps.append((at, nbytes))
        return int(at)

    def _give_back(self) -> None:
        for at, nbytes in self._maps:
            self._libc.munmap(at, nbytes)
        self._maps.clear()
        os.close(self._fd)

    def _call(self, number: int, *arguments: object) -> int:
        result = int(self._libc.syscall(number, *arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result


def probe() -> str | None:
    """Why io_uring cannot be used here, or None if it can."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64") or sys.maxsize < 1 << 32:
        return f"it needs 64-bit x86 Linux, and this is {platform.machine()} {sys.platform}"
    eventfd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        Ring(2, eventfd).close()
    except OSError as error:
        return f"{errno.errorcode.get(error.errno or 0, error.errno)}: {error.strerror}"
    finally:
        os.close(eventfd)
    return None
