"""Fingerprints change with what results depend on, and with nothing else."""

import json
from pathlib import Path

import pytest

from aollm.errors import DiskError
from aollm.fingerprint import configuration, tokenizer, weights


def write_shard(path: Path, header: bytes = b'{"a":1}', nbytes: int = 2_000_000) -> str:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    return str(path)


def test_weights(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path / name) for name in ("b.safetensors", "a.safetensors")]
    first = weights(shards)
    assert first == weights(shards[::-1]) and len(first) == 64
    assert weights(shards[:1]) != first
    size = Path(shards[0]).stat().st_size
    for at in (9, size - 1, size // 2 // 4096):
        data = bytearray(Path(shards[0]).read_bytes())
        data[at] ^= 1
        Path(shards[0]).write_bytes(data)
        assert weights(shards) != first
        data[at] ^= 1
        Path(shards[0]).write_bytes(data)
    assert weights(shards) == first
    write_shard(tmp_path / "b.safetensors", nbytes=2_000_001)
    assert weights(shards) != first


@pytest.mark.parametrize("data", [b"", b"abc", (100).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_damaged_weights_are_an_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(DiskError):
        weights([str(tmp_path / "a.safetensors")])
    with pytest.raises(DiskError, match="check the path"):
        weights([str(tmp_path / "none")])


def test_a_tiny_shard(tmp_path: Path) -> None:
    assert weights([write_shard(tmp_path / "a", nbytes=0)]) != weights([write_shard(tmp_path / "b", nbytes=1)])


def test_tokenizer(tmp_path: Path) -> None:
    found = {tokenizer(tmp_path)}
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).write_text("one")
        found.add(tokenizer(tmp_path))
    (tmp_path / "README.md").write_text("no part of it")
    assert len(found) == 4 and tokenizer(tmp_path) in found
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(DiskError):
        tokenizer(tmp_path)


def test_configuration() -> None:
    config = {"hidden_size": 8, "torch_dtype": "bfloat16", "text_config": {"rope_theta": 1e4, "use_cache": True}, "limit": float("inf")}
    same = json.loads(json.dumps({"transformers_version": "5", "_name_or_path": "x", **dict(reversed(config.items()))}))
    same["text_config"]["use_cache"] = False
    assert configuration(config) == configuration(same)
    for name, value in (("torch_dtype", "float16"), ("text_config", {"rope_theta": 1e5}), ("new", None)):
        assert configuration({**config, name: value}) != configuration(config)
