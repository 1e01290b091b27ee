"""Stores that are not ours to use: of another model or version, altered, or where others can write. A clear error or a named
miss, and the store as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from pydantic import ValidationError

from aollm.disk.calls import Calls
from aollm.errors import AollmError, StoreError, first_of
from aollm.maths.attention import BLOCK
from aollm.settings import RuntimeConfig
from aollm.stores.cache import Cache
from aollm.stores.compaction import compact
from aollm.stores.manifest import parse
from aollm.stores.record import Header, Place, payload_sum
from aollm.stores.record import Kind as RecordKind
from aollm.stores.volume import Volume

from .checking import check, inspect
from .damage import build
from .load import drop, write
from .opening import Kind, session
from .sequences import SHAPE, ids

KIND = Kind("chunked")
NAME = (7, 8)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(root: Path, kind: Kind = KIND) -> str:
    async def nothing(cache: Cache) -> None:
        raise AssertionError("it was opened")

    with pytest.raises((StoreError, ExceptionGroup)) as raised:
        anyio.run(session, root, kind, nothing)
    assert isinstance(first_of(raised.value), StoreError)
    return str(first_of(raised.value))


def test_a_store_of_another_model_is_a_named_miss(tmp_path: Path) -> None:
    volume, _ = build(tmp_path / "root", KIND)
    before = content(volume)
    reasons: list[str | None] = []

    async def body(cache: Cache) -> None:
        store = cache.open()
        reached, reason = await cache.adopt(store, ids(NAME))
        assert reached == 0
        reasons.append(reason)

    anyio.run(session, tmp_path / "root", Kind("chunked", weights="2"), body)
    assert reasons[0] is not None and "other weights" in reasons[0]
    assert content(volume) == before
    assert anyio.run(inspect, tmp_path / "root", KIND, [NAME]).tokens == {NAME: 2 * BLOCK}


def test_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    volume, _ = build(tmp_path / "root", KIND)
    head = parse((volume / "manifest").read_bytes(), str(volume)).head
    assert head is not None
    payload = b'{"version":2}'
    header = Header(RecordKind.HEAD, head.identity.digest, bytes(16), head.generation, 1, nbytes=len(payload))
    (volume / "manifest").write_bytes(header.pack(payload_sum([payload])) + payload)
    before = content(volume)
    assert "newer version" in refused(tmp_path / "root")
    assert content(volume) == before


def test_another_preset_s_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    volume, _ = build(tmp_path / "root", KIND)
    before = content(volume)
    assert "purge it" in refused(tmp_path / "root", Kind("paged"))
    assert content(volume) == before


def test_a_foreign_file_in_place_of_the_log_is_set_aside_or_cleared(tmp_path: Path) -> None:
    volume, promises = build(tmp_path / "root", KIND)
    (volume / "manifest").write_bytes(os.urandom(10_000))
    found = anyio.run(inspect, tmp_path / "root", KIND, promises.known)
    assert found.gave_up and set(found.tokens.values()) == {0} and not found.wrong


@pytest.mark.parametrize("name", ["manifest", "LOCK"])
def test_a_link_in_place_of_a_file_is_refused_and_what_it_names_is_left_alone(tmp_path: Path, name: str) -> None:
    volume, _ = build(tmp_path / "root", KIND)
    (tmp_path / "target").write_bytes((volume / name).read_bytes())
    (volume / name).unlink()
    (volume / name).symlink_to(tmp_path / "target")
    before = (tmp_path / "target").read_bytes()
    assert "symbolic link" in refused(tmp_path / "root")
    assert (tmp_path / "target").read_bytes() == before


def test_a_link_in_place_of_stored_blocks_is_a_miss(tmp_path: Path) -> None:
    volume, promises = build(tmp_path / "root", KIND)
    (volume / "chunks").rename(tmp_path / "target")
    (volume / "chunks").symlink_to(tmp_path / "target")
    before = (tmp_path / "target").read_bytes()
    found = anyio.run(inspect, tmp_path / "root", KIND, promises.known)
    assert set(found.tokens.values()) == {0} and not found.wrong
    assert (tmp_path / "target").read_bytes() == before


@pytest.mark.parametrize("which", ["root", "shelf", "volume"])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, which: str) -> None:
    volume, _ = build(tmp_path / "root", KIND)
    folder = {"root": tmp_path / "root", "shelf": volume.parent, "volume": volume}[which]
    folder.chmod(0o770)
    before = content(tmp_path / "root")
    assert "chmod 700" in refused(tmp_path / "root")
    assert content(tmp_path / "root") == before


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    class ReadOnly(Calls):
        def open(self, name: str, flags: int, mode: int = 0o600, folder: int | None = None) -> int:
            if flags & (os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            return super().open(name, flags, mode, folder)

    volume, _ = build(tmp_path / "root", KIND)
    before = content(volume)
    opening = partial(Volume.open, tmp_path / "root", KIND.identity, KIND.row.persistence_format, BLOCK, SHAPE.layers, ReadOnly())
    with pytest.raises(AollmError, match=r"[Rr]ead-only.*writable"):
        opening()
    assert content(volume) == before


def test_a_window_of_no_tokens_and_one_without_its_strategy_are_refused() -> None:
    with pytest.raises(ValidationError, match="kv_cache_window_tokens"):
        RuntimeConfig(model_reference="demo", kv_cache_strategy="sliding-window-ring-buffer", kv_cache_window_tokens=0)


def test_blocks_that_follow_another_process_s_are_found_again(tmp_path: Path) -> None:
    """Each process has a volume of its own, and a sequence may lie in two of them."""

    async def one(cache: Cache) -> None:
        await (await write(cache, (1, 2), lambda event: None)).aclose()
        await session(tmp_path / "root", KIND, two)

    async def two(cache: Cache) -> None:
        await write(cache, (1, 2, 3), lambda event: None)

    anyio.run(session, tmp_path / "root", KIND, one)
    for _ in range(2):
        found = anyio.run(inspect, tmp_path / "root", KIND, [(1, 2, 3)])
        assert found.tokens == {(1, 2, 3): 3 * BLOCK} and not found.wrong and not found.gave_up


def test_compaction_that_is_cancelled_once_it_is_written_down_loses_nothing(tmp_path: Path) -> None:
    kind = Kind("log-structured-journal")
    _, promises = build(tmp_path / "root", kind)

    async def body(cache: Cache) -> None:
        assert cache.records is not None
        lifecycle = cache.lifecycle
        moved = lifecycle.moved

        async def cancelled(places: Mapping[Place, Place]) -> None:
            await moved(places)
            scope.cancel()
            await anyio.lowlevel.checkpoint()

        setattr(lifecycle, "moved", cancelled)  # noqa: B010
        await drop(cache, (1,), 0, promises.tell)
        with anyio.CancelScope() as scope:
            await compact(cache.records, lifecycle)
        assert scope.cancelled_caught
        setattr(lifecycle, "moved", moved)  # noqa: B010
        await cache.records.bury()

    anyio.run(session, tmp_path / "root", kind, body)
    assert anyio.run(check, tmp_path / "root", kind, promises) == []
