"""Stores of keys and values: whatever is appended, cut off and forked, the history is what plain tensors say."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from aollm.stores import pool as pool_module
from aollm.stores import resident as resident_module
from aollm.stores.pool import BlockPool
from aollm.stores.resident import ResidentStore

LAYERS, HEADS, DIM, BLOCK, LONGEST, SEQUENCES = 2, 2, 3, 4, 24, 6
TOKENS = LONGEST * SEQUENCES


@pytest.fixture(autouse=True)
def small_blocks() -> object:
    with patch.object(pool_module, "BLOCK", BLOCK), patch.object(resident_module, "BLOCK", BLOCK):
        yield


def new_pool(tokens: int = TOKENS, sequences: int = SEQUENCES, longest: int = LONGEST) -> BlockPool:
    return BlockPool(tokens, sequences, longest, LAYERS, HEADS, DIM, torch.float32)


def rows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, HEADS, DIM, generator=generator), torch.randn(count, HEADS, DIM, generator=generator)


def close(store: ResidentStore) -> None:
    """A resident store has nothing to wait for."""
    with pytest.raises(StopIteration):
        store.aclose().send(None)


class History:
    """The oracle: one tensor a layer."""

    def __init__(self) -> None:
        self.layers = [(torch.empty(0, HEADS, DIM), torch.empty(0, HEADS, DIM)) for _ in range(LAYERS)]

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        old = self.layers[layer]
        self.layers[layer] = torch.cat([old[0], keys]), torch.cat([old[1], values])

    def truncate(self, tokens: int) -> None:
        self.layers = [(keys[:tokens], values[:tokens]) for keys, values in self.layers]

    def fork(self) -> "History":
        twin = History()
        twin.layers = list(self.layers)
        return twin


def check(store: ResidentStore, history: History) -> None:
    for layer, (keys, values) in enumerate(history.layers):
        blocks = store.blocks(layer)
        assert [block.start for block in blocks] == list(range(0, len(keys), BLOCK))
        assert [block.end for block in blocks] == [min(at + BLOCK, len(keys)) for at in range(0, len(keys), BLOCK)]
        assert torch.equal(torch.cat([block.keys for block in blocks] or [keys]), keys)
        assert torch.equal(torch.cat([block.values for block in blocks] or [values]), values)


class Stores(RuleBasedStateMachine):
    stores = Bundle("stores")

    def __init__(self) -> None:
        super().__init__()
        self.pool = new_pool()
        self.slots = len(self.pool._free)
        self.live: list[tuple[ResidentStore, History]] = []

    @rule(target=stores)
    def open(self) -> object:
        return self.hold(ResidentStore(self.pool), History())

    def hold(self, store: ResidentStore, history: History) -> tuple[ResidentStore, History]:
        if len(self.live) >= SEQUENCES:
            close(store)
            history = History()
        else:
            self.live.append((store, history))
        return store, history

    @rule(pair=stores, count=st.integers(1, 11), seed=st.integers(0, 9), layers=st.sampled_from([(0, 1), (0,), (1,)]))
    def append(self, pair: tuple[ResidentStore, History], count: int, seed: int, layers: tuple[int, ...]) -> None:
        store, history = pair
        if pair not in self.live:
            return
        for layer in layers:
            room = min(count, LONGEST - len(history.layers[layer][0]))
            if room:
                keys, values = rows(room, seed)
                store.append(layer, keys, values)
                history.append(layer, keys.clone(), values.clone())
                keys.zero_()

    @rule(pair=stores, tokens=st.integers(0, LONGEST + 3))
    def truncate(self, pair: tuple[ResidentStore, History], tokens: int) -> None:
        pair[0].truncate(tokens)
        pair[1].truncate(tokens)

    @rule(target=stores, pair=stores)
    def fork(self, pair: tuple[ResidentStore, History]) -> object:
        return self.hold(pair[0].fork(), pair[1].fork())

    @rule(pair=consumes(stores))
    def close(self, pair: tuple[ResidentStore, History]) -> None:
        close(pair[0])
        if pair in self.live:
            self.live.remove(pair)

    @invariant()
    def histories_agree(self) -> None:
        for store, history in self.live:
            check(store, history)

    @invariant()
    def slots_are_neither_lost_nor_given_twice(self) -> None:
        free = [slot.index for slot in self.pool._free]
        held = {id(slot): slot for store, _ in self.live for slots in store._slots for slot in slots}
        assert len(set(free)) == len(free)
        assert sorted([*free, *(slot.index for slot in held.values())]) == list(range(self.slots))
        for slot in held.values():
            assert slot.owners == sum(slot is other for store, _ in self.live for slots in store._slots for other in slots)

    def teardown(self) -> None:
        for store, _ in self.live:
            close(store)
        assert len(self.pool._free) == self.slots


Stores.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestStores = Stores.TestCase
TestStores.pytestmark = [pytest.mark.usefixtures("small_blocks")]


@pytest.mark.parametrize("shared", [1, 3, 4, 5, 8, 11])
def test_forks_do_not_see_what_their_kin_write(shared: int) -> None:
    pool = new_pool()
    first, history = ResidentStore(pool), History()
    for layer in range(LAYERS):
        first.append(layer, *rows(shared, 1))
        history.append(layer, *rows(shared, 1))
    kin = [first, first.fork(), first.fork(), first.fork()]
    kin[3].truncate(2)
    told = [history.fork() for _ in kin]
    told[3].truncate(2)
    for number, (store, mine) in enumerate(zip(kin, told, strict=True)):
        for layer in range(LAYERS):
            store.append(layer, *rows(3, number))
            mine.append(layer, *rows(3, number))
    for store, mine in zip(kin, told, strict=True):
        check(store, mine)


@pytest.mark.parametrize("sequences", [1, 3, SEQUENCES])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 24, 100])
def test_a_pool_has_slots_for_all_that_it_lets_reserve(tokens: int, sequences: int) -> None:
    """However reserved tokens are divided between as many sequences as there may be, the slots are there."""
    pool = new_pool(tokens, sequences, longest=tokens)
    share = [tokens // sequences + (number < tokens % sequences) for number in range(sequences)]
    for count in share:
        assert pool.reserve(count)
        store = ResidentStore(pool)
        for layer in range(LAYERS):
            for _ in range(count):
                store.append(layer, *rows(1, 0))
    assert not pool.reserve(1)


def test_a_reservation_is_refused_when_full_and_changes_nothing() -> None:
    pool = new_pool(tokens=10)
    assert pool.reserve(7) and not pool.reserve(4) and pool.reserved == 7
    assert pool.reserve(3) and pool.reserved == 10
    pool.release(7)
    assert pool.reserve(7) and not pool.reserve(1)


def test_a_slot_taken_again_is_zero() -> None:
    pool = new_pool()
    store = ResidentStore(pool)
    store.append(0, *rows(4, 1))
    close(store)
    slots = [pool.take() for _ in range(len(pool._free))]
    assert not any(bool(slot.keys.any()) or bool(slot.values.any()) for slot in slots)


@pytest.mark.parametrize("longest", [1, 3, 5, 24])
def test_sequences_shorter_than_a_block_have_small_slots(longest: int) -> None:
    pool = new_pool(longest * 2, 2, longest)
    store, history = ResidentStore(pool), History()
    for layer in range(LAYERS):
        store.append(layer, *rows(longest, 5))
        history.append(layer, *rows(longest, 5))
    check(store, history)
    twin = store.fork()
    twin.truncate(longest - 1)
    twin.append(0, *rows(1, 6))
    check(store, history)
