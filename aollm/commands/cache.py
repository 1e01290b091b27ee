"""`aollm cache`: what is stored of keys and values on this machine; list it, check it, keep it, remove it.

It goes through the folders of all strategies under one cache folder. What a stored block is, and how one is removed
safely, is the affair of `stores`; what a process has in use is left alone, and said to be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AollmError, ConfigError, StoreError
from ..meter import amount, count
from ..settings import RuntimeConfig
from ..stores.housekeeping import ls, pin, purge, verify
from ..stores.presets import PRESETS
from ..terminal import Terminal, spinner
from .table import print_table

Entry = dict[str, Any]
SHORT = 12
"""Digits of a name that are shown: enough to be typed as a prefix."""


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Do one of the actions; the exit code is 1 when something was damaged, unreadable, or in use and to be changed."""
    folder = _folder(options)
    roots = {name: folder / preset.root for name, preset in PRESETS.items() if preset.root}
    prefix = _prefix(options)
    found: list[Entry] = []
    unread: list[str] = []
    for strategy, root in roots.items():
        try:
            found += [{"strategy": strategy, **entry} for entry in _entries(terminal, options, root, prefix)]
        except AollmError as error:  # the folders of other strategies may well be in order
            unread.append(str(error))
    terminal.status(None)
    if options.get("json"):
        terminal.text(json.dumps(found) + "\n")
    elif not found and not unread and not prefix:
        terminal.line([(f"nothing is stored in {folder}", "")])
    elif found:
        PRINTERS[options["action"]](terminal, found)
    for message in unread:
        terminal.error(message)
    if not found and prefix and not unread:
        raise StoreError(f"nothing in {folder} has a name that begins with {prefix!r}: aollm cache ls shows the names")
    return int(bool(unread) or any(_is_wrong(entry) for entry in found))


def _entries(terminal: Terminal, options: Mapping[str, Any], root: Path, prefix: str) -> Iterable[Entry]:
    """What the action found or did under one root."""
    match options["action"]:
        case "ls":
            return [entry for entry in ls(root) if _begins(str(entry["path"]), prefix)]
        case "verify":
            done = 0

            def progress(nbytes: int) -> None:
                nonlocal done
                done += nbytes

            terminal.status(lambda: [[(f"{spinner()} ", "cyan"), (f"reading {root.name}: {amount(done)}", "dim")]])
            return verify(root, prefix, "drop" in options, progress)
        case "purge":
            return [{"path": path, "became": became} for path, became in purge(root, prefix).items()]
        case action:
            return [{"path": path, "became": became} for path, became in pin(root, prefix, action == "pin").items()]


def _folder(options: Mapping[str, Any]) -> Path:
    given = {name: options[name] for name in ("cache_dir",) if name in options}
    folder = RuntimeConfig.of("", given).cache_dir
    if given and not folder.is_dir():
        raise ConfigError(
            f"--cache-dir: {folder} is {'not a folder' if folder.exists() else 'missing'}; name the folder that runs were given"
        )
    return folder


def _prefix(options: Mapping[str, Any]) -> str:
    prefix = str(options.get("prefix", "")).lower()
    if options["action"] in ("purge", "pin", "unpin") and not prefix and "all" not in options:
        raise ConfigError(f"say which: aollm cache {options['action']} NAME, where NAME is how one begins in aollm cache ls, or --all")
    if prefix and "all" in options:
        raise ConfigError(f"either {prefix} or --all, not both")
    return prefix


def _begins(path: str, prefix: str) -> bool:
    return Path(path).name.startswith(prefix) or Path(path).parent.name.startswith(prefix)


def _is_wrong(entry: Entry) -> bool:
    """Whether it should not go unnoticed by a script."""
    left = entry.get("damaged", 0) + entry.get("lost", 0) > 0 and not entry.get("dropped")
    return left or entry.get("became") == "in use" or bool(entry.get("error") and not entry.get("dropped"))


def _name(entry: Entry) -> str:
    return Path(entry["path"]).name[:SHORT]


def _print_ls(terminal: Terminal, found: Sequence[Entry]) -> None:
    rows = [("NAME", "MODEL", "STRATEGY", "BLOCKS", "TOKENS", "SIZE", "")]
    for entry in found:
        states = ["in use"] if entry["in_use"] else [] if entry["identity"] else ["left by a run that was ended"]
        states += [f"{entry['pinned']} pinned"] if entry["pinned"] else []
        states += [entry["error"]] if entry["error"] else []
        of = (_name(entry), entry["identity"][:SHORT] or "of one run", entry["strategy"])
        rows.append((*of, f"{entry['blocks']:,}", f"{entry['tokens']:,}", amount(entry["disk_bytes"]), ", ".join(states)))
    print_table(terminal, rows)
    terminal.line()
    tokens, nbytes = sum(entry["tokens"] for entry in found), sum(entry["disk_bytes"] for entry in found)
    terminal.line([(f"{tokens:,} tokens, {amount(nbytes)}", "bold")])


def _print_verify(terminal: Terminal, found: Sequence[Entry]) -> None:
    rows = [("NAME", "STRATEGY", "BLOCKS", "GOOD", "DAMAGED", "LOST", "READ", "")]
    for entry in found:
        states = ["in use, not read"] if entry["in_use"] else []
        states += [f"{entry['dropped']} dropped"] if entry["dropped"] else []
        states += [entry["error"]] if entry["error"] else []
        numbers = [f"{entry[name]:,}" for name in ("blocks", "good", "damaged", "lost")]
        rows.append((_name(entry), entry["strategy"], *numbers, amount(entry["bytes"]), ", ".join(states)))
    print_table(terminal, rows)
    left = sum(entry["damaged"] + entry["lost"] for entry in found if not entry["dropped"])
    terminal.line()
    if left:
        terminal.line([(f"{count(left, 'block')} cannot be used; --drop removes them, and the next run computes them again", "yellow")])
    else:
        terminal.line([(f"{count(sum(entry['good'] for entry in found), 'block')} as they were stored", "bold")])


def _print_done(terminal: Terminal, found: Sequence[Entry]) -> None:
    for entry in found:
        terminal.line([(f"{_name(entry)}  {entry['strategy']}  ", ""), (entry["became"], "yellow" if entry["became"] == "in use" else "")])


PRINTERS: dict[str, Callable[[Terminal, Sequence[Entry]], None]] = {
    "ls": _print_ls, "verify": _print_verify, "purge": _print_done, "pin": _print_done, "unpin": _print_done,
}  # fmt: skip
