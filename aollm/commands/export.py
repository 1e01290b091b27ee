"""`aollm export`: a model's weights as raw aligned files beside it, or in a folder that is a model by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio

from ..checkpoint import open_checkpoint
from ..disk.auto import open_disk
from ..disk.base import Disk
from ..errors import ConfigError, ModelError
from ..export.manifest import Manifest
from ..export.opening import FOLDER, find_export, open_export
from ..export.writer import PARTIAL, write_export
from ..meter import amount, count
from ..port import Port
from ..reference import find
from ..terminal import Row, Terminal, spinner
from . import runtime_config
from .fetch import fetched


def main(terminal: Terminal, options: Mapping[str, Any]) -> int:
    """Write an export, check one, or both. Raises `AollmError`, and `KeyboardInterrupt` when it can be gone on with."""
    if not options.get("output", "."):
        raise ConfigError("--output: name a folder")
    config = anyio.run(fetched, terminal, runtime_config(options))
    folder = anyio.run(find, config.model_reference, config.models_dir)
    target = Path(options["output"]).expanduser() if "output" in options else folder / FOLDER
    try:
        anyio.run(_export, folder, target, config.disk_backend, options, Work(terminal))
    except KeyboardInterrupt:
        terminal.status(None)
        if (partial := target.with_name(target.name + PARTIAL)).exists():
            terminal.say([(f"stopped; what is finished stays in {partial}, and the same command goes on from there", "yellow")])
        raise
    return 0


class Work:
    """What is shown of the work: what is being done, and how far it has got."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.doing, self.done, self.whole = "reading headers", 0, 0
        terminal.status(lambda: [self.row()])

    def progress(self, doing: str, done: int, whole: int) -> None:
        """So much of it is done."""
        self.doing, self.done, self.whole = doing, done, whole

    def row(self) -> Row:
        """One line: `writing 1.2 of 13.8 GB, 9 %`."""
        far = f" {amount(self.done)} of {amount(self.whole)}, {self.done / self.whole:.0%}" if self.whole else ""
        return [(f"{spinner()} ", "cyan"), (f"{self.doing}{far}", "dim")]


async def _export(folder: Path, target: Path, disk_backend: str, options: Mapping[str, Any], work: Work) -> None:
    async with Port() as port:
        disk, _ = open_disk(disk_backend, port, folder)
        try:
            verify = "verify" in options
            if "force" in options or not verify or not await anyio.Path(target).exists():
                checkpoint = await open_checkpoint(folder, disk, "published")
                written = await write_export(checkpoint, target, disk, work.progress, "force" in options)
                _say_written(work.terminal, target, written)
            if verify:
                await _verify(folder, target, disk, work)
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


async def _verify(folder: Path, target: Path, disk: Disk, work: Work) -> None:
    if (found := await find_export(target, disk)) is None:
        raise ModelError(f"{target} is not an export; make one: aollm export {folder}")
    try:
        published = (await open_checkpoint(folder, disk, "published")).files
    except ModelError:
        published = ()  # an export can be all that there is
    checkpoint = await open_export(found, disk, published, work.progress, again=True)
    work.terminal.status(None)
    tensors = f"{count(len(checkpoint.tensors), 'tensor')} in {count(len(checkpoint.files), 'file')}"
    work.terminal.line([(f"{found}: {tensors}, {amount(checkpoint.nbytes)}, ", ""), ("as they were exported", "green")])


def _say_written(terminal: Terminal, target: Path, written: Manifest) -> None:
    terminal.status(None)
    tensors = sum(len(summed.file.places) for summed in written.files)
    terminal.line([(f"{target}: {count(tensors, 'tensor')} in {count(len(written.files), 'file')}, {amount(written.nbytes)}", "")])
