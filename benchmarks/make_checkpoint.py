"""Write a checkpoint of random weights in a published model's exact shapes and file layout.

    python benchmarks/make_checkpoint.py --shape llama-3.2-3b --out DIR [--layers N] [--dtype bf16]

Speed and memory of a streamed model depend on shapes and files, not on what the weights say. Weights are slices of one
block of small normal numbers, so writing runs at the drive's speed and memory stays near 200 MB. It knows no model library.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from shapes import Config, Shape, Tensor, read_published
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ITEMSIZE = {"bf16": 2, "f16": 2, "f32": 4}
DTYPE_NAME = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
BLOCK_ELEMENTS = 33_554_393  # a prime, so that no two rows of a tensor are the same slice of the block
MXFP4_EXPONENT = 120  # 2 ** (120 - 127): values up to 6 * 2 ** -7
WRITE_NBYTES = 64 << 20
PUBLISHED = read_published(Path(__file__).with_name("published.json"))


def encoded(values: np.ndarray, dtype: str) -> bytes:
    """The bytes of float32 `values` as `dtype` (bf16 by dropping the low half)."""
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(np.float16 if dtype == "f16" else np.float32).tobytes()


class Filler:
    """Yields a tensor's bytes, a piece at a time, from one random block."""

    def __init__(self, dtype: str, seed: int = 0) -> None:
        self.itemsize = ITEMSIZE[dtype]
        generator = np.random.default_rng(seed)
        values = generator.standard_normal(BLOCK_ELEMENTS, dtype=np.float32)
        values *= 0.02
        self.normal = memoryview(encoded(values, dtype))
        self.blocks = memoryview(generator.bytes(BLOCK_ELEMENTS))
        self.one = encoded(np.ones(1, dtype=np.float32), dtype)

    def pieces(self, tensor: Tensor) -> Iterator[memoryview | bytes]:
        left = tensor.nbytes(self.itemsize)
        if tensor.fill not in ("normal", "blocks"):
            unit = {"one": self.one, "zero": bytes(1), "scale": bytes([MXFP4_EXPONENT])}[tensor.fill]
            while left:
                nbytes = min(left, WRITE_NBYTES)
                yield unit * (nbytes // len(unit))
                left -= nbytes
            return
        source, itemsize = (self.blocks, 1) if tensor.fill == "blocks" else (self.normal, self.itemsize)
        start = zlib.crc32(tensor.name.encode()) % BLOCK_ELEMENTS * itemsize
        while left:
            piece = source[start : start + left]
            yield piece
            left -= len(piece)
            start = 0


def shards(shape: Shape, config: Config, itemsize: int) -> dict[str, list[Tensor]]:
    """File name -> tensors: cut in module order at the published shard size, sorted inside as safetensors sorts."""
    cuts: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in shape.tensors(config):
        nbytes = tensor.nbytes(itemsize)
        if cuts[-1] and filled + nbytes > shape.shard_nbytes:
            cuts.append([])
            filled = 0
        cuts[-1].append(tensor)
        filled += nbytes
    for cut in cuts:
        cut.sort(key=lambda tensor: (tensor.quantized, tensor.name))
    if len(cuts) == 1:
        return {"model.safetensors": cuts[0]}
    last = len(cuts) - 1 + shape.first_shard
    return {f"model-{n:05d}-of-{last:05d}.safetensors": cut for n, cut in enumerate(cuts, shape.first_shard)}


def header(tensors: list[Tensor], dtype: str) -> bytes:
    """The safetensors header: 8 bytes of length, JSON, spaces up to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes(ITEMSIZE[dtype])
        kind = "U8" if tensor.quantized else dtype.upper()
        entries[tensor.name] = {"dtype": kind, "shape": tensor.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, tensors: list[Tensor], dtype: str, filler: Filler) -> int:
    """Write one file, sync it, and leave none of it in the page cache; the bytes written."""
    with path.open("wb", buffering=0) as file:
        nbytes = file.write(header(tensors, dtype))
        for tensor in tensors:
            for piece in filler.pieces(tensor):
                view = memoryview(piece)
                while view:
                    written = file.write(view)
                    view, nbytes = view[written:], nbytes + written
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return nbytes


def write_tokenizer(folder: Path, config: Config) -> None:
    """A byte-level tokenizer without merges: bytes at 256 to 511, the model's own bos and eos ids."""
    text = config.get("text_config", config)
    eos = config.get("eos_token_id", text.get("eos_token_id", 2))
    end = eos[0] if isinstance(eos, list) else eos
    begin = config.get("bos_token_id", text.get("bos_token_id", 2 if end == 1 else 1))
    special = {"<|begin|>": begin, "<|end|>": end}
    vocabulary = {letter: 256 + n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | special, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True))
    names = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


def write_checkpoint(shape: Shape, config: Config, dtype: str, out: Path) -> None:
    """Write every file into a temporary folder beside `out`, then rename it."""
    files = shards(shape, config, ITEMSIZE[dtype])
    sizes = {tensor.name: tensor.nbytes(ITEMSIZE[dtype]) for tensors in files.values() for tensor in tensors}
    total = sum(sizes.values())
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < total + (64 << 20):
        raise OSError(f"{total / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; choose fewer --layers or another --out")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        filler, done, begin = Filler(dtype), 0, time.perf_counter()
        for name, tensors in files.items():
            done += write_shard(partial / name, tensors, dtype, filler)
            rate = done / (time.perf_counter() - begin) / 1e9
            print(f"{name}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  {rate:.2f} GB/s", file=sys.stderr, flush=True)
        if len(files) > 1:
            where = {tensor.name: name for name, tensors in files.items() for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tokenizer(partial, config)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description="write random weights in a published model's shapes and file layout")
    parser.add_argument("--shape", required=True, choices=PUBLISHED, metavar="NAME", help=", ".join(PUBLISHED))
    parser.add_argument("--out", required=True, type=Path, help="folder to create")
    parser.add_argument("--layers", type=int, help="keep only the first N decoder layers")
    parser.add_argument("--dtype", default="bf16", choices=ITEMSIZE)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; remove it or name another folder")
    shape = PUBLISHED[arguments.shape]
    try:
        config = shape.sliced(arguments.layers)
    except ValueError as error:
        parser.error(str(error))
    config["torch_dtype"] = DTYPE_NAME[arguments.dtype]
    try:
        write_checkpoint(shape, config, arguments.dtype, arguments.out)
    except OSError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
