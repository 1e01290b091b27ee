"""`aollm config show`: every setting as a run would have it, and where its value comes from."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from ..buffers import size
from ..configuration import FILE, SECTIONS, Said, file
from ..options import known
from ..settings import RIVALS, BenchmarkConfig, GenerationConfig, RuntimeConfig
from ..terminal import Row, Terminal
from ..values import Size
from . import generation_config, runtime_config

DEFAULT = "default"
INDENT, VALUE = 31, 20
"""Columns before the values, and those of a value that is not long."""
SIZES = {name for name, field in RuntimeConfig.model_fields.items() if Size in get_args(field.annotation)}

Entry = dict[str, Any]
"""Of one setting: `value`, `source`, and whether the value `differs` from the default one."""


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Print the settings. Raises `ConfigError` for those that a run would refuse."""
    found, sections = file(), _sections(options)
    if options.get("json"):
        terminal.text(json.dumps({"file": found and str(found), **sections}) + "\n")
        return 0
    for section, entries in sections.items():
        terminal.line([(f"[{section}]", "bold")])
        for name, entry in entries.items():
            for row in _rows(terminal.width, name, entry):
                terminal.line(row)
        if not entries:
            terminal.line([("  no settings yet", "dim")])
        terminal.line()
    terminal.line([("* is not the default. ", ""), (f"{FILE} is {found}" if found else f"There is no {FILE} in this folder", "dim")])
    return 0


def _sections(options: Mapping[str, Any]) -> dict[str, dict[str, Entry]]:
    """All settings, by section and name."""
    said = RuntimeConfig.said()
    runtime = runtime_config(options if "model_reference" in said else {**options, "model": ""})
    found = {
        "runtime": _entries(runtime, said, options),
        "generation": _entries(generation_config(options), GenerationConfig.said(), options),
        "benchmark": _entries(BenchmarkConfig.of({}), BenchmarkConfig.said(), {}),
    }
    return {section: found.get(section, {}) for section in SECTIONS}


def _entries(
    config: RuntimeConfig | GenerationConfig | BenchmarkConfig, said: Mapping[str, Said], options: Mapping[str, Any]
) -> dict[str, Entry]:  # fmt: skip
    entries = {}
    for name, value in config.model_dump(mode="json").items():
        field = type(config).model_fields[name]
        if name in options:
            source = _flag(name, options[name])
        elif options.get(rival := RIVALS.get(name, "")):
            source = _flag(rival, True)
        else:
            source = said[name].source if name in said else DEFAULT
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        value = None if field.is_required() and not value else value
        differs = getattr(config, name) != default and value is not None
        entries[name] = {"value": value, "source": source, "differs": differs}
    return entries


def _flag(name: str, value: object) -> str:
    option = known(name)
    named = option.flag if option is not None and option.flag else f"--{name.replace('_', '-')}"
    return named.replace("--", "--no-", 1) if value is False else named


def _rows(width: int, name: str, entry: Entry) -> Iterator[Row]:
    """One line, or more where a value or its source is long."""
    value = size(entry["value"]) if name in SIZES and entry["value"] is not None else _text(entry["value"])
    source = entry["source"].partition(": ")[0]
    style, mark = ("cyan", "* ") if entry["differs"] else ("dim", "  ")
    lines = textwrap.wrap(value, max(width - INDENT, 20), break_on_hyphens=False) or [""]
    room = width - INDENT - len(source) - 2
    beside = len(lines[-1]) <= room
    for number, line in enumerate(lines):
        row = [(f"{mark}{name:<{INDENT - 2}}" if not number else " " * INDENT, "bold" if entry["differs"] else ""), (line, style)]
        if beside and number == len(lines) - 1:
            row.append((f"{'':<{max(min(VALUE, room) - len(line), 0)}}  {source}", "dim" if source == DEFAULT else ""))
        yield row
    if not beside:
        yield [(" " * INDENT, ""), (source, "")]


def _text(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
