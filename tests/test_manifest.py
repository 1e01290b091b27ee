"""The manifest: its bytes stay what they were, and damage costs nodes, never truth. Run as a program, it makes the golden file."""

from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from aollm.disk.base import Extent
from aollm.errors import StoreError
from aollm.stores.identity import Identity, canonical, difference, strict_json
from aollm.stores.manifest import Head, Parsed, parse
from aollm.stores.node import Node, digest, pack_ids, root
from aollm.stores.record import HEADER_NBYTES, PAGE, Header, Kind, Place, payload_sum, record_nbytes

GOLDEN = Path(__file__).parent / "golden" / "manifest-v1.bin"
FOLDER = "/cache/0123"
IDENTITY = Identity({"weights": "w1", "tokenizer": "t1", "configuration": "c1", "dtype": "bfloat16", "codec": "full-precision"})
HEAD = Head(FOLDER, IDENTITY, generation=0x1122334455667788, format="chunked-manifest", block_tokens=8, layers=2)


def make_node(parent: bytes, index: int, ids: list[int], sequence: int, head: Head = HEAD, state: bool = False, pages: int = 1) -> Node:
    """A node whose records lie one after the other from page `sequence` on."""
    packed = pack_ids(ids)
    name = digest(parent, packed)

    def place(kind: Kind, layer: int, number: int) -> Place:
        nbytes = pages * PAGE - 96
        header = Header(kind, head.identity.digest, name, head.generation, number, layer, index, len(ids), nbytes)
        room = record_nbytes(nbytes)
        return Place(header, Extent(f"{head.folder}/layer-{layer:04d}.000000.journal", number * room, room))

    places = tuple(place(Kind.KV, layer, sequence + layer) for layer in range(head.layers))
    states = (place(Kind.STATE, 1, sequence + head.layers),) if state else ()
    return Node(name, parent, index, packed, places, states, used=sequence, stored_at=1.7e9 + sequence, pinned=index == 1)


def chain(blocks: int, head: Head = HEAD, first: int = 10) -> list[Node]:
    parent, nodes = root(head.identity.digest, ""), []
    for index in range(blocks):
        ids = [100 * index + column for column in range(8 if index < blocks - 1 else 3)]
        nodes.append(make_node(parent, index, ids, first + 10 * index, head, state=index == 2))
        parent = nodes[-1].digest
    return nodes


def golden() -> bytes:
    nodes = chain(4)
    records = [HEAD.begin(1), *(HEAD.commit(node, 100 + number) for number, node in enumerate(nodes))]
    return b"".join([*records, HEAD.drop(nodes[3].digest, 104), HEAD.mark(nodes[0].digest, 77, True, 105)])


def fields(node: Node) -> tuple[object, ...]:
    return tuple(getattr(node, name) for name in Node.__slots__)


def commits(blocks: int = 3) -> tuple[list[Node], bytes]:
    nodes = chain(blocks)
    return nodes, b"".join([HEAD.begin(1), *(HEAD.commit(node, 1000 + number) for number, node in enumerate(nodes))])


def test_the_golden_manifest_is_still_written_and_read() -> None:
    assert golden() == GOLDEN.read_bytes()
    parsed = parse(GOLDEN.read_bytes(), FOLDER, IDENTITY.digest)
    first, second, third, _ = chain(4)
    first.used, first.pinned = 77, True
    assert [fields(node) for node in parsed.nodes.values()] == [fields(node) for node in (first, second, third)]
    assert (parsed.head, parsed.records, parsed.damage, parsed.good_nbytes) == (HEAD, 7, None, GOLDEN.stat().st_size)
    assert (parsed.last, parsed.sequence) == (105, 105)


def test_a_cut_at_every_byte_leaves_a_prefix() -> None:
    nodes, data = commits()
    wanted = [fields(node) for node in nodes]
    for end in range(len(data)):
        parsed = parse(data[:end], FOLDER)
        found = [fields(node) for node in parsed.nodes.values()]
        assert found == wanted[: len(found)] and parsed.good_nbytes <= end
        assert parsed.damage == (None if parsed.good_nbytes == end else "tail")
        assert parse(data[: parsed.good_nbytes], FOLDER).damage is None


def test_every_flipped_byte_costs_nodes_and_never_makes_a_wrong_one() -> None:
    nodes, data = commits()
    wanted = [fields(node) for node in nodes]
    last = len(data) - len(HEAD.commit(nodes[-1], 0))
    for at in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[at] ^= 1 << bit
            parsed = parse(bytes(damaged), FOLDER)
            found = [fields(node) for node in parsed.nodes.values()]
            assert found == wanted[: len(found)] and len(found) < len(wanted)
            assert parsed.damage == ("tail" if at >= last else "middle")


@pytest.mark.parametrize("rest", [bytes(4096), b"\xff" * 300, b"aoKV" * 100, GOLDEN.read_bytes()[:64]])
def test_what_was_never_a_record_is_a_tail(rest: bytes) -> None:
    nodes, data = commits()
    parsed = parse(data + rest, FOLDER)
    assert (len(parsed.nodes), parsed.damage, parsed.good_nbytes) == (len(nodes), "tail", len(data))


def test_records_of_another_lap_or_volume_are_no_records() -> None:
    nodes, data = commits()
    other = replace(HEAD, generation=5)
    stranger = chain(1, other)[0]
    assert parse(data + other.commit(stranger, 5000), FOLDER).damage == "tail"
    assert parse(data + data[-len(HEAD.commit(nodes[-1], 0)) :], FOLDER).damage == "tail"  # there a second time
    assert parse(data + HEAD.begin(9999), FOLDER).damage == "tail"
    assert parse(data, FOLDER, identity=bytes(16)).damage == "middle"
    assert not parse(data, FOLDER, identity=bytes(16)).nodes


def test_a_newer_version_is_refused_not_guessed() -> None:
    _, data = commits()
    payload = canonical({"version": 2, "format": "later"})
    header = Header(Kind.HEAD, IDENTITY.digest, bytes(16), HEAD.generation, 1, nbytes=len(payload))
    with pytest.raises(StoreError, match="newer version"):
        parse(header.pack(payload_sum([payload])) + payload, FOLDER)
    raw = bytearray(data[:HEADER_NBYTES])
    raw[4:6] = (9).to_bytes(2, "little")  # the version; its checksum is right
    raw[-8:] = xxhash.xxh3_64_intdigest(bytes(raw[:-8])).to_bytes(8, "little")
    for damaged in (bytes(raw) + data[HEADER_NBYTES:], data + bytes(raw), data + b"x" + bytes(raw)):
        with pytest.raises(StoreError, match="newer version"):
            parse(damaged, FOLDER)


@pytest.mark.parametrize("name", ["manifest", "LOCK", "manifest.damaged-1", ".hidden", "a/b", "", "x" * 201, "ü"])
def test_a_commit_names_only_data_files_of_its_own_folder(name: str) -> None:
    node = chain(1)[0]
    node.places = tuple(Place(place.header, Extent(f"{FOLDER}/{name}", 0, place.extent.nbytes)) for place in node.places)
    with pytest.raises(ValueError):
        HEAD.commit(node, 50)


def test_what_could_not_be_read_again_is_not_written() -> None:
    node = chain(1)[0]
    place = node.places[0]
    for wrong in (
        Place(place.header, Extent(place.extent.file, 1, place.extent.nbytes)),
        Place(place.header, Extent(place.extent.file, 0, PAGE)),
        Place(replace(place.header, block=bytes(16)), place.extent),
        Place(replace(place.header, generation=3), place.extent),
    ):
        node.places = (wrong,)
        with pytest.raises(ValueError):
            HEAD.commit(node, 50)
    node = chain(1)[0]
    node.ids = pack_ids(list(range(9)))  # more than a block
    with pytest.raises(ValueError):
        HEAD.commit(node, 50)


def test_a_commit_replaces_an_earlier_one() -> None:
    node, moved = chain(1)[0], chain(1, first=900)[0]
    parsed = parse(HEAD.begin(1) + HEAD.commit(node, 2) + HEAD.commit(moved, 3), FOLDER)
    assert [fields(found) for found in parsed.nodes.values()] == [fields(moved)]
    assert parsed.sequence == 901  # records' own numbers count as seen


def test_an_empty_manifest_is_not_damaged() -> None:
    assert parse(b"", FOLDER) == Parsed()


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff", b"[" * 5000, b'{"a":"' + b"x" * (1 << 16) + b'"}'])
def test_json_is_strict(text: bytes) -> None:
    with pytest.raises(StoreError):
        strict_json(text)


def test_identities_differ_in_words() -> None:
    assert difference(IDENTITY, Identity(dict(IDENTITY.parts))) is None
    for name, words in (("weights", "other weights"), ("dtype", "other dtype"), ("salt", "other salt")):
        other = Identity({**IDENTITY.parts, name: "else"})
        assert difference(IDENTITY, other) == words and other.hex != IDENTITY.hex
    assert Identity(dict(reversed(IDENTITY.parts.items()))).digest == IDENTITY.digest
    assert Identity.parse(IDENTITY.json()) == IDENTITY


if __name__ == "__main__":
    GOLDEN.write_bytes(golden())
