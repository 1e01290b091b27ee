"""Passes: what sets the native tier apart, each checked against the assembled runtime by an effect that can be seen.

Checks run before the first token, on a few rows; none reads a weight. A pass that does not show its effect is never
reported as applied: the runtime falls back, or refuses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import anyio
import anyio.to_thread
import torch
from torch import Tensor

from .batch import Batch
from .checkpoint import Checkpoint
from .compute import FOREIGN, Compute
from .disk.base import Disk, Extent
from .errors import DiskError, SpecializationError
from .families.base import Angles, Attend, Params, Route, Step, Tower, Work
from .maths.attention import BLOCK, Block, attend
from .piece import Piece
from .placement import Place
from .runtime_plan import DISK_CACHE, RuntimePlan
from .settings import RuntimeConfig
from .stores.presets import PRESETS
from .stores.records import Records
from .sweep import Model, run_step

FEW = 3
"""Rows that a step is tried with."""


@dataclass(frozen=True, slots=True)
class Assembled:
    """What the checks look at."""

    config: RuntimeConfig
    plan: RuntimePlan
    model: Model
    tower: Tower | None
    tower_pieces: Sequence[Piece]
    checkpoint: Checkpoint
    disk: Disk
    compute: Compute


async def validated(runtime: Assembled) -> RuntimePlan:
    """The plan with each of its passes seen to hold. Raises `SpecializationError` for one that does not."""
    seen = []
    for planned in runtime.plan.passes:
        try:
            if planned.id == DISK_CACHE:
                root = runtime.config.cache_dir / PRESETS[runtime.config.kv_cache_strategy].root
                observed = await writes(runtime.model.cache.records, root, runtime.disk)
            else:
                observed = await runtime.compute.run(CHECKS[planned.id], runtime)
        except (*FOREIGN, OSError, DiskError) as error:
            raise _fails(planned.id, str(error) or type(error).__name__) from error
        seen.append(replace(planned, observed=observed))
    return replace(runtime.plan, passes=tuple(seen), specialization_state="applied")


async def writes(records: Records | None, root: Path, disk: Disk) -> str:
    """What was seen of `disk-cache`: the folder of `records` is under `root`, and takes a block. Raises `SpecializationError` or
    `DiskError` where that is not so."""
    folder = Path(records.volume.path) if records is not None else None
    if folder is None or not await anyio.to_thread.run_sync(_is_under, folder, root):
        raise _fails(DISK_CACHE, f"the store is at {folder}, not under {root}")
    file, block = folder / "PROBE", memoryview(bytearray(os.urandom(4096)))
    back = memoryview(bytearray(4096))
    try:
        await disk.write([Extent(str(file), 0, 4096)], [block])
        await disk.read_into([Extent(str(file), 0, 4096)], [back])
    finally:
        with anyio.CancelScope(shield=True):
            await disk.forget(str(file))
            with suppress(OSError):  # what keeps it from being removed kept it from being written
                await anyio.to_thread.run_sync(file.unlink)
    if back != block:
        raise _fails(DISK_CACHE, f"{folder} gives back other bytes than were written")
    return f"a block was written under {root} and read back"


def _is_under(folder: Path, root: Path) -> bool:
    """Whether `folder` is in `root`, neither of them being a link that leaves the folder that `root` is in."""
    return root.parent.resolve() / root.name in folder.resolve().parents


def _kept(runtime: Assembled, name: str, place: Place, where: str) -> str:
    """All that the placement has at a place is there, at hand."""
    weights, device = runtime.model.weights, runtime.model.device
    kept = [index for index, at in enumerate(runtime.plan.placement) if at == place]
    for index in kept:
        params, piece = weights.in_memory(index), weights.pieces[index]
        if params is None or any(device.holds(params[each]) != (place == "device" or not device.apart) for each in piece.params):
            raise _fails(name, f"{piece.label} is not {where}")
    return f"{len(kept)} of {len(weights.pieces)} pieces are {where}"


def _in_memory(runtime: Assembled) -> str:
    return _kept(runtime, "cpu-offload", "host", "in memory")


def _on_device(runtime: Assembled) -> str:
    return _kept(runtime, "gpu-offload", "device", f"on {runtime.model.device.name}")


def _chunks(runtime: Assembled) -> str:
    rows, seen = runtime.plan.chunk_rows + 1, list[int]()

    def run(weights: Params, x: Tensor, angles: Angles) -> Work:
        seen.append(x.shape[0])
        yield from ()
        return x

    batch = Batch([])
    batch.ids = [0] * rows
    for _ in run_step(runtime.model, Step(-1, "probe", {}, run), Params({}), batch, torch.zeros(rows, 1), (), None):
        raise _fails("mlp-chunking", "a step without attention waits for something")
    if sum(seen) != rows or max(seen) > min(runtime.plan.chunk_rows, 16_384):
        raise _fails("mlp-chunking", f"{rows} rows ran as {seen}")
    return f"{rows} rows ran as {' + '.join(map(str, seen))}"


def _routes(runtime: Assembled) -> str:
    steps = [step for step in runtime.model.family.steps if step.experts is not None]
    for step in steps:
        effect = _first_effect(runtime, step)
        assert step.experts is not None
        if not isinstance(effect, Route) or effect.experts.shape != (FEW, step.experts.top):
            raise _fails("moe-routing", f"layer {step.layer} does not route its rows")
    assert steps[0].experts is not None
    return f"a row asks for {steps[0].experts.top} of {steps[0].experts.count} experts in each of {len(steps)} layers"


def _folds(runtime: Assembled) -> str:
    steps = [step for step in runtime.model.family.steps if step.attends is not None]
    for step in steps:
        if not isinstance(_first_effect(runtime, step), Attend):
            raise _fails("attention-replacement", f"layer {step.layer} does not hand its attention over")
    generator = torch.Generator().manual_seed(0)
    rows = BLOCK + FEW
    q, k, v = (torch.randn(rows, 1, 8, generator=generator) for _ in range(3))
    blocks = [Block(0, k[:BLOCK], v[:BLOCK]), Block(BLOCK, k[BLOCK:], v[BLOCK:])]
    found = attend(q[-FEW:], blocks, rows - FEW, 8**-0.5)[:, 0]
    later = torch.ones(rows, rows, dtype=torch.bool).triu(1)[-FEW:]
    wanted = (q[-FEW:, 0] @ k[:, 0].T * 8**-0.5).masked_fill(later, -math.inf).softmax(-1) @ v[:, 0]
    if not (off := float((found - wanted).abs().max())) < 1e-4:
        raise _fails("attention-replacement", f"two blocks fold to something {off:.1e} away from their softmax")
    return f"{len(steps)} layers hand their attention over; two blocks fold to their softmax within {off:.0e}"


def _towers(runtime: Assembled) -> str:
    tower = runtime.tower
    if tower is None:
        raise _fails("multimodal-shell", "there is no tower")
    x = torch.empty(tower.largest(runtime.plan.max_context_tokens), device="meta")
    wanted = (tower.rows(x), runtime.model.family.hidden)
    for piece in runtime.tower_pieces:
        assert piece.step is not None
        weights = {name: torch.empty(param.shape, dtype=param.dtype, device="meta") for name, param in piece.params.items()}
        x = _result(piece.step.run(Params(weights), x, ()))
    if tuple(x.shape) != wanted or not wanted[0]:
        raise _fails("multimodal-shell", f"its largest {tower.kind} comes out as {list(x.shape)}, where {list(wanted)} is taken")
    return f"{tower.kind} parts become up to {wanted[0]} rows through {len(runtime.tower_pieces)} steps"


def _exported(runtime: Assembled) -> str:
    checkpoint = runtime.checkpoint
    if checkpoint.fingerprint is None:
        raise _fails("gds-export-weights", f"{checkpoint.folder} is not an export")
    root = os.path.realpath(checkpoint.folder) + os.sep
    if astray := [file for file in checkpoint.files if not os.path.realpath(file).startswith(root)]:
        raise _fails("gds-export-weights", f"{astray[0]} is read, which is not in {root}")
    known = set(checkpoint.files)
    extents = [extent for piece in runtime.model.weights.pieces for extent, _ in piece.reads]
    if other := [extent.file for extent in extents if extent.file not in known]:
        raise _fails("gds-export-weights", f"{other[0]} is read, which is not a file of the export")
    return f"all {len(extents)} reads of a pass are from {root}"


CHECKS: dict[str, Callable[[Assembled], str]] = {
    "cpu-offload": _in_memory,
    "gpu-offload": _on_device,
    "mlp-chunking": _chunks,
    "moe-routing": _routes,
    "attention-replacement": _folds,
    "multimodal-shell": _towers,
    "gds-export-weights": _exported,
}


def _first_effect(runtime: Assembled, step: Step) -> object:
    """What a step yields first, on a few rows; None if it yields nothing."""
    family = runtime.model.family
    piece = next(piece for piece in runtime.model.weights.pieces if piece.step is step)
    work = step.run(_Nothing(piece), torch.zeros(FEW, family.hidden, dtype=family.dtype), family.angles(torch.arange(FEW), FEW))
    try:
        return next(work, None)
    finally:
        work.close()


def _result(work: Work) -> Tensor:
    try:
        effect = next(work)
    except StopIteration as done:
        rows: Tensor = done.value
        return rows
    raise _fails("multimodal-shell", f"a step of the tower asks for {type(effect).__name__}")


class _Nothing(Params):
    """Weights that are all zero and take no memory. (Tensors on torch's meta device take none either, but 75 MB of modules.)"""

    def __init__(self, piece: Piece) -> None:
        super().__init__({name: torch.zeros((), dtype=param.dtype).expand(param.shape) for name, param in piece.params.items()})

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Zeros [T, out]."""
        return x.new_zeros(x.shape[0], self[name].shape[0])


def _fails(name: str, why: str) -> SpecializationError:
    return SpecializationError(f"pass {name} does not hold: {why}")
