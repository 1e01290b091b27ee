"""Volumes: what was synced is there again whatever happened, one process writes each, and rubbish is cleared away."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_manifest import IDENTITY, fields, make_node

from aollm.disk.calls import Calls
from aollm.errors import StoreError
from aollm.stores.housekeeping import ls, pin, purge
from aollm.stores.identity import Identity, difference
from aollm.stores.manifest import Head
from aollm.stores.node import Node, root
from aollm.stores.record import Header, Kind, payload_sum
from aollm.stores.volume import Volume

FORMAT = "chunked-manifest"


def open_volume(path: Path, calls: Calls | None = None, identity: Identity = IDENTITY, format: str = FORMAT) -> Volume:
    return Volume.open(path, identity, format, 8, 2, calls or Calls())


def make_chain(volume: Volume, blocks: int, seed: int = 0) -> list[Node]:
    """Nodes of one sequence, with data files that are large enough for them."""
    head = Head(volume.path, IDENTITY, volume.generation, FORMAT, 8, 2)
    parent, nodes = root(IDENTITY.digest, ""), []
    for index in range(blocks):
        nodes.append(make_node(parent, index, [seed, index], 10 + 10 * seed + 2 * index, head))
        parent = nodes[-1].digest
    for place in (place for node in nodes for place in node.places):
        with open(place.extent.file, "ab") as file:
            file.truncate(max(place.extent.end, file.tell()))
    return nodes


def stored(volume: Volume) -> list[tuple[object, ...]]:
    return [fields(node) for node in volume.index.nodes()]


def manifest(volume: Volume) -> Path:
    return Path(volume.path) / "manifest"


def test_what_was_committed_is_there_again(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    nodes = make_chain(volume, 4)
    assert not manifest(volume).exists()
    volume.commit(nodes)
    volume.drop(nodes[3:])
    nodes[0].used, nodes[0].pinned = volume.next_sequence(), True
    volume.mark(nodes[:1])
    volume.sync()
    last = volume.next_sequence()
    volume.close()
    volume.close()
    again = open_volume(tmp_path)
    assert (again.path, again.generation) == (volume.path, volume.generation)
    assert stored(again) == [fields(node) for node in nodes[:3]]
    assert (again.tail_truncated_bytes, again.quarantined, again.lost) == (0, 0, 0)
    assert again.next_sequence() > last
    again.close()


def test_one_that_stored_nothing_is_removed(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    make_chain(volume, 2)
    volume.close()
    assert not os.path.exists(volume.path)


def test_a_torn_tail_is_cut(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    nodes = make_chain(volume, 3)
    volume.commit(nodes)
    volume.close()
    whole = manifest(volume).read_bytes()
    manifest(volume).write_bytes(whole[:-1])
    again = open_volume(tmp_path)
    assert stored(again) == [fields(node) for node in nodes[:2]] and again.tail_truncated_bytes > 0
    again.commit(nodes[2:])
    again.close()
    third = open_volume(tmp_path)
    assert stored(third) == [fields(node) for node in nodes] and third.tail_truncated_bytes == 0
    third.close()


def test_damage_in_the_middle_is_set_aside(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    nodes = make_chain(volume, 3)
    volume.commit(nodes[:1])
    middle = manifest(volume).stat().st_size
    volume.commit(nodes[1:])
    volume.close()
    for turn in (1, 2):
        damaged = bytearray(manifest(volume).read_bytes())
        damaged[middle + 9] ^= 1
        manifest(volume).write_bytes(damaged)
        again = open_volume(tmp_path)
        assert stored(again) == [fields(node) for node in nodes[:1]] and again.quarantined == 1
        assert (Path(again.path) / f"manifest.damaged-{turn}").read_bytes() == damaged
        again.commit(nodes[1:])
        again.close()
    damaged[5] ^= 1  # nothing before the damage
    manifest(volume).write_bytes(damaged)
    again = open_volume(tmp_path)
    assert (len(again.index), again.quarantined) == (0, 1) and again.generation != volume.generation
    again.close()


def test_blocks_without_data_are_lost_and_data_without_blocks_removed(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    first, second = make_chain(volume, 3), make_chain(volume, 2, seed=5)
    volume.commit([*first, *second])
    volume.close()
    folder = Path(volume.path)
    for name in ("old.journal", ".manifest.0123", "chunks"):
        (folder / name).write_bytes(b"x")
    journal = Path(first[0].places[0].extent.file)
    os.truncate(journal, second[1].places[0].extent.end - 1)
    again = open_volume(tmp_path)
    assert again.lost == 1 and stored(again) == [fields(node) for node in (first[0], second[0], *first[1:])]  # by depth
    assert sorted(os.listdir(folder)) == ["LOCK", journal.name, "layer-0001.000000.journal", "manifest"]
    again.close()
    os.truncate(journal, first[0].places[0].extent.offset)
    again = open_volume(tmp_path)
    assert (again.lost, len(again.index)) == (4, 0)
    again.close()
    again = open_volume(tmp_path)
    assert again.lost == 0
    again.close()


def test_a_newer_or_another_format_is_refused(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    volume.commit(make_chain(volume, 1))
    volume.close()
    with pytest.raises(StoreError, match=r"purge it|another cache_dir"):
        open_volume(tmp_path, format="paged-manifest")
    open_volume(tmp_path).close()  # the lock was given back
    payload = b'{"version":2}'
    header = Header(Kind.HEAD, IDENTITY.digest, bytes(16), volume.generation, 1, nbytes=len(payload))
    manifest(volume).write_bytes(later := header.pack(payload_sum([payload])) + payload)
    for _ in range(2):
        with pytest.raises(StoreError, match="newer version"):
            open_volume(tmp_path)
    assert manifest(volume).read_bytes() == later
    (entry,) = ls(tmp_path)
    assert "newer version" in str(entry["error"]) and entry["in_use"] is False


def test_a_manifest_of_dead_records_is_written_anew(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    nodes = make_chain(volume, 2)
    volume.commit(nodes)
    size = manifest(volume).stat().st_size
    for _ in range(100):
        volume.mark(nodes[:1])
    assert manifest(volume).stat().st_size > 3 * size
    volume.sync()
    assert manifest(volume).stat().st_size == size
    volume.commit(make_chain(volume, 1, seed=3))
    volume.close()
    again = open_volume(tmp_path)
    assert len(again.index) == 3
    again.close()


def test_others_are_read_again_only_when_they_changed(tmp_path: Path) -> None:
    opened: list[str] = []

    class Counting(Calls):
        def open(self, name: str, flags: int, mode: int = 0o600, folder: int | None = None) -> int:
            opened.append(name)
            return super().open(name, flags, mode, folder)

    mine, other = open_volume(tmp_path, Counting()), open_volume(tmp_path)
    assert mine.path != other.path and mine.others() == []
    nodes = make_chain(other, 2)
    other.commit(nodes)
    opened.clear()
    assert [fields(node) for node in mine.others()] == [fields(node) for node in nodes]
    assert "manifest" in opened
    opened.clear()
    assert len(mine.others()) == 2 and "manifest" not in opened
    top = root(IDENTITY.digest, "")
    assert fields(mine.lookup(top, [0, 0, 0, 1]).nodes[1]) == fields(nodes[1])
    mine.commit(make_chain(mine, 1))
    assert mine.lookup(top, [0, 0, 0, 2]).nodes[1].places[0].extent.file.startswith(other.path)
    assert mine.lookup(top, [0, 0]).nodes[0].places[0].extent.file.startswith(mine.path)
    other.drop(nodes[1:])
    assert len(mine.others()) == 1 and mine.skipped == 0
    manifest(other).write_bytes(b"nonsense")
    assert mine.others() == [] and mine.others() == [] and mine.skipped == 1
    other.close()
    mine.close()


def test_neighbours_say_what_differs(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    other = open_volume(tmp_path, identity=Identity({**IDENTITY.parts, "weights": "w2"}))
    assert volume.neighbours() == []  # nothing is stored
    other.swap()
    assert [difference(IDENTITY, found) for found in volume.neighbours()] == ["other weights"]
    assert [found.hex for found in other.neighbours()] == []
    assert volume.lookup(bytes(16), [1]).reason == "nothing is stored, but for other weights"
    assert other.lookup(bytes(16), [1]).reason == "nothing is stored"
    (Path(other.path).parent / "identity.json").write_bytes(b"{}")
    assert volume.neighbours() == []
    other.close()
    volume.close()


PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_volume import make_chain, open_volume
volume = open_volume(Path({path!r}))
if {commit}:
    volume.commit(make_chain(volume, 2))
    volume.sync()
print(volume.path, flush=True)
sys.stdin.read()
"""


def other_process(path: Path, commit: bool) -> tuple[subprocess.Popen[str], str]:
    program = PROGRAM.format(tests=str(Path(__file__).parent), path=str(path), commit=commit)
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_processes_have_volumes_of_their_own_and_a_killed_ones_is_taken_over(tmp_path: Path) -> None:
    keeper, kept = other_process(tmp_path, commit=True)
    leaver, left = other_process(tmp_path, commit=False)
    try:
        mine = open_volume(tmp_path)
        assert len({kept, left, mine.path}) == 3 and len(mine.others()) == 2
        assert purge(tmp_path, Path(kept).name) == {kept: "in use"}
        mine.close()
    finally:
        for process in (keeper, leaver):
            process.send_signal(signal.SIGKILL)
            process.communicate()
    heir, second = open_volume(tmp_path), open_volume(tmp_path)
    assert heir.path == kept and len(heir.index) == 2
    assert not os.path.exists(left) and second.path not in (kept, left)
    second.close()
    heir.close()


def test_housekeeping(tmp_path: Path) -> None:
    assert ls(tmp_path / "none") == [] and purge(tmp_path / "none") == {}
    volume = open_volume(tmp_path)
    volume.commit(make_chain(volume, 2))
    (entry,) = ls(tmp_path)
    assert entry | {"disk_bytes": 0} == {
        "path": volume.path, "identity": IDENTITY.hex, "parts": IDENTITY.parts, "format": FORMAT, "blocks": 2, "tokens": 4,
        "bytes": 4 * 8192, "disk_bytes": 0, "pinned": 1, "in_use": True, "error": None,
    }  # fmt: skip
    assert pin(tmp_path, "", True) == {volume.path: "in use"}
    volume.close()
    assert pin(tmp_path, IDENTITY.hex[:6], True) == {volume.path: "pinned"}
    assert [entry["pinned"] for entry in ls(tmp_path)] == [2]
    assert pin(tmp_path, Path(volume.path).name, False) == {volume.path: "unpinned"}
    (entry,) = ls(tmp_path)
    assert (entry["pinned"], entry["in_use"]) == (0, False)
    assert purge(tmp_path, "zz") == {} and pin(tmp_path, "zz", True) == {}
    assert purge(tmp_path) == {volume.path: "removed"} and ls(tmp_path) == []
    open_volume(tmp_path).close()


def test_a_sequence_continues_after_records_that_nobody_knows(tmp_path: Path) -> None:
    volume = open_volume(tmp_path)
    (node,) = make_chain(volume, 1)
    far = 10**12
    node.places = tuple(replace(place, header=replace(place.header, sequence=far)) for place in node.places)
    volume.commit([node])
    volume.close()
    again = open_volume(tmp_path)
    assert again.next_sequence() > far
    again.close()
