"""`aollm models`: which models are on this machine, and what one of them is. Nothing is asked of the network, no weights are read."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from ..anatomy import Anatomy, anatomy
from ..disk.auto import open_disk
from ..inventory import Entry, downloads, inventory, whole
from ..meter import amount, count
from ..port import Port
from ..settings import RuntimeConfig
from ..terminal import Terminal, spinner
from . import runtime_config
from .table import print_table

SHORT = {"optimized-native": "native", "transformers-generic": "transformers", None: "none"}


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """List models, or tell of one. Raises `ModelError` for one that is not here, or cannot be used."""
    terminal.status(lambda: [[(f"{spinner()} ", "cyan"), ("reading configurations and headers", "dim")]])
    if options["action"] == "ls":
        config = RuntimeConfig.of("", {name: value for name, value in options.items() if name == "models_dir"})
        entries = anyio.run(inventory, config.models_dir)
        terminal.status(None)
        return _list(terminal, entries, config.models_dir, "json" in options)
    config = runtime_config(options)
    found = anyio.run(_look, config)
    terminal.status(None)
    if "json" in options:
        terminal.text(json.dumps({"reference": config.model_reference, **found.as_dict()}) + "\n")
    else:
        _print_anatomy(terminal, config.model_reference, found)
    return 0


async def _look(config: RuntimeConfig) -> Anatomy:
    folder = await whole(config.model_reference, config.models_dir)
    async with Port() as port:
        disk, _ = open_disk("auto", port, folder)
        try:
            return await anatomy(folder, disk)
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


def _list(terminal: Terminal, entries: Sequence[Entry], models_dir: Path | None, as_json: bool) -> int:
    if as_json:
        terminal.text(json.dumps([entry.as_dict() for entry in entries]) + "\n")
        return 0
    rows = [("MODEL", "TYPE", "TIER", "DTYPE", "SIZE", "")]
    for entry in entries:
        rows.append((entry.reference, *_cells(entry)))
    print_table(terminal, rows)
    terminal.line()
    here = [entry for entry in entries if entry.presence == "here"]
    root = downloads(models_dir)
    terminal.line(
        [(f"{count(len(here), 'model')} here, {amount(sum(entry.nbytes for entry in entries))}; downloads are in {root}", "bold")]
    )
    return 0


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    """What stands behind the name of a model."""
    if entry.presence == "absent":
        return "", "", "", "", f"not here: {entry.repository}"
    if entry.error is not None:
        return "", "", "", amount(entry.nbytes), f"cannot be used: see aollm models info {entry.reference}"
    lacks = f"lacks {', '.join(entry.lacking[:2])}" if entry.lacking else ""
    if entry.model_type is None:
        return "", "", "", amount(entry.nbytes), lacks
    return entry.model_type, SHORT[entry.tier], entry.dtype or "", amount(entry.nbytes), lacks


def _print_anatomy(terminal: Terminal, reference: str, found: Anatomy) -> None:
    terminal.line()
    terminal.line([(f"  {reference}", "bold"), (f"  {found.folder}" if reference != str(found.folder) else "", "dim")])
    terminal.line()
    for name, value in _rows(found):
        for number, line in enumerate(textwrap.wrap(value, max(terminal.width - 16, 20), break_on_hyphens=False, drop_whitespace=False)):
            terminal.line([(f"  {'' if number else name:<13}", ""), (line, "cyan")])
    terminal.line()


def _rows(found: Anatomy) -> Iterator[tuple[str, str]]:
    kind = f"of type {found.model_type}" if found.model_type is not None else "of a type that config.json does not name"
    yield "architecture", f"{found.architecture or 'not named'}, {kind}"
    yield "tier", found.tier or "none"
    yield "", found.tier_reason
    for name, number, unit in (
        ("layers", found.layers, ""), ("hidden", found.hidden, ""), ("vocabulary", found.vocabulary, " tokens"),
        ("context", found.context, " tokens at most"),
    ):  # fmt: skip
        if number is not None:
            yield name, f"{number:,}{unit}"
    if (mixture := found.experts) is not None:
        yield "experts", f"{mixture.count:,} in each of {count(mixture.layers, 'layer')}, a token takes {mixture.top}"
    for tower in found.towers:
        yield "takes", f"{tower.kind}, by a tower of {amount(tower.weights_nbytes)}"
    packed = f", quantized: {found.quantization}" if found.quantization else ""
    yield "dtype", f"{found.dtype or 'not known'}{packed}"
    parameters = "not known, they are packed" if found.parameters is None else _billions(found.parameters)
    active = found.active_parameters
    told = f", {_billions(active)} multiplied for a token" if active not in (None, found.parameters) else ""
    yield "parameters", parameters + told
    yield "weights", f"{amount(found.weights_nbytes)}; {amount(found.disk_nbytes)} on disk with all files"
    if found.kv_nbytes_per_token is not None:
        whole = f", {amount(found.kv_nbytes_per_token * found.context)} for the whole context" if found.context else ""
        state = f", and {amount(found.state_nbytes)} a sequence" if found.state_nbytes else ""
        yield "KV", f"{amount(found.kv_nbytes_per_token)} a token{state}{whole}"
    yield "tokenizer", found.tokenizer or "none: prompts are token ids"
    yield "chat", "has a chat template" if found.chat_template else "no chat template"
    yield "export", "there is one in gds_export, or it is one" if found.exported else "none; aollm export makes one"
    for number, (name, nbytes) in enumerate(found.files.items()):
        yield "" if number else "files", f"{amount(nbytes):>8}  {name}"


def _billions(parameters: int) -> str:
    for unit, least in (("billion", 10**9), ("million", 10**6), ("thousand", 10**3)):
        if parameters >= least:
            return f"{parameters / least:.3g} {unit}"
    return str(parameters)
