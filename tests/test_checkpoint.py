"""Checkpoints: good folders give the bytes that safetensors gives; every bad one is refused by name, before anything is read for it."""

import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from aollm.checkpoint import DTYPES, HEADER_LIMIT, INDEX, INDEX_LIMIT, MAX_TENSORS, SINGLE, open_checkpoint, parse_header, read_json
from aollm.disk.base import Disk, Extent, Priority, Span
from aollm.disk.threads import ThreadsDisk
from aollm.errors import CheckpointError, DiskError, ModelError
from aollm.port import Port

pytestmark = pytest.mark.anyio


class BoundedDisk:
    """Passes reads on, and fails a test that reads past the end of a file or more than once over."""

    name = "bounded"

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self.nbytes: dict[str, int] = {}

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        for extent in extents:
            size = await self._disk.size(extent.file)
            self.nbytes[extent.file] = self.nbytes.get(extent.file, 0) + extent.nbytes
            assert extent.offset >= 0 and extent.end <= size and self.nbytes[extent.file] <= size
        return await self._disk.read_into(extents, buffers, priority)

    async def write(self, extents: Sequence[Extent], buffers: Sequence[memoryview]) -> Span:
        raise AssertionError("a checkpoint is never written")

    async def sync(self, file: str) -> None:
        raise AssertionError("a checkpoint is never written")

    async def size(self, file: str) -> int:
        return await self._disk.size(file)

    async def aclose(self) -> None:
        await self._disk.aclose()


class Shelf(BoundedDisk):
    """Files that exist nowhere but here."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(self)
        self._files = files

    async def read_into(self, extents: Sequence[Extent], buffers: Sequence[memoryview], priority: Priority = Priority.SOON) -> Span:
        for extent, buffer in zip(extents, buffers):
            buffer[:] = self._files[extent.file][extent.offset : extent.end]
        return Span(0.0, 0.0)

    async def size(self, file: str) -> int:
        if file not in self._files:
            raise DiskError(f"{file}: no such file")
        return len(self._files[file])


@pytest.fixture
async def disk() -> AsyncIterator[BoundedDisk]:
    async with Port() as port:
        disk = BoundedDisk(ThreadsDisk(port, threads=2))
        yield disk
        await disk.aclose()


def pack(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file; `header` is packed as it is if it is bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: Any, begin: Any, end: Any, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def one(**fields: Any) -> dict[str, Any]:
    """The header of a file with the four bytes of tensor w, some of its fields exchanged."""
    return {"w": entry([4], 0, 4) | fields}


def tensors_of(file: bytes) -> dict[str, Any]:
    length = int.from_bytes(file[:8], "little")
    return dict(parse_header(file[8 : 8 + length], 8 + length, len(file), "x.safetensors"))


# --- good folders


def random_tensors(seed: int, count: int, prefix: str = "model.layers") -> dict[str, torch.Tensor]:
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64]
    found = {}
    for i in range(count):
        shape = [draw.randrange(5) for _ in range(draw.randrange(5))]
        values = torch.randint(-100, 100, shape, generator=generator)
        found[f"{prefix}.{i}.self_attn.q_proj.weight"] = values.to(torch.float32).to(draw.choice(dtypes))
    return found


async def bytes_of(disk: Disk, extent: Extent) -> bytes:
    buffer = bytearray(extent.nbytes)
    await disk.read_into([extent], [memoryview(buffer)])
    return bytes(buffer)


async def assert_equal_to_safetensors(folder: Path, disk: Disk) -> int:
    """Every tensor of every file, as safetensors itself reads it; returns their number."""
    checkpoint = await open_checkpoint(folder, disk)
    count = nbytes = 0
    for file in checkpoint.files:
        with safetensors.safe_open(file, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118  it is no dict
                expected = reader.get_tensor(name)
                found = checkpoint[name]
                assert (found.name, found.shape, found.extent.file) == (name, tuple(expected.shape), file)
                assert found.dtype == reader.get_slice(name).get_dtype()
                assert found.extent.nbytes == expected.numel() * DTYPES[found.dtype]
                assert await bytes_of(disk, found.extent) == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
                count, nbytes = count + 1, nbytes + found.extent.nbytes
    assert (len(checkpoint.tensors), checkpoint.nbytes) == (count, nbytes)
    return count


@pytest.mark.parametrize("seed", range(8))
async def test_single_file_equals_safetensors(tmp_path: Path, disk: BoundedDisk, seed: int) -> None:
    save_file(random_tensors(seed, 20), tmp_path / SINGLE, metadata={"format": "pt"})
    assert await assert_equal_to_safetensors(tmp_path, disk) == 20


async def test_only_file_of_another_name(tmp_path: Path, disk: BoundedDisk) -> None:
    save_file(random_tensors(1, 3), tmp_path / "consolidated.safetensors")
    (tmp_path / "optimizer.pt").write_bytes(b"ignored")
    assert await assert_equal_to_safetensors(tmp_path, disk) == 3


def write_shards(folder: Path, shards: Mapping[str, dict[str, torch.Tensor]]) -> None:
    for shard, tensors in shards.items():
        save_file(tensors, folder / shard)
    picks = {name: shard for shard, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": picks}))


async def test_one_layer_over_several_shards_equals_safetensors(tmp_path: Path, disk: BoundedDisk) -> None:
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    tensors = list(random_tensors(3, 30).items())
    write_shards(tmp_path, {name: dict(tensors[i::3]) for i, name in enumerate(names)})
    assert await assert_equal_to_safetensors(tmp_path, disk) == 30
    checkpoint = await open_checkpoint(tmp_path, BoundedDisk(disk._disk))
    assert sorted(checkpoint.files) == [str(tmp_path / name) for name in names]
    assert repr(checkpoint) == f"<Checkpoint {tmp_path.name}: 30 tensors in 3 files, {checkpoint.nbytes / 1e9:.2f} GB>"


async def test_files_need_not_be_on_the_filesystem() -> None:
    shelf = Shelf({f"/nowhere/{SINGLE}": pack(one(), b"abcd")})
    checkpoint = await open_checkpoint(Path("/nowhere"), shelf)
    assert await bytes_of(shelf, checkpoint["w"].extent) == b"abcd"
    index = json.dumps({"weight_map": {"w": "b.safetensors"}}).encode()
    shelf = Shelf({f"/nowhere/{INDEX}": index, "/nowhere/b.safetensors": pack(one(), b"efgh")})
    assert (await open_checkpoint(Path("/nowhere"), shelf)).files == ("/nowhere/b.safetensors",)


async def test_the_index_decides_between_two_shards_and_unnamed_tensors_are_kept() -> None:
    header = {"w": entry([4], 0, 4), "v": entry([1], 4, 5)}
    index = json.dumps({"weight_map": {"w": "b.safetensors", "u": "a.safetensors"}}).encode()
    files = {INDEX: index, "a.safetensors": pack({**one(), "u": entry([0], 0, 0)}, b"wrng"), "b.safetensors": pack(header, b"rightv"[:5])}
    checkpoint = await open_checkpoint(Path("/m"), Shelf({f"/m/{name}": data for name, data in files.items()}))
    assert {name: found.extent.file for name, found in checkpoint.tensors.items()} == {
        "u": "/m/a.safetensors",
        "w": "/m/b.safetensors",
        "v": "/m/b.safetensors",
    }
    assert checkpoint.nbytes == 5


async def test_hugging_face_cache_layout(tmp_path: Path, disk: BoundedDisk) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file(random_tensors(5, 4), blobs / "c0ffee")
    (blobs / "beef").write_text('{"model_type": "llama"}')
    (snapshot / SINGLE).symlink_to("../../blobs/c0ffee")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    assert await assert_equal_to_safetensors(snapshot, disk) == 4
    assert await read_json(snapshot / "config.json") == {"model_type": "llama"}
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    assert await assert_equal_to_safetensors(linked, disk) == 4


async def test_link_within_the_folder(tmp_path: Path, disk: BoundedDisk) -> None:
    save_file(random_tensors(6, 4), tmp_path / "weights")
    (tmp_path / SINGLE).symlink_to("weights")
    assert await assert_equal_to_safetensors(tmp_path, disk) == 4


async def test_missing_tensor_names_the_nearest() -> None:
    header = {f"model.layers.{i}.mlp.{kind}_proj.weight": entry([0], 0, 0) for i in range(9) for kind in ("up", "gate")}
    checkpoint = await open_checkpoint(Path("/m"), Shelf({f"/m/{SINGLE}": pack(header)}))
    assert "model.layers.3.mlp.up_proj.weight" in checkpoint and "lm_head.weight" not in checkpoint
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.3\.mlp\.up\.weight.*model\.layers\.8\.mlp\.up_proj\.weight"):
        checkpoint["model.layers.3.mlp.up.weight"]


@pytest.mark.parametrize(
    ("file", "names"),
    [
        (pack({}), []),
        (pack(b"{}      "), []),
        (pack({"__metadata__": {"a": "NaN, {[,"}, **one()}, bytes(4)), ["w"]),
        (pack({"b": entry([2], 4, 6), "a": entry([1], 0, 4, "F32")}, bytes(6)), ["b", "a"]),
        (pack({"a": entry([0], 0, 0), "b": entry([3, 0], 0, 0, "F32"), "c": entry([], 0, 1)}, bytes(1)), ["a", "b", "c"]),
        (pack({"a": entry([2], 0, 2), "z": entry([0], 2, 2)}, bytes(2)), ["a", "z"]),
        (pack({"a/b:c-d.e_f": entry([1] * 8, 0, 1)}, bytes(1)), ["a/b:c-d.e_f"]),
        (pack({"w" * 512: entry([2**31, 0], 0, 0)}), ["w" * 512]),
    ],
)
def test_accepted_headers(file: bytes, names: list[str]) -> None:
    assert list(tensors_of(file)) == names
    assert sorted(name for name, _ in safetensors.deserialize(file)) == sorted(names)


# --- headers that lie

DUPLICATE = b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'
LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "the file is empty; download it again"),
    "seven bytes": (b"\x02" + bytes(6), "truncated"),
    "only a length": ((2).to_bytes(8, "little"), "claims 2 bytes"),
    "no header": (pack(b""), "does not start with {"),
    "git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html>Not found</html>", "no safetensors file"),
    "leading blank": (pack(b" {}"), "does not start with {"),
    "byte order mark": (pack(b"\xef\xbb\xbf{}"), "does not start with {"),
    "array": (pack(b"[]"), "does not start with {"),
    "two values": (pack(b"{}{}"), "Extra data"),
    "cut short": (pack(b'{"w":'), "Expecting value"),
    "not utf-8": (pack(b'{"\xff":0}'), "decode"),
    "utf-16": (pack("{}".encode("utf-16-le")), "Expecting property name"),
    "nul in text": (pack(b"{\0}"), "Expecting property name"),
    "key twice": (pack(DUPLICATE, bytes(4)), "'w' appears twice"),
    "escaped key twice": (pack(DUPLICATE.replace(b'"w"', b'"\\u0077"', 1), bytes(4)), "'w' appears twice"),
    "field twice": (pack(b'{"w":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)), "'dtype' appears twice"),
    "metadata twice": (pack(b'{"__metadata__":{"a":"1","a":"2"}}'), "'a' appears twice"),
    "NaN": (pack(b'{"__metadata__":{"a":NaN}}'), "NaN"),
    "Infinity": (pack(b'{"w":{"dtype":"U8","shape":[-Infinity],"data_offsets":[0,4]}}', bytes(4)), "Infinity"),
    "deep arrays": (pack(b'{"w":' + b"[" * 100_000), "nested too deeply"),
    "deep objects": (pack(b'{"w":' * 100_000), "nested too deeply"),
    "many values": (pack(b'{"w":[' + b"[]," * (16 * MAX_TENSORS) + b"0]}"), "values"),
    "number of 5000 digits": (pack(b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)), "digits"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata null": (pack({"__metadata__": None}), "__metadata__"),
    "metadata nested": (pack({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
    "name empty": (pack({"": entry([4], 0, 4)}, bytes(4)), "'' cannot be the name"),
    "name with blank": (pack({"a b": entry([4], 0, 4)}, bytes(4)), "'a b' cannot be the name"),
    "name with nul": (pack({"w\0": entry([4], 0, 4)}, bytes(4)), "cannot be the name"),
    "name with newline": (pack({"w\n": entry([4], 0, 4)}, bytes(4)), "cannot be the name"),
    "name not ascii": (pack({"ẅ": entry([4], 0, 4)}, bytes(4)), "cannot be the name"),
    "name of 513": (pack({"w" * 513: entry([4], 0, 4)}, bytes(4)), "cannot be the name"),
    "name of a megabyte": (pack({"w" * 1_000_000: entry([4], 0, 4)}, bytes(4)), "cannot be the name"),
    "entry is a list": (pack({"w": ["U8", [4], [0, 4]]}, bytes(4)), "tensor w is not described"),
    "entry lacks a field": (pack({"w": {"dtype": "U8", "shape": [4]}}, bytes(4)), "tensor w is not described"),
    "entry has one more": (pack(one(file="/etc/passwd"), bytes(4)), "tensor w is not described"),
    "dtype unknown": (pack(one(dtype="X8"), bytes(4)), "dtype 'X8'"),
    "dtype below a byte": (pack(one(dtype="F4", shape=[8]), bytes(4)), "dtype 'F4'"),
    "dtype is a list": (pack(one(dtype=["U8"]), bytes(4)), "tensor w has dtype"),
    "shape of bools": (pack(one(shape=[True, 4]), bytes(4)), "tensor w has shape"),
    "shape of floats": (pack(one(shape=[4.0]), bytes(4)), "tensor w has shape"),
    "shape of strings": (pack(one(shape=["4"]), bytes(4)), "tensor w has shape"),
    "shape negative": (pack(one(shape=[-2, -2]), bytes(4)), "tensor w has shape"),
    "shape no list": (pack(one(shape=4), bytes(4)), "tensor w has shape"),
    "shape too large": (pack(one(shape=[2**31 + 1])), "tensor w has shape"),
    "shape of 2^62 and 0": (pack(one(shape=[2**62, 0], data_offsets=[0, 0])), "tensor w has shape"),
    "shape wraps to 4": (pack(one(shape=[2**31, 2**31, 4]), bytes(4)), "tensor w has shape"),
    "rank 9": (pack(one(shape=[1] * 8 + [4]), bytes(4)), "tensor w has shape"),
    "offsets of bools": (pack(one(shape=[1], data_offsets=[False, True]), bytes(1)), "tensor w has data_offsets"),
    "offsets of floats": (pack(one(data_offsets=[0, 4e0]), bytes(4)), "tensor w has data_offsets"),
    "three offsets": (pack(one(data_offsets=[0, 2, 4]), bytes(4)), "tensor w has data_offsets"),
    "offsets negative": (pack(one(data_offsets=[-4, 0]), bytes(4)), "tensor w has data_offsets"),
    "offsets reversed": (pack(one(data_offsets=[4, 0]), bytes(4)), "tensor w has data_offsets"),
    "offsets null": (pack(one(data_offsets=None), bytes(4)), "tensor w has data_offsets"),
    "offsets beyond 64 bits": (pack(one(data_offsets=[2**64, 2**64 + 4]), bytes(4)), "hole"),
    "size is not the shape's": (pack(one(dtype="F32"), bytes(4)), "16 bytes, but data_offsets of 4 bytes"),
    "hole at the start": (pack(one(data_offsets=[4, 8]), bytes(8)), "tensor w, .* hole"),
    "hole between": (pack({"a": entry([1], 0, 1), "b": entry([1], 2, 3)}, bytes(3)), "tensor b, .* hole"),
    "overlap": (pack({"a": entry([2], 0, 2), "b": entry([2], 1, 3)}, bytes(3)), "tensor b, .* overlaps"),
    "the same bytes twice": (pack({"a": entry([2], 0, 2), "b": entry([2], 0, 2)}, bytes(2)), "tensor b, .* overlaps"),
    "zero bytes inside another": (pack({"a": entry([2], 0, 2), "b": entry([0], 1, 1)}, bytes(2)), "tensor b, .* overlaps"),
    "trailing byte": (pack(one(), bytes(5)), "trailing bytes"),
    "trailing bytes of nothing": (pack({}, bytes(1)), "trailing bytes"),
    "truncated by one": (pack(one(), bytes(3)), "truncated"),
    "truncated to the header": (pack(one()), "truncated"),
} | {f"length {n:#x}": (n.to_bytes(8, "little") + pack(one(), bytes(4))[8:], "claims") for n in (2**63, 2**64 - 1, 2**32, HEADER_LIMIT, 70)}


@pytest.mark.parametrize("lie", LIES)
async def test_lying_files_are_refused(tmp_path: Path, disk: BoundedDisk, lie: str) -> None:
    data, word = LIES[lie]
    (tmp_path / SINGLE).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"(?s)^{tmp_path}/{SINGLE}.*{word}") as caught:
        await open_checkpoint(tmp_path, disk)
    assert len(str(caught.value)) < 1000 and any(cure in str(caught.value) for cure in ("download it again", "save the model", "git lfs"))


async def test_long_header_is_refused_before_it_is_read(tmp_path: Path, disk: BoundedDisk) -> None:
    with (tmp_path / SINGLE).open("wb") as file:
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(3 * HEADER_LIMIT)
    with pytest.raises(CheckpointError, match="claims 33554433 bytes"):
        await open_checkpoint(tmp_path, disk)
    assert list(disk.nbytes.values()) == [8]


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (json.dumps({f"model.layers.{i}.weight": entry([0], 0, 0) for i in range(200_000)}).encode(), "200000 tensors"),
        (b'{"w":[' + b"[]," * (HEADER_LIMIT // 3) + b"0]}", "values"),
        (b'{"w":' + b"[" * HEADER_LIMIT, "values"),
        (b'{"w":' + b"9" * HEADER_LIMIT, "digits"),
        (b'{"' + b"w" * HEADER_LIMIT + b'":0}', "cannot be the name"),
    ],
    ids=["200,000 tensors", "lists", "depth", "digits", "name"],
)
def test_bloated_headers_are_refused_soon(header: bytes, word: str) -> None:
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=word):
        parse_header(header, 8 + len(header), 8 + len(header), "x.safetensors")
    assert time.thread_time() - start < 2.0  # of this thread: others may be busy


GOOD = {"__metadata__": {"format": "pt"}, "a": entry([2, 3], 0, 24, "F32"), "b": entry([], 24, 26, "BF16"), "c": entry([0], 26, 26)}
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, 4, 24, 26, "U8", "F32"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def assert_refused_or_sound(header: bytes) -> None:
    """Nothing but `CheckpointError` comes out; what is accepted covers the data, and safetensors accepts it too."""
    file = pack(header, bytes(26))
    try:
        found = tensors_of(file)
    except CheckpointError:
        return
    assert sum(each.extent.nbytes for each in found.values()) == 26
    assert {name: list(each.shape) for name, each in found.items()} == {name: each["shape"] for name, each in safetensors.deserialize(file)}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 2), st.binary(max_size=4)), min_size=1, max_size=4))
def test_mutated_bytes_raise_nothing_else(changes: list[tuple[int, int, bytes]]) -> None:
    header = json.dumps(GOOD).encode()
    for at, cut, added in changes:
        header = header[:at] + added + header[at + cut :]
    assert_refused_or_sound(header)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["__metadata__", "a", "b", "c", "d"]), st.sampled_from([None, "dtype", "shape", "data_offsets", "format", "e"]), junk
)
def test_mutated_values_raise_nothing_else(name: str, field: str | None, value: Any) -> None:
    header: dict[str, Any] = {key: dict(fields) for key, fields in GOOD.items()}
    if field is None:
        header[name] = value
    else:
        header.setdefault(name, {})[field] = value
    assert_refused_or_sound(json.dumps(header).encode())


# --- indexes that lie


def index(value: Any) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": value}).encode()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((index({"w": shard}), "plain name") for shard in ("/etc/passwd", "/tmp/x.safetensors", "../x.safetensors", "a/x.safetensors")),
        *(
            (index({"w": shard}), "plain name")
            for shard in ("..\\x.safetensors", "%2e%2e%2fx.safetensors", "x\0.safetensors", "x.safetensors\n")
        ),
        *((index({"w": shard}), "plain name") for shard in ("x.bin", "x.safetensors/", ".safetensors", "", 5, None, ["x.safetensors"])),
        (index({"w": "a" * 300 + ".safetensors"}), "plain name"),
        (index(["x.safetensors"]), "no weight_map"),
        (index({}), "no weight_map"),
        (b"{}", "no weight_map"),
        (b"[]", "not a JSON object"),
        (b"", "Expecting value"),
        (b'{"weight_map":{"w":"a.safetensors","w":"b.safetensors"}}', "'w' appears twice"),
        (b'{"metadata":{"total_size":NaN},"weight_map":{"w":"a.safetensors"}}', "NaN"),
        (b'{"weight_map":' + b"[" * 100_000, "nested too deeply"),
        (index({"w": "gone.safetensors"}), "gone.safetensors cannot be opened"),
        (index({"v": "a.safetensors"}), "a.safetensors lacks tensor 'v'"),
        (index({"a": "a.safetensors", "b": "b.safetensors"}), r"tensor w is in .*a.safetensors and in b.safetensors"),
    ],
)
async def test_lying_indexes_are_refused(tmp_path: Path, disk: BoundedDisk, text: bytes, word: str) -> None:
    (tmp_path / INDEX).write_bytes(text)
    (tmp_path / "a.safetensors").write_bytes(pack({"a": entry([0], 0, 0), **one()}, bytes(4)))
    (tmp_path / "b.safetensors").write_bytes(pack({"b": entry([0], 0, 0), **one()}, bytes(4)))
    with pytest.raises(CheckpointError, match=word):
        await open_checkpoint(tmp_path, disk)


async def test_large_index_is_refused_unread(tmp_path: Path, disk: BoundedDisk) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(INDEX_LIMIT + 1)
    with pytest.raises(CheckpointError, match="16777217 bytes"):
        await open_checkpoint(tmp_path, disk)
    assert disk.nbytes == {}


# --- folders that are something else


def outside(folder: Path) -> Path:
    save_file({"w": torch.ones(1)}, folder.parent / "secret")
    return folder.parent / "secret"


def in_cache(folder: Path, target: str) -> Path:
    snapshot = folder / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "blobs").mkdir()
    outside(folder / "models--a--b" / "snapshots")
    outside(folder / "models--a--b" / "blobs")
    (snapshot / SINGLE).symlink_to(target)
    return snapshot


def shard_link(folder: Path) -> None:
    (folder / INDEX).write_bytes(index({"w": "a.safetensors"}))
    (folder / "a.safetensors").symlink_to(outside(folder))


def shard_fifo(folder: Path) -> None:
    (folder / INDEX).write_bytes(index({"w": "a.safetensors"}))
    os.mkfifo(folder / "a.safetensors")


def bins(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (folder / "config.json").write_text("{}")


def two(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(pack(one(), bytes(4)))


def loop(folder: Path) -> None:
    (folder / SINGLE).symlink_to("b")
    (folder / "b").symlink_to(SINGLE)


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda folder: folder / "gone", ModelError, "No such file"),
        (outside, ModelError, "Not a directory"),
        (lambda folder: None, ModelError, "no \\*.safetensors file; download the model's weights"),
        (lambda folder: (folder / "a.gguf").touch(), ModelError, "no \\*.safetensors file; a.gguf .*GGUF is not read.*as safetensors"),
        (bins, ModelError, "only pickles .pytorch_model.bin.*save_pretrained"),
        (two, ModelError, "2 \\*.safetensors files and no model.safetensors.index.json"),
        (lambda folder: (folder / SINGLE).symlink_to(outside(folder)), CheckpointError, "leaves the model folder"),
        (lambda folder: (folder / SINGLE).symlink_to("../secret"), CheckpointError, "leaves the model folder"),
        (lambda folder: (folder / SINGLE).symlink_to("/dev/zero"), CheckpointError, "leaves the model folder"),
        (lambda folder: (folder / INDEX).symlink_to(outside(folder)), CheckpointError, "leaves the model folder"),
        (lambda folder: (folder / "x.safetensors").symlink_to(outside(folder)), CheckpointError, "leaves the model folder"),
        (shard_link, CheckpointError, "a.safetensors is a link that leaves"),
        (lambda folder: in_cache(folder, "../../secret"), CheckpointError, "leaves the model folder"),
        (lambda folder: in_cache(folder, "../secret"), CheckpointError, "leaves the model folder"),
        (lambda folder: in_cache(folder, "../../blobs/gone"), CheckpointError, "not a regular file, nor a link to one"),
        (lambda folder: (folder / SINGLE).symlink_to("gone"), CheckpointError, "not a regular file, nor a link to one"),
        (loop, CheckpointError, "not a regular file"),
        (lambda folder: (folder / SINGLE).mkdir(), CheckpointError, "not a regular file"),
        (lambda folder: os.mkfifo(folder / SINGLE), CheckpointError, "not a regular file"),
        (lambda folder: os.mkfifo(folder / INDEX), CheckpointError, "not a regular file"),
        (shard_fifo, CheckpointError, "a.safetensors is not a regular file"),
    ],
)
async def test_odd_folders_are_refused_unread(
    tmp_path: Path, disk: BoundedDisk, make: Callable[[Path], Path | None], error: type[ModelError], word: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    folder = make(folder) or folder
    with anyio.fail_after(5), pytest.raises(error, match=word) as caught:
        await open_checkpoint(folder, disk)
    assert type(caught.value) is error
    assert [file for file in disk.nbytes if not file.endswith(INDEX)] == []


# --- read_json


async def test_read_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, {"b": Infinity}], "c": "é"}')
    assert await read_json(tmp_path / "config.json") == {"a": [1, {"b": float("inf")}], "c": "é"}


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"[]", "not a JSON object"),
        (b"", "Expecting value"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' appears twice"),
        (b'{"a": "\xff"}', "decode"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{" + b" " * 20_000 + b"}", "larger than 20000 bytes"),
        (None, "is no model's folder: it has no config.json; give the folder that has one"),
    ],
)
async def test_read_json_refuses(tmp_path: Path, text: bytes | None, word: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match=rf"^{tmp_path}{'.' if text is None else '/config.json.*'}{word}"):
        await read_json(tmp_path / "config.json", limit=20_000 if b" " * 9 in (text or b"") else 1 << 20)


async def test_read_json_refuses_what_is_not_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to("../secret")
    with pytest.raises(ModelError, match="leaves the model folder"):
        await read_json(tmp_path / "model" / "config.json")
    os.mkfifo(tmp_path / "config.json")
    with anyio.fail_after(5), pytest.raises(ModelError, match="not a regular file"):
        await read_json(tmp_path / "config.json")
