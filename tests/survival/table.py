"""The README's table of what was tried: `python tests/survival/table.py` reads the counts that the tests left.

What a process that ends leaves behind is what is in its folder then, so most crashes are a copy of the folder, made while the
process goes on; at every 12th operation a fork really ends with `_exit`.
"""

from __future__ import annotations

import json
from pathlib import Path

COUNTS = Path(__file__).parents[2] / ".bench" / "survival"
WORDS = {
    "crashes": "the process ends before, or in the middle of, every operation of a script, for each of the seven presets: "
    "the folder as it is then is copied and opened; every 12th time a forked process does end (`_exit`)",
    "kills": "`kill -9` at a random moment under load",
    "together": "eight processes on one root, one of them killed and replaced",
    "failures": "an operation fails (EIO, ENOSPC, EDQUOT, EMFILE, EINTR; once or from then on) or comes back short",
    "power": "the power goes and takes what was not flushed, or a flush fails first (simulated)",
    "tails": "the log cut at every byte of its headers and every 512 bytes",
    "flips": "a bit flipped in every byte of every header and in random bytes of payloads; records exchanged",
    "full": "a filesystem that is full, and has room again (tmpfs)",
    "mutants": "mistakes put in on purpose, and noticed",
}


def table(folder: Path) -> str:
    """The newest count of each programme as a Markdown table."""
    counts = {entry["programme"]: entry for entry in (json.loads(path.read_text()) for path in folder.glob("*.json"))}
    rows = [f"| {words} | {counts[name]['trials']:,} | {counts[name]['failures']} |" for name, words in WORDS.items() if name in counts]
    return "\n".join(["| what happens | trials | failures |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    print(table(COUNTS))
