"""The index finds the longest stored prefix, whatever is stored; retention drops leaves first, and never what is pinned."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aollm.disk.base import Extent
from aollm.stores.index import Index
from aollm.stores.node import Node, digest, pack_ids, root
from aollm.stores.record import Header, Kind, Place
from aollm.stores.retention import excess

BLOCK = 4
ROOT = root(b"i" * 16, "")
TOKEN = st.sampled_from([0, 1, 255, 256, 2**32 - 1])
SEQUENCES = st.lists(st.lists(TOKEN, min_size=1, max_size=3 * BLOCK), max_size=8)


def node(parent: bytes, index: int, ids: list[int], used: int = 0, nbytes: int = 4096, stored_at: float = 0.0) -> Node:
    packed = pack_ids(ids)
    name = digest(parent, packed)
    place = Place(Header(Kind.KV, b"i" * 16, name, 1, 1), Extent("/none", 0, nbytes))
    return Node(name, parent, index, packed, (place,), (), used, stored_at)


def store(index: Index, ids: list[int], block: int = BLOCK, top: bytes = ROOT, used: int = 0) -> list[Node]:
    parent, nodes = top, []
    for number, at in enumerate(range(0, len(ids), block)):
        new = node(parent, number, ids[at : at + block], used)
        found = index.get(new.digest)
        if found is None:
            index.add(new)
        nodes.append(found or new)
        parent = new.digest
    return nodes


def common(first: list[int], second: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))


@settings(max_examples=400, deadline=None)
@given(SEQUENCES, st.lists(TOKEN, max_size=4 * BLOCK))
def test_lookup_is_the_longest_prefix(stored: list[list[int]], prompt: list[int]) -> None:
    index = Index(BLOCK)
    for ids in stored:
        store(index, ids)
    found = index.lookup(ROOT, prompt)
    assert found.tokens == max((common(ids, prompt) for ids in stored), default=0)
    told = [token for step in found.nodes for token in memoryview(step.ids[::-1]).cast("I")[::-1]]
    assert told[: found.tokens] == prompt[: found.tokens]
    assert len(told) - found.tokens < BLOCK and [step.index for step in found.nodes] == list(range(len(found.nodes)))
    assert (found.reason is None) == (found.tokens == len(prompt))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, st.randoms(use_true_random=False))
def test_adding_and_removing_leaves_no_trace(stored: list[list[int]], chance: random.Random) -> None:
    index = Index(BLOCK)
    for ids in stored:
        store(index, ids)
    nodes = index.nodes()
    assert index.nbytes == 4096 * len(nodes) and index.tokens == sum(step.rows for step in nodes)
    for step in chance.sample(nodes, len(nodes)):
        index.add(step)  # again: changes nothing
        index.remove(step)
        index.remove(step)
        assert step.digest not in index and step not in index.children(step.parent)
    assert (len(index), index.nbytes, index.tokens, index.children(ROOT)) == (0, 0, 0, [])


def test_reasons() -> None:
    index = Index(BLOCK)
    assert index.lookup(ROOT, [1]).reason == "nothing is stored"
    assert index.lookup(ROOT, []).reason is None
    nodes = store(index, [1, 2, 3, 4, 5, 6])
    assert index.lookup(ROOT, [9, 9]).reason == "diverged at token 0"
    assert index.lookup(ROOT, [1, 2, 3, 4, 5, 7, 8]).reason == "diverged at token 5"
    assert index.lookup(ROOT, [1, 2, 3, 4, 5, 6, 7]).reason == "nothing is stored past token 6"
    assert index.lookup(ROOT, [1, 2, 3]).reason is None
    assert index.lookup(root(b"i" * 16, "tenant"), [1, 2, 3]).reason == "nothing is stored"
    index.remove(nodes[1])
    assert index.lookup(ROOT, [1, 2, 3, 4, 5, 6]).reason == "evicted"
    index.remove(nodes[0])
    assert index.lookup(ROOT, [1, 2, 3, 4, 5, 6]).reason == "evicted"
    assert index.lookup(ROOT, [1, 2, 3, 5, 5, 6]).reason == "nothing is stored"
    index.add(nodes[0])
    assert index.lookup(ROOT, [1, 2, 3, 4]).reason is None


def test_ten_thousand_sequences() -> None:
    chance = random.Random(7)
    shared = [[chance.randrange(128_000) for _ in range(4 * 64)] for _ in range(20)]
    index, prompts = Index(64), []
    for number in range(10_000):
        ids = shared[number % 20] + [chance.randrange(128_000) for _ in range(4 * 64)]
        if number % 2:
            ids = ids[4 * 64 :] * 2  # half of them share nothing
        store(index, ids, 64)
        if not number % 100:
            prompts.append(ids)
    took = []
    for ids in prompts:
        start = time.perf_counter()
        assert index.lookup(ROOT, ids).tokens == 512
        took.append(time.perf_counter() - start)
    assert sorted(took)[len(took) // 2] < 0.005


def test_the_oldest_go_leaves_first() -> None:
    index = Index(BLOCK)
    trunk = store(index, [1, 2, 3, 4], used=1)
    left = store(index, [1, 2, 3, 4, 5], used=5)[1]
    right = store(index, [1, 2, 3, 4, 6], used=3)[1]
    alone = store(index, [9], used=4)[0]
    assert index.oldest(lambda node: True) == [right, alone, left, *trunk]
    assert index.oldest(lambda node: node is not right) == [alone, left]
    right.pinned = True
    assert index.oldest(lambda node: True) == [alone, left]
    assert index.oldest(lambda node: True, held={alone.digest}) == [left]


def test_excess() -> None:
    index = Index(BLOCK)
    old = node(ROOT, 0, [1, 1, 1, 1], used=9, stored_at=0.0)
    young = node(old.digest, 1, [2], used=8, stored_at=100.0)
    other = node(ROOT, 0, [3], used=1, stored_at=100.0)
    expired = node(ROOT, 0, [4], used=2, stored_at=5.0)
    for each in (old, young, other, expired):
        index.add(each)
    assert excess(index, None, None, 200.0) == []
    assert excess(index, 4 * 4096, None, 200.0) == []
    assert excess(index, 4 * 4096 - 1, None, 200.0) == [other]
    assert excess(index, 0, None, 200.0) == [other, expired, young, old]
    assert excess(index, None, 150.0, 200.0) == [expired]  # `old` stays for `young`
    assert excess(index, 3 * 4096, 150.0, 200.0) == [expired]
    assert excess(index, 2 * 4096, 150.0, 200.0) == [other, expired]
    assert excess(index, None, 1.0, 200.0) == [other, expired, young, old]
    assert excess(index, 0, None, 200.0, held={young.digest}) == [other, expired]
    assert excess(index, None, 1.0, -1000.0) == []  # the clock went back


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.randoms(use_true_random=False), st.integers(0, 40))
def test_excess_leaves_no_block_without_its_parent(stored: list[list[int]], chance: random.Random, blocks: int) -> None:
    index = Index(BLOCK)
    for ids in stored:
        store(index, ids, used=chance.randrange(100))
    for each in index.nodes():
        each.pinned = chance.random() < 0.1
    going = excess(index, blocks * 4096, None, 0.0)
    for each in going:
        assert not each.pinned and not index.children(each.digest)
        index.remove(each)
    assert len(index) <= blocks or not [each for each in index.nodes() if not each.pinned and not index.children(each.digest)]


def test_ids_that_are_none_are_refused() -> None:
    for wrong in (-1, 2**32):
        with pytest.raises(OverflowError):
            pack_ids([wrong])
