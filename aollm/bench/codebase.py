"""Which codebase a run belongs to: the address that git calls origin, without what differs between ways to reach it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ADDRESS = re.compile(r"(?:[a-z+]+://)?(?:[^@/]*@)?(?P<host>[\w.\-]+)(?::\d+/|[:/])(?P<path>.+?)(?:\.git)?/*", re.ASCII)


def origin(folder: Path) -> str | None:
    """`host/path` of the repository that `folder` is in; None outside of one, and where it has no origin."""
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "config", "--get", "remote.origin.url"], capture_output=True, text=True, errors="replace", timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return normalized(found.stdout.strip()) if found.returncode == 0 else None


def normalized(url: str) -> str | None:
    """`git@host:org/name.git`, `https://user:secret@host/org/name` and `ssh://host:22/org/name/` are all `host/org/name`."""
    if (found := ADDRESS.fullmatch(url)) is None or url.startswith(("/", ".", "file:")):
        return Path(url.removeprefix("file://")).name.removesuffix(".git") or None if url else None
    return f"{found['host'].lower()}/{found['path'].strip('/')}"
