"""Exports: the same bytes through every disk, however often it was interrupted; and whatever is wrong with one is said by name."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import tiny
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aollm import Runtime
from aollm.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from aollm.cli import main
from aollm.disk.base import Disk, Extent, Priority, Span
from aollm.disk.memory import MemoryDisk
from aollm.disk.portable import PortableDisk
from aollm.disk.threads import ThreadsDisk
from aollm.disk.uring import UringDisk, probe
from aollm.errors import CheckpointError, DiskError, ModelError
from aollm.export.layout import BLOCK, RawFile, lay_out
from aollm.export.manifest import NAME, Manifest, parse_manifest
from aollm.export.opening import open_export
from aollm.export.stamp import NAME as STAMP
from aollm.export.stamp import settled, states
from aollm.export.writer import write_export
from aollm.port import Port

pytestmark = pytest.mark.anyio

MAKE: dict[str, Callable[[Port], Disk]] = {
    "threads": ThreadsDisk,
    "threads-buffered": lambda port: ThreadsDisk(port, direct=False),
    "uring": UringDisk,
    "portable": lambda port: PortableDisk(),
}
DISKS = [
    pytest.param(name, marks=[pytest.mark.skipif(probe() is not None, reason="no io_uring here")] if name == "uring" else [])
    for name in MAKE
]
PROGRAM = [sys.executable, "-m", "aollm"]


@asynccontextmanager
async def opened(kind: str = "threads") -> AsyncIterator[Disk]:
    async with Port() as port:
        disk = MAKE[kind](port)
        try:
            yield disk
        finally:
            with anyio.CancelScope(shield=True):
                await disk.aclose()


class Watched:
    """Passes on what it is asked for, counts it, and does `after` when a file has been made durable."""

    name = "watched"

    def __init__(self, disk: Disk, after: Callable[[int], object] = lambda synced: None) -> None:
        self._disk, self._after = disk, after
        self.written: list[Extent] = []
        self.read: list[Extent] = []
        self.synced = 0

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        self.read += extents
        return await self._disk.read_into(extents, buffers, priority)

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        span = await self._disk.write(extents, buffers)
        self.written += extents
        self._after(-len(self.written))
        return span

    async def sync(self, file: str) -> None:
        await self._disk.sync(file)
        self.synced += 1
        self._after(self.synced)

    async def forget(self, file: str) -> None:
        await self._disk.forget(file)

    async def size(self, file: str) -> int:
        return await self._disk.size(file)

    async def aclose(self) -> None:
        await self._disk.aclose()

    @property
    def raw(self) -> int:
        """Bytes that were read of raw files."""
        return sum(extent.nbytes for extent in self.read if extent.file.endswith(".raw"))


# ---- models


def random(shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, tuple(shape), dtype=dtype)
    return torch.randn(tuple(shape)).to(dtype)


def mixtral(folder: Path) -> Path:
    """Two layers of three experts each, as Mixtral calls them, in two shards."""
    torch.manual_seed(1)
    tensors = {"model.embed_tokens.weight": random((300, 256)), "lm_head.weight": random((300, 256)), "model.norm.weight": random((256,))}
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": random((256, 256)) for name in "kqvo"}
        tensors |= {f"{at}.{name}.weight": random((256,)) for name in ("input_layernorm", "post_attention_layernorm")}
        tensors[f"{at}.block_sparse_moe.gate.weight"] = random((3, 256))
        for expert in range(3):
            for name, shape in (("w1", (400, 256)), ("w2", (256, 400)), ("w3", (400, 256))):
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{name}.weight"] = random(shape)
    return write_model(folder, tensors, shards=2)


def gpt_oss(folder: Path) -> Path:
    """Two layers whose four experts are fused, as gpt-oss calls them; one matrix spans blocks, and one tensor is empty."""
    torch.manual_seed(2)
    tensors = {"model.embed_tokens.weight": random((2100, 2048)), "model.norm.weight": random((64,), torch.float32)}
    tensors["nothing"] = random((0, 3))
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors[f"{at}.self_attn.sinks"] = random((7,))
        tensors |= {
            f"{at}.self_attn.{name}_proj.{kind}": random((96, 96) if kind == "weight" else (96,))
            for name in "qkv"
            for kind in ("weight", "bias")
        }
        for name, rows in (("gate_up_proj", 320), ("down_proj", 96)):
            tensors[f"{at}.mlp.experts.{name}_blocks"] = random((4, rows, 20, 16), torch.uint8)
            tensors[f"{at}.mlp.experts.{name}_scales"] = random((4, rows, 20), torch.uint8)
            tensors[f"{at}.mlp.experts.{name}_bias"] = random((4, rows))
    return write_model(folder, tensors, shards=1)


def write_model(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> Path:
    folder.mkdir()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    picks = {}
    for number in range(shards):
        shard = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / shard)
        picks |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": picks}))
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {"llama": tiny.save, "mixtral": mixtral, "gpt-oss": gpt_oss}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make(folder / name) for name, make in MODELS.items()}


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    """The fused one, to be altered."""
    return Path(shutil.copytree(models["gpt-oss"], tmp_path / "model"))


async def bytes_of(disk: Disk, entry: TensorEntry) -> bytes:
    buffer = bytearray(entry.extent.nbytes)
    await disk.read_into([entry.extent], [memoryview(buffer)])
    return bytes(buffer)


async def assert_same(source: Checkpoint, export: Checkpoint, disk: Disk, source_disk: Disk | None = None) -> None:
    """Every tensor of the source is in the export, whole or row by row, and nothing else."""
    count = 0
    for name, entry in source.tensors.items():
        rows = range(entry.shape[0]) if name not in export else None
        for index in rows if rows is not None else [None]:
            expected = entry if index is None else source.row(name, index)
            found = export[name] if index is None else export.row(name, index)
            assert (found.name, found.dtype, found.shape) == (expected.name, expected.dtype, expected.shape)
            assert found.extent.offset % (4096 if found.extent.nbytes >= 65536 else 64) == 0
            assert await bytes_of(disk, found) == await bytes_of(source_disk or disk, expected), found.name
            count += 1
    assert (count, source.nbytes) == (len(export.tensors), export.nbytes)


async def export(folder: Path, target: Path | None = None, **options: Any) -> Manifest:
    async with opened() as disk:
        return await write_export(await open_checkpoint(folder, disk, "published"), target or folder / "gds_export", disk, **options)


# ---- where things go


def entry(name: str, nbytes: int, offset: int = 0) -> TensorEntry:
    return TensorEntry(name, "U8", (nbytes,), Extent("/m/model.safetensors", offset, nbytes))


def laid_out(**sizes: int) -> dict[str, RawFile]:
    at, tensors = 0, {}
    for name, nbytes in sizes.items():
        tensors[name] = entry(name, nbytes, at)
        at += nbytes
    return {file.path: file for file in lay_out(Checkpoint(Path("/m"), tensors, ("/m/model.safetensors",), at))}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.embed_tokens.weight", "rest.raw"),
        ("model.norm.weight", "rest.raw"),
        ("model.layers.3.self_attn.q_proj.weight", "layer-0003/dense.raw"),
        ("layers.12.norm.weight", "layer-0012/dense.raw"),
        ("model.language_model.layers.0.linear_attn.A_log", "layer-0000/dense.raw"),
        ("model.layers.3.mlp.experts.17.gate_proj.weight", "layer-0003/expert-0017.raw"),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", "layer-0003/dense.raw"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", "layer-0003/expert-0000.raw"),
        ("model.layers.3.mlp.experts.gate_up_proj_bias", "layer-0003/dense.raw"),
        ("model.layers.99999999.norm.weight", "rest.raw"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "rest.raw"),
    ],
)
def test_names_say_where_a_tensor_goes(name: str, path: str) -> None:
    assert list(laid_out(**{name: 5})) == [path]


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_up_proj_blocks", "down_proj_scales", "gate_proj.weight"])
def test_fused_experts_are_cut(name: str) -> None:
    whole = TensorEntry(f"model.layers.1.mlp.experts.{name}", "BF16", (3, 5, 7), Extent("/m/a", 100, 210))
    files = lay_out(Checkpoint(Path("/m"), {whole.name: whole}, ("/m/a",), 210))
    assert [(file.path, file.places[0].entry) for file in files] == [
        (f"layer-0001/expert-000{i}.raw", TensorEntry(f"{whole.name}[{i}]", "BF16", (5, 7), Extent("/m/a", 100 + 70 * i, 70)))
        for i in range(3)
    ]


def test_a_layer_lies_in_the_order_of_need() -> None:
    big, at = 128 << 10, "model.layers.0"
    sizes = {f"{at}.input_layernorm.weight": 100, f"{at}.mlp.down_proj.weight": big, f"{at}.mlp.gate_proj.weight": big}
    sizes |= {f"{at}.mlp.up_proj.weight": big, f"{at}.post_attention_layernorm.weight": 100, f"{at}.self_attn.k_proj.bias": 64}
    sizes |= {f"{at}.self_attn.k_proj.weight": big, f"{at}.self_attn.o_proj.weight": big + 5, f"{at}.self_attn.q_proj.bias": 192}
    sizes |= {f"{at}.self_attn.q_proj.weight": 2 * big, f"{at}.self_attn.v_proj.bias": 64, f"{at}.self_attn.v_proj.weight": big}
    file = laid_out(**sizes)["layer-0000/dense.raw"]
    found = [(place.entry.name.removeprefix(f"{at}."), place.offset) for place in file.places]
    assert found == [
        ("input_layernorm.weight", 0), ("self_attn.q_proj.bias", 128), ("self_attn.k_proj.bias", 320), ("self_attn.v_proj.bias", 384),
        ("self_attn.q_proj.weight", 4096), ("self_attn.k_proj.weight", 4096 + 2 * big), ("self_attn.v_proj.weight", 4096 + 3 * big),
        ("self_attn.o_proj.weight", 4096 + 4 * big), ("post_attention_layernorm.weight", 4096 + 5 * big + 64),
        ("mlp.gate_proj.weight", 8192 + 5 * big), ("mlp.up_proj.weight", 8192 + 6 * big), ("mlp.down_proj.weight", 8192 + 7 * big),
    ]  # fmt: skip
    assert file.nbytes == 8192 + 8 * big


@pytest.mark.parametrize(("k", "offsets"), [(8192, [0, 81920, 90112]), (8200, [0, 81920, 94208]), (64, [0, 81920, 86016])])
def test_a_stack_lies_together_whatever_its_sizes(k: int, offsets: list[int]) -> None:
    at = "model.layers.0.self_attn"
    file = laid_out(**{f"{at}.k_proj.weight": k, f"{at}.q_proj.weight": 81920, f"{at}.v_proj.weight": k})["layer-0000/dense.raw"]
    assert [(place.entry.name[-13], place.offset) for place in file.places] == list(zip("qkv", offsets))


def test_experts_lie_gate_up_down() -> None:
    at = "model.layers.0.block_sparse_moe.experts.1"
    file = laid_out(**{f"{at}.w1.weight": 70_000, f"{at}.w2.weight": 70_000, f"{at}.w3.weight": 70_000})["layer-0000/expert-0001.raw"]
    assert [(place.entry.name[-9:-7], place.offset) for place in file.places] == [("w1", 0), ("w3", 73728), ("w2", 147456)]


def test_too_many_tensors() -> None:
    whole = TensorEntry("layers.1.experts.down_proj", "U8", (200_000, 1), Extent("/m/a", 0, 200_000))
    with pytest.raises(ModelError, match="would hold 200000 tensors, more than 131072"):
        lay_out(Checkpoint(Path("/m"), {whole.name: whole}, ("/m/a",), 200_000))


def test_a_row_of_what_is_there() -> None:
    whole = TensorEntry("x", "F32", (3, 2), Extent("/m/a", 8, 24))
    checkpoint = Checkpoint(Path("/m"), {"x": whole, "y[1]": entry("y[1]", 4), "z": entry("z", 4)}, ("/m/a",), 32)
    assert checkpoint.row("x", 2) == TensorEntry("x[2]", "F32", (2,), Extent("/m/a", 24, 8))
    assert checkpoint.row("y", 1) == entry("y[1]", 4)
    for name, index in (("x", 3), ("x", -1), ("y", 0), ("w", 0)):
        with pytest.raises(CheckpointError, match=re.escape(f"{name}")):
            checkpoint.row(name, index)


# ---- the same bytes


@pytest.mark.parametrize("kind", DISKS)
@pytest.mark.parametrize("name", MODELS)
async def test_an_export_holds_the_bytes_of_its_source(models: dict[str, Path], name: str, kind: str, tmp_path: Path) -> None:
    async with opened(kind) as disk:
        source = await open_checkpoint(models[name], disk)
        target = tmp_path / "gds_export"
        written = await write_export(source, target, disk)
        assert not list(tmp_path.glob("*.partial"))
        found = await open_checkpoint(tmp_path, disk)
        await assert_same(source, found, disk)
        assert (
            sorted(found.files) == sorted(str(path) for path in target.rglob("*.raw")) == [str(target / s.file.path) for s in written.files]
        )
        assert found.fingerprint is not None and source.fingerprint is None
        memory = MemoryDisk({str(path): path.read_bytes() for path in target.rglob("*") if path.is_file()})
        await assert_same(source, await open_export(target, memory), memory, disk)


async def test_a_block_is_read_summed_and_written_at_a_time(models: dict[str, Path], tmp_path: Path) -> None:
    async with opened() as disk:
        watched = Watched(disk)
        done: list[tuple[str, int, int]] = []
        source = await open_checkpoint(models["gpt-oss"], watched)
        written = await write_export(source, tmp_path / "e", watched, lambda *of: done.append(of))
        assert max(extent.nbytes for extent in watched.written) == BLOCK
        assert all(extent.offset % 4096 == extent.nbytes % 4096 == 0 for extent in watched.written)
        assert sum(extent.nbytes for extent in watched.written) == written.nbytes == done[-1][1] == done[-1][2]
        assert done == sorted(done) and {doing for doing, *_ in done} == {"writing"}


async def test_what_is_between_tensors_is_zero(tmp_path: Path) -> None:
    sizes = [4_000_001 + 123_457 * number for number in range(12)]  # more than the ring holds, and each block elsewhere in it
    tensors = {f"layers.{number // 2}.{number}": torch.full((nbytes,), 255, dtype=torch.uint8) for number, nbytes in enumerate(sizes)}
    model = write_model(tmp_path / "m", tensors, shards=1)
    for summed in (await export(model)).files:
        data, at = (model / "gds_export" / summed.file.path).read_bytes(), 0
        for place in summed.file.places:
            assert not any(data[at : place.offset]), summed.file.path
            at = place.end
        assert not any(data[at:]) and len(data) == summed.file.nbytes


async def test_a_runtime_answers_from_an_export_alone(models: dict[str, Path], tmp_path: Path) -> None:
    ids = tiny.prompt(40)
    async with Runtime.open(models["llama"], offload_cpu_layers=0) as runtime:
        expected = await tiny.ours(runtime, ids)
    folder = tmp_path / "alone"
    await export(models["llama"], folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == sorted(
        [*(path.name for path in models["llama"].glob("*.json")), NAME, STAMP, "rest.raw"]
    )
    beside = Path(shutil.copytree(models["llama"], tmp_path / "beside"))
    await export(beside)
    (beside / "model.safetensors").unlink()
    for place in (folder, beside):
        for disk_backend in ("threads", "uring", "portable"):
            async with Runtime.open(place, offload_cpu_layers=0, disk_backend=disk_backend) as runtime:
                found = await tiny.ours(runtime, ids)
            assert found.ids == expected.ids
            torch.testing.assert_close(found.logprobs, expected.logprobs)  # other addresses: the last bit may differ


async def test_modes_are_those_of_the_model(model: Path) -> None:
    model.chmod(0o755)
    (model / "model.safetensors").chmod(0o644)
    await export(model)
    modes = {oct(path.stat().st_mode & 0o777) for path in (model / "gds_export").rglob("*") if path.is_file()}
    folders = {oct(path.stat().st_mode & 0o777) for path in (model / "gds_export", model / "gds_export" / "layer-0000")}
    assert (modes, folders) == ({"0o644"}, {"0o755"})


# ---- which weights are meant


async def test_published_files_come_first_unless_the_export_is_asked_for(model: Path) -> None:
    await export(model)
    async with opened() as disk:
        published = await open_checkpoint(model, disk)
        assert published.files == (str(model / "model.safetensors"),)
        assert (await open_checkpoint(model, disk, "export")).files[-1] == str(model / "gds_export" / "rest.raw")
        assert (await open_checkpoint(model / "gds_export", disk)).files[-1] == str(model / "gds_export" / "rest.raw")


async def test_an_index_that_stayed_behind_does_not_hide_the_export(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["mixtral"], tmp_path / "m"))
    await export(folder)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    async with opened() as disk:
        assert len((await open_checkpoint(folder, disk)).tensors) == 3 + 2 * (7 + 9)
        with pytest.raises(CheckpointError, match=r"weight file model-0000[12]-of-00002\.safetensors cannot be opened"):
            await open_checkpoint(folder, disk, "published")


async def test_a_folder_without_an_export(model: Path, tmp_path: Path) -> None:
    (model / NAME).write_text("{}")  # another program's
    async with opened() as disk:
        assert len((await open_checkpoint(model, disk)).files) == 1
        with pytest.raises(ModelError, match=r"has no export.*aollm export"):
            await open_checkpoint(model, disk, "export")
    (model / "model.safetensors").unlink()
    async with opened() as disk:
        with pytest.raises(ModelError, match=r"has no \*\.safetensors file"):
            await open_checkpoint(model, disk)
        with pytest.raises(ModelError, match="is not an export"):
            await open_export(tmp_path, disk)


# ---- interruptions


class Interrupted(Exception):
    pass


def interrupt(at: int) -> Callable[[int], None]:
    """Raise when file `at` is durable, or when block -`at` is written."""

    def after(count: int) -> None:
        if count == at:
            raise Interrupted

    return after


@pytest.mark.parametrize("at", [*range(1, 12), -1, -2, -3, -9])
async def test_an_interrupted_export_goes_on(models: dict[str, Path], tmp_path: Path, at: int) -> None:
    target = tmp_path / "e"
    async with opened() as disk:
        source = await open_checkpoint(models["gpt-oss"], disk)
        with pytest.raises(Interrupted):
            await write_export(source, target, Watched(disk, interrupt(at)))
    assert not target.exists() and (tmp_path / "e.partial").is_dir()
    finished = (tmp_path / "e.partial" / "journal").read_bytes().count(b"\n") - 1
    async with opened() as disk:
        watched = Watched(disk)
        source = await open_checkpoint(models["gpt-oss"], watched)
        await write_export(source, target, watched)
        assert watched.synced == 11 - finished  # files
        assert not finished or watched.raw > 0  # what was there has been checked
        await assert_same(source, await open_export(target, disk), disk)
    assert finished == (at - 1 if at > 0 else min(-at - 1, finished))


async def test_a_cancelled_export_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    async with opened() as disk:
        source = await open_checkpoint(models["gpt-oss"], disk)
        with anyio.CancelScope() as scope:
            await write_export(source, tmp_path / "e", disk, lambda doing, done, whole: scope.cancel() if done > whole / 2 else None)
        assert scope.cancelled_caught
        watched = Watched(disk)
        written = await write_export(source, tmp_path / "e", watched)
        assert 0 < sum(extent.nbytes for extent in watched.written) < written.nbytes
        await assert_same(source, await open_export(tmp_path / "e", disk), disk)


KILLED = """
import os, signal, anyio
from pathlib import Path
from aollm.checkpoint import open_checkpoint
from aollm.disk.threads import ThreadsDisk
from aollm.export.writer import write_export
from aollm.port import Port

class Ending(ThreadsDisk):
    done = dict(write=0, sync=0)

    def count(self, what):
        self.done[what] += 1
        if (what, self.done[what]) == {at}:
            os.kill(os.getpid(), signal.SIGKILL)

    async def write(self, extents, buffers):
        await super().write(extents, buffers)
        self.count("write")

    async def sync(self, file):
        await super().sync(file)
        self.count("sync")

async def main():
    async with Port() as port:
        disk = Ending(port)
        await write_export(await open_checkpoint(Path({model!r}), disk), Path({target!r}), disk)

anyio.run(main)
"""


@pytest.mark.parametrize("at", [("sync", 4), ("write", 6)])
async def test_a_killed_export_goes_on(models: dict[str, Path], tmp_path: Path, at: tuple[str, int]) -> None:
    program = KILLED.format(at=at, model=str(models["gpt-oss"]), target=str(tmp_path / "e"))
    ended = await anyio.run_process([sys.executable, "-c", program], check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    async with opened() as disk:
        watched = Watched(disk)
        source = await open_checkpoint(models["gpt-oss"], watched)
        await write_export(source, tmp_path / "e", watched)
        assert 0 < watched.synced < 11
        await assert_same(source, await open_export(tmp_path / "e", disk), disk)


async def halfway(model: Path, target: Path, at: int = 6) -> Path:
    """The folder that an export leaves which ended when file `at` was durable, and not yet noted."""
    async with opened() as disk:
        with pytest.raises(Interrupted):
            await write_export(await open_checkpoint(model, disk), target, Watched(disk, interrupt(at)))
    return target.with_name(target.name + ".partial")


def alter(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda partial: None, 6),
    "a file altered": (lambda partial: alter(partial / "layer-0000/expert-0001.raw", 70_000), 7),
    "a file cut": (lambda partial: os.truncate(partial / "layer-0000/expert-0001.raw", 4096), 7),
    "a file removed": (lambda partial: (partial / "layer-0000/dense.raw").unlink(), 7),
    "a folder removed": (lambda partial: shutil.rmtree(partial / "layer-0000"), 11),
    "the journal cut": (lambda partial: os.truncate(partial / "journal", (partial / "journal").stat().st_size - 9), 7),
    "the journal altered": (lambda partial: alter(partial / "journal", 5), 11),
    "the journal emptied": (lambda partial: os.truncate(partial / "journal", 0), 11),
    "a file too many": (lambda partial: (partial / "rest.raw").write_bytes(bytes(99 << 20)), 6),
    "a temporary file": (lambda partial: (partial / ".manifest.json.00").touch(), 6),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
async def test_what_was_left_is_checked(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    damage, left = DAMAGE[case]
    damage(await halfway(models["gpt-oss"], tmp_path / "e"))
    async with opened() as disk:
        watched = Watched(disk)
        source = await open_checkpoint(models["gpt-oss"], watched)
        await write_export(source, tmp_path / "e", watched)
        assert watched.synced == left
        await assert_same(source, await open_export(tmp_path / "e", disk), disk)
    files = {str(path.relative_to(tmp_path / "e")) for path in (tmp_path / "e").rglob("*") if path.is_file()}
    assert files - {f"layer-000{i}/{name}.raw" for i in (0, 1) for name in ("dense", *(f"expert-000{e}" for e in range(4)))} == {
        NAME, STAMP, "rest.raw",
    }  # fmt: skip


async def test_other_weights_begin_anew(models: dict[str, Path], model: Path, tmp_path: Path) -> None:
    await halfway(model, tmp_path / "e")
    for other in (models["mixtral"], models["gpt-oss"]):  # another layout; the same, and other files
        async with opened() as disk:
            watched = Watched(disk)
            source = await open_checkpoint(other, watched)
            written = await write_export(source, tmp_path / "e", watched)
            assert watched.synced == len(written.files)
            await assert_same(source, await open_export(tmp_path / "e", disk), disk)
        shutil.rmtree(tmp_path / "e")
        await halfway(model, tmp_path / "e")


async def test_two_at_a_time(models: dict[str, Path], tmp_path: Path) -> None:
    async with opened() as disk:
        source = await open_checkpoint(models["gpt-oss"], disk)
        refused: list[ModelError] = []

        async def second() -> None:
            with pytest.raises(ModelError, match="is being written by another process") as caught:
                await write_export(source, tmp_path / "e", disk)
            refused.append(caught.value)

        async with anyio.create_task_group() as group:
            begun = False

            def progress(doing: str, done: int, whole: int) -> None:
                nonlocal begun
                if not begun:
                    group.start_soon(second)
                begun = True

            await write_export(source, tmp_path / "e", disk, progress)
        assert len(refused) == 1
        await assert_same(source, await open_export(tmp_path / "e", disk), disk)


# ---- targets


async def test_an_export_is_replaced_only_when_asked(model: Path) -> None:
    await export(model)
    with pytest.raises(ModelError, match=r"is there already; --verify reads and checks it, --force makes it again"):
        await export(model)
    before = (model / "gds_export" / NAME).read_bytes()
    save_file({"model.layers.0.w": torch.ones(5)}, model / "model.safetensors")
    await export(model, replace=True)
    assert (model / "gds_export" / NAME).read_bytes() != before
    assert sorted(path.name for path in (model / "gds_export").iterdir()) == ["layer-0000", NAME, STAMP]
    assert sorted(path.name for path in model.iterdir()) == ["gds_export", "model.safetensors"]


TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file": (lambda target: target.write_text("mine"), "is not a folder"),
    "a link": (lambda target: target.symlink_to(target.parent), "is not a folder"),
    "papers": (lambda target: (target.mkdir(), (target / "thesis.tex").touch()), "holds thesis.tex"),
    "no manifest": (lambda target: (target.mkdir(), (target / "config.json").touch()), "has no manifest.json"),
    "an unfinished something": (
        lambda target: ((partial := target.with_name("e.partial")).mkdir(0o700), (partial / "a").touch()), "e.partial is there, with a",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TARGETS)
async def test_a_target_that_is_no_export_is_left_alone(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    make, message = TARGETS[case]
    make(tmp_path / "e")
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        with pytest.raises(ModelError, match=message):
            await export(models["gpt-oss"], tmp_path / "e", replace=True)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    await export(models["gpt-oss"], tmp_path / "empty")


async def test_too_little_room(tmp_path: Path) -> None:
    nbytes = 8 << 40
    header = json.dumps({"w": {"dtype": "U8", "shape": [1 << 20, 8 << 20], "data_offsets": [0, nbytes]}}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)  # a hole: it takes no room
    with pytest.raises(DiskError, match=r"needs 8192\.00 GiB more, and the drive has [\d.]+ \w+ free: free [\d.]+ GiB, or .*--output"):
        await export(tmp_path)


# ---- what is wrong with an export


@pytest.fixture(scope="module")
def exported(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(models["gpt-oss"], folder)
    anyio.run(export, folder)
    return folder


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """An export without its source, known to be whole, to be altered."""
    target = tmp_path / "model" / "gds_export"
    shutil.copytree(exported / "gds_export", target)

    async def check() -> None:
        async with opened() as disk:
            await open_export(target, disk)

    anyio.run(check)
    assert json.loads((target / STAMP).read_text())["files"]["rest.raw"][0] == (target / "rest.raw").stat().st_ino
    return target


def quietly(path: Path, at: int) -> None:
    """Alter one byte, and have the file say that it was not altered."""
    status = path.stat()
    alter(path, at)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def exchange(target: Path) -> None:
    """Two files of one size change places."""
    one, two = target / "layer-0000/expert-0000.raw", target / "layer-0000/expert-0001.raw"
    one.rename(target / "x")
    two.rename(one)
    (target / "x").rename(two)


EXPERT = "layer-0001/expert-0002.raw"
ILL: dict[str, tuple[Callable[[Path], object], str]] = {
    "one byte": (lambda e: alter(e / EXPERT, 70_000), r"expert-0002\.raw: the bytes of tensor .*gate_up_proj_blocks\[2\] are not those"),
    "one byte, the time restored": (lambda e: quietly(e / EXPERT, 70_000), r"expert-0002\.raw: the bytes of tensor .*blocks\[2\] are not"),
    "the first byte": (lambda e: alter(e / "rest.raw", 0), r"rest\.raw: the bytes of tensor model\.\w+\.weight are not"),
    "a byte between tensors": (lambda e: alter(e / EXPERT, -1), r"expert-0002\.raw: bytes between its tensors are not those"),
    "two files": (lambda e: [alter(e / EXPERT, 0), alter(e / "rest.raw", 0)], r"expert-0002\.raw.*and 1 more files are damaged"),
    "exchanged": (exchange, r"expert-0000\.raw: the bytes of tensor .*\[0\] and 3 more are not those"),
    "cut": (lambda e: os.truncate(e / EXPERT, 8192), r"expert-0002\.raw is truncated: it has 8192 bytes of \d+"),
    "emptied": (lambda e: os.truncate(e / EXPERT, 0), r"expert-0002\.raw is truncated: it has 0 bytes"),
    "grown": (lambda e: os.truncate(e / "rest.raw", 1 << 30), r"rest\.raw has trailing bytes"),
    "removed": (lambda e: (e / EXPERT).unlink(), r"expert-0002\.raw is missing"),
    "a folder removed": (lambda e: shutil.rmtree(e / "layer-0001"), r"layer-0001/dense\.raw is missing"),
    "a folder in its place": (lambda e: ((e / "rest.raw").unlink(), (e / "rest.raw").mkdir()), r"rest\.raw is not a regular file"),
    "a pipe in its place": (lambda e: ((e / "rest.raw").unlink(), os.mkfifo(e / "rest.raw")), r"rest\.raw is not a regular file"),
    "a link out": (
        lambda e: ((e / "rest.raw").rename(e.parent / "r"), (e / "rest.raw").symlink_to(e.parent / "r")), r"rest\.raw is a link that",
    ),
    "a folder that is a link out": (
        lambda e: ((e / "layer-0000").rename(e.parent / "l"), (e / "layer-0000").symlink_to(e.parent / "l")), "is a link that leaves",
    ),
    "manifest altered": (lambda e: alter(e / NAME, 700), r"manifest\.json: "),
    "manifest cut": (lambda e: os.truncate(e / NAME, 5000), r"manifest\.json: "),
    "manifest emptied": (lambda e: os.truncate(e / NAME, 0), r"manifest\.json: "),
    "manifest a link out": (
        lambda e: ((e / NAME).rename(e.parent / "m"), (e / NAME).symlink_to(e.parent / "m")), r"manifest\.json is a link that leaves",
    ),
    "all a link out": (lambda e: (e.rename(e.parents[1] / "x"), e.symlink_to(e.parents[1] / "x")), "is a link that leaves"),
}  # fmt: skip


@pytest.mark.parametrize("case", ILL)
async def test_an_export_that_is_not_what_it_was(damaged: Path, case: str) -> None:
    damage, message = ILL[case]
    damage(damaged)
    async with opened() as disk:
        for _ in range(2):  # a refusal leaves nothing by which it would be taken the second time
            with pytest.raises(CheckpointError, match=message):
                await open_export(damaged, disk)


async def test_an_export_of_other_weights(damaged: Path, models: dict[str, Path]) -> None:
    source = Path(shutil.copy(models["gpt-oss"] / "model.safetensors", damaged.parent))
    async with opened() as disk:
        assert (await open_checkpoint(damaged.parent, disk, "export")).folder == damaged
    alter(source, -1)
    async with opened() as disk:
        with pytest.raises(CheckpointError, match=r"was made from other weights.*aollm export MODEL --force"):
            await open_checkpoint(damaged.parent, disk, "export")
        assert (await open_checkpoint(damaged.parent, disk)).files == (str(source),)


async def test_what_is_known_to_be_whole_is_not_read_again(damaged: Path, tmp_path: Path) -> None:
    whole = sum(path.stat().st_size for path in damaged.rglob("*.raw"))

    async def read(folder: Path, again: bool = False) -> int:
        async with opened() as disk:
            watched = Watched(disk)
            await open_export(folder, watched, again=again)
            return watched.raw

    assert await read(damaged) == 0
    assert await read(damaged, again=True) == whole
    moved = damaged.rename(tmp_path / "moved")
    assert await read(moved) == 0
    copied = Path(shutil.copytree(moved, tmp_path / "copied"))
    assert (await read(copied), await read(copied)) == (whole, 0)
    os.utime(copied / "rest.raw")
    assert (await read(copied), await read(copied)) == (whole, 0)
    for text in ("", "{}", "[1]", (copied / STAMP).read_text()[:-9], (moved / STAMP).read_text()):
        (copied / STAMP).write_text(text)
        assert await read(copied) == whole
    (copied / STAMP).unlink()
    (copied / STAMP).mkdir()  # it cannot be kept: all is read each time
    assert (await read(copied), await read(copied)) == (whole, whole)
    assert [path.name for path in copied.iterdir() if path.name.startswith(".")] == []


async def test_what_is_written_from_now_on_is_seen(tmp_path: Path) -> None:
    for _ in range(10):
        (tmp_path / "a").write_bytes(b"one")
        before = await settled(tmp_path, ["a", "b"])
        (tmp_path / "a").write_bytes(b"two")
        assert list(before) == ["a"] and states(tmp_path, ["a"]) != before


async def test_an_export_in_the_hub_cache(damaged: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(damaged, snapshot / "gds_export")
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    async with opened() as disk:
        assert len((await open_checkpoint(snapshot, disk)).files) == 11
        (snapshot / "gds_export" / "rest.raw").unlink()
        (snapshot / "gds_export" / "rest.raw").symlink_to(damaged / "rest.raw")
        with pytest.raises(CheckpointError, match=r"rest\.raw is a link that leaves"):
            await open_checkpoint(snapshot, disk)


# ---- manifests that lie


def forge(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The manifest, changed, with a checksum that fits."""
    fields = json.loads(data)
    change(fields)
    fields.pop("checksum", None)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**fields, "checksum": xxhash.xxh3_128(text).hexdigest()}).encode()


def renamed(path: str) -> Callable[[dict[str, Any]], object]:
    def change(fields: dict[str, Any]) -> None:
        fields["files"][path] = fields["files"].pop("rest.raw")
        for tensor in fields["tensors"].values():
            tensor["file"] = path if tensor["file"] == "rest.raw" else tensor["file"]

    return change


def tensor(name: str = "model.norm.weight", **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields["tensors"][name].update(values)


def put(where: str, key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda fields: fields[where].__setitem__(key, value)


PATHS = [
    "/etc/passwd", "../rest.raw", "layer-0000/../../x.raw", "layer-0000\\x.raw", "", ".", "rest.raw/", "./rest.raw", "x.raw", "rest.raw\n",
    "layer-1/dense.raw", "layer-0000/dense.safetensors", "layer-\u0660\u0660\u0660\u0660/dense.raw", "manifest.json", "~/rest.raw",
]  # fmt: skip
FUSED = "model.layers.0.mlp.experts.down_proj_blocks"
LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{
        f"path {path}": (renamed(path), "not the path of a file|are refused")
        for path in PATHS
    },
    **{f"pickle {suffix}": (renamed(f"rest.{suffix}"), "pickles can run code") for suffix in ("bin", "pt", "pth", "ckpt", "pkl", "pickle")},
    "another format": (lambda fields: fields.update(format="zip"), "its format is 'zip'"),
    "a later version": (lambda fields: fields.update(version=2), r"has version 2, and this program knows 1"),
    "version true": (lambda fields: fields.update(version=True), "version True"),
    "a field too many": (lambda fields: fields.update(code="x"), "does not consist of"),
    "a field too few": (lambda fields: fields.pop("source"), "does not consist of"),
    "source": (lambda fields: fields.update(source="0"), "source is '0'"),
    "no files": (lambda fields: fields.update(files={}), "do not map names"),
    "files a list": (lambda fields: fields.update(files=[]), "do not map names"),
    "tensors a text": (lambda fields: fields.update(tensors="x"), "do not map names"),
    "file a number": (put("files", "rest.raw", 5), "not described by nbytes and checksum"),
    "file too large": (put("files", "rest.raw", {"nbytes": 1 << 60, "checksum": "0" * 32}), "nbytes is 1152921504606846976"),
    "file of half a page": (put("files", "rest.raw", {"nbytes": 2048, "checksum": "0" * 32}), "not a whole number of 4096 bytes"),
    "file without bytes": (put("files", "rest.raw", {"nbytes": 0, "checksum": "0" * 32}), "has no bytes"),
    "file smaller than its tensors": (put("files", "rest.raw", {"nbytes": 4096, "checksum": "0" * 32}), "ends at byte .* which has 4096"),
    "file checksum": (put("files", "rest.raw", {"nbytes": 1 << 20, "checksum": "x" * 32}), "checksum is 'x"),
    "tensor name": (put("tensors", "a b", {}), "'a b' cannot be the name"),
    "tensor name of a row": (put("tensors", "a[01]", {}), "cannot be the name"),
    "tensor a list": (put("tensors", "a", []), "not described by dtype"),
    "tensor elsewhere": (tensor(file="layer-9999/dense.raw"), "which is not among its files"),
    "tensor nowhere": (tensor(file=5), "is in file 5"),
    "dtype": (tensor(dtype="PICKLE"), "has dtype 'PICKLE'"),
    "shape": (tensor(shape=[-1]), "has shape"),
    "shape of floats": (tensor(shape=[64.0]), "has shape"),
    "shape too large": (tensor(shape=[1 << 31] * 8), "bytes, but says 256"),
    "nbytes": (tensor(nbytes=255), "has shape .* 256 bytes, but says 255"),
    "offset negative": (tensor(offset=-64), "offset is -64"),
    "offset odd": (tensor(offset=1), "offset is 1"),
    "offset true": (tensor(offset=True), "offset is True"),
    "offset beyond": (tensor(offset=1 << 40), "ends at byte"),
    "offset of a large one": (tensor("model.embed_tokens.weight", offset=64), "offset is 64, not a whole number of 4096"),
    "overlap": (tensor("model.embed_tokens.weight", offset=0), "overlaps the one before it"),
    "tensor checksum": (tensor(checksum=5), "checksum is 5"),
    "whole and by rows": (
        lambda fields: fields["tensors"].update({FUSED: {**fields["tensors"]["nothing"], "offset": 1 << 20}}), "listed whole and by rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_manifest_that_lies(exported: Path, case: str) -> None:
    change, message = LIES[case]
    folder = exported / "gds_export"
    data = (folder / NAME).read_bytes()
    assert parse_manifest(forge(data, lambda fields: None), folder) == parse_manifest(data, folder)
    with pytest.raises(CheckpointError, match=message):
        parse_manifest(forge(data, change), folder)


def test_a_manifest_says_what_it_sums_up_to(exported: Path) -> None:
    data = (exported / "gds_export" / NAME).read_bytes()
    for at in (match.start(1) for match in list(re.finditer(rb'"(?:source|checksum)": "(\w)', data))[::7]):
        other = b"%c" % (data[at] ^ 1)
        with pytest.raises(CheckpointError, match="does not have the checksum that it says"):
            parse_manifest(data[:at] + other + data[at + 1 :], exported / "gds_export")


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"\xff", b'{"format": "aollm-gds-export", "format": 1}', b"[" * 100_000, b'{"format": NaN}', b"9" * 5000,
     b'{"format":"aollm-gds-export","version":1,"source":' + b"[" * 900 + b"]" * 900 + b"}", b"{" + b"[]," * 3_000_000],
    ids=lambda data: data[:12].decode(errors="replace"),
)  # fmt: skip
def test_a_manifest_that_is_none(data: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"manifest\.json: "):
        parse_manifest(data, Path("/x"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_manifest_raises_anything_else(exported: Path, data: st.DataObject) -> None:
    folder = exported / "gds_export"

    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for _ in range(data.draw(st.integers(0, 2))):
            inner = [key for key in sorted(place) if isinstance(place[key], dict)]
            place = place[data.draw(st.sampled_from(inner))] if inner else place
        place[data.draw(st.sampled_from(sorted(place)) | st.text(max_size=8))] = data.draw(JSON)

    try:
        found = parse_manifest(forge((folder / NAME).read_bytes(), change), folder)
    except CheckpointError:
        return
    for summed in found.files:
        assert (folder / summed.file.path).resolve().is_relative_to(folder.resolve())
        assert all(place.end <= summed.file.nbytes for place in summed.file.places)


# ---- the command


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def aollm(*arguments: object) -> tuple[int, str, str]:
        return (main([str(argument) for argument in ("export", *arguments)]), *capsys.readouterr())

    code, out, errors = aollm(model, "--verify")
    assert (code, errors) == (0, "")
    first, second = out.splitlines()
    assert re.fullmatch(rf"{re.escape(str(model))}/gds_export: 53 tensors in 11 files, [\d.]+ MB", first)
    assert re.fullmatch(rf"{re.escape(str(model))}/gds_export: 53 tensors in 11 files, [\d.]+ MB, as they were exported", second)
    code, out, errors = aollm(model)
    assert (code, out) == (1, "") and "is there already" in errors
    assert aollm(model, "--force")[0] == aollm(model, "--output", tmp_path / "out")[0] == 0
    (model / "model.safetensors").unlink()
    assert aollm(model, "--verify") == (0, second + "\n", "")
    alter(model / "gds_export" / "rest.raw", 5000)
    code, out, errors = aollm(model, "--verify")
    assert (code, out) == (1, "")
    assert re.search(r"aollm: error: .*rest\.raw: the bytes of tensor model\.embed_tokens\.weight are not those", errors)
    assert "has no *.safetensors file" in aollm(model, "--force")[2]
    assert aollm(tmp_path / "none")[0] == aollm(tmp_path / "out", "--force")[0] == 1
    assert aollm(model, "--output", "")[0] == 2


def test_ctrl_c_leaves_what_can_be_gone_on_with(tmp_path: Path) -> None:
    layers, each = 40, 24 << 20
    header = json.dumps(
        {f"layers.{i}.w": {"dtype": "U8", "shape": [each], "data_offsets": [i * each, (i + 1) * each]} for i in range(layers)}
    ).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + layers * each)  # a hole: it is quickly made
    (tmp_path / "config.json").write_text("{}")
    process = subprocess.Popen([*PROGRAM, "export", tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "gds_export.partial" / "journal"
    try:
        while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
            pass
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert (process.returncode, out) == (130, ""), errors
    assert re.fullmatch(r"stopped; what is finished stays in \S+/gds_export\.partial, and the same command goes on from there\n", errors)
    assert 1 < journal.read_bytes().count(b"\n") <= layers
