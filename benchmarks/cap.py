"""A memory cap for child processes, page cache included where the kernel can do it.

    with MemoryCap(3 << 30) as cap:
        process = subprocess.Popen(command, preexec_fn=cap.enter)
        process.wait()
    print(cap.kind, cap.peak_nbytes, cap.killed)

Tries a cgroup v2 `memory.max`, then a v1 `memory.limit_in_bytes`; both need root. Else a thread watches resident memory and
kills above the cap. The group is removed at the end, with whatever still runs in it. It knows nothing of models.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType

GROUPS = Path("/sys/fs/cgroup")
PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryCap:
    """Holds processes that call `enter` to `nbytes` of memory together (`None`: only measures their peak)."""

    def __init__(self, nbytes: int | None) -> None:
        self.nbytes = nbytes
        self.kind = "watched-rss"
        self.peak_nbytes: int | None = None
        self.killed = False
        self.group: Path | None = None
        self.pids, self.inlet = -1, -1

    def __repr__(self) -> str:
        return f"<MemoryCap {self.nbytes} by {self.kind}, peak {self.peak_nbytes}, killed {self.killed}>"

    def __enter__(self) -> MemoryCap:
        for kind, parent in group_parents():
            group = parent / f"cap-{os.getpid()}-{time.monotonic_ns()}"
            try:
                group.mkdir()
            except OSError:
                continue
            try:
                limit(group, kind, self.nbytes)
            except OSError:
                group.rmdir()
                continue
            self.group, self.kind = group, kind
            return self
        self.pids, self.inlet = os.pipe()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def enter(self) -> None:
        """Put the calling process under the cap; meant for `preexec_fn`."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            os.write(self.inlet, os.getpid().to_bytes(8, "little"))
            os.close(self.inlet)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.group is None:
            os.close(self.inlet)
            self.watcher.join()
            os.close(self.pids)
            return
        self.peak_nbytes, self.killed = measured(self.group, self.kind)
        remove(self.group)

    def _watch(self) -> None:
        pid = int.from_bytes(os.read(self.pids, 8), "little")
        while pid:
            try:
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
            except (OSError, IndexError):
                return
            self.peak_nbytes = max(self.peak_nbytes or 0, resident)
            if resident == 0:  # a zombie: it has ended
                return
            if self.nbytes is not None and resident > self.nbytes:
                self.killed = True
                os.kill(pid, signal.SIGKILL)
                return
            threading.Event().wait(0.02)


def group_parents() -> list[tuple[str, Path]]:
    """Where a child group may be made: (`cgroup-v2` or `cgroup-v1`, folder), the best first."""
    found: list[tuple[str, Path]] = []
    v1: list[tuple[str, Path]] = []
    for line in Path("/proc/self/cgroup").read_text().splitlines() if GROUPS.is_dir() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = GROUPS / "unified" if (GROUPS / "unified").is_dir() else GROUPS
            own = root / path.lstrip("/")
            for folder in [own, *own.parents]:
                control = folder / "cgroup.subtree_control"
                if control.is_file() and "memory" in control.read_text().split():
                    found.append(("cgroup-v2", folder))
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
            v1 = [("cgroup-v1", folder) for folder in (root / path.lstrip("/"), root) if folder.is_dir()]
    return found + v1


def limit(group: Path, kind: str, nbytes: int | None) -> None:
    """Write the limit, and forbid swap where the kernel accounts for it."""
    ceiling, swap = ("memory.max", "memory.swap.max") if kind == "cgroup-v2" else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    if nbytes is not None:
        (group / ceiling).write_text(str(nbytes))
        if (group / swap).exists():
            (group / swap).write_text("0" if kind == "cgroup-v2" else str(nbytes))


def measured(group: Path, kind: str) -> tuple[int | None, bool]:
    """Peak bytes (`None` where the kernel does not tell), and whether the kernel killed for memory."""
    peak, events = ("memory.peak", "memory.events") if kind == "cgroup-v2" else ("memory.max_usage_in_bytes", "memory.oom_control")
    nbytes = int((group / peak).read_text()) if (group / peak).exists() else None
    rows = dict(line.split() for line in (group / events).read_text().splitlines())
    return nbytes, int(rows.get("oom_kill", 0)) > 0


def remove(group: Path) -> None:
    """End what still runs in the group, then remove it."""
    for _ in range(100):
        for pid in (group / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            group.rmdir()
            return
        except OSError:
            threading.Event().wait(0.05)
    raise OSError(f"the memory group {group.name} cannot be removed")
