"""Layouts: whatever is placed, dropped and restored, records lie apart, and what a layout gives up nobody lives in."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from aollm.disk.base import Extent
from aollm.errors import StoreError
from aollm.stores.chunked import ChunkedLayout
from aollm.stores.journal import JournalLayout
from aollm.stores.layout import Layout
from aollm.stores.paged import PagedLayout
from aollm.stores.ring import RingLayout
from aollm.stores.segmented import SegmentedLayout

PAGE, SLOTS, THRESHOLD = 4096, 3, 4


@dataclass(frozen=True)
class Row:
    """A layout, what its files are called, the pages of its largest record, and how many empty files it may keep."""

    name: str
    new: Callable[[], Layout]
    files: str
    largest: int = 10
    kept: int = 0


ROWS = [
    Row("chunked-manifest", ChunkedLayout, "chunks", kept=1),
    Row("paged-manifest", lambda: PagedLayout(2 * PAGE), "pages", kept=1),
    Row("streamed-segmented", lambda: SegmentedLayout(8 * PAGE), r"segment-\d{6}", kept=1),
    Row("log-structured-journal", lambda: JournalLayout(THRESHOLD), r"layer-(\d{4}|none)\.\d{6}\.journal"),
    Row("sliding-window-ring-buffer", lambda: RingLayout(SLOTS, 4 * PAGE), r"store-\d+\.layer-(\d+|none)\.ring", largest=4),
]
every_layout = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


class LayoutMachine(RuleBasedStateMachine):
    """Two layouts are told the same, and say the same; `live` is what must be true of both."""

    row: Row

    def __init__(self) -> None:
        super().__init__()
        self.layout, self.twin = self.row.new(), self.row.new()
        self.live: dict[Extent, tuple[int, int, int]] = {}
        self.files: set[str] = set()
        self.gone: set[str] = set()

    def placed(self, store: int, layer: int, index: int, nbytes: int) -> None:
        slot = (store, layer, index % SLOTS)
        if isinstance(self.layout, RingLayout) and slot in [(s, l, i % SLOTS) for s, l, i in self.live.values()]:
            for layout in (self.layout, self.twin):
                with pytest.raises(StoreError, match="still in use"):
                    layout.place(store, layer, index, nbytes)
            return
        extent = self.layout.place(store, layer, index, nbytes)
        assert extent == self.twin.place(store, layer, index, nbytes)
        assert extent.nbytes == nbytes and extent.offset >= 0 and extent.offset % PAGE == 0
        assert re.fullmatch(self.row.files, extent.file)
        assert extent not in self.live
        self.live[extent] = (store, layer, index)
        self.files.add(extent.file)

    def dropped(self, extent: Extent) -> None:
        del self.live[extent]
        removed = self.layout.drop(extent)
        assert removed == self.twin.drop(extent)
        assert not {live.file for live in self.live} & set(removed)
        assert set(removed) <= self.files and len(set(removed)) == len(removed)
        self.files -= set(removed)
        self.gone |= set(removed)

    @rule(store=st.integers(0, 1), layer=st.integers(-1, 0), index=st.integers(0, 7), shares=st.lists(st.integers(0, 9), max_size=3))
    def place(self, store: int, layer: int, index: int, shares: list[int]) -> None:
        for share in shares:
            self.placed(store, layer, index, PAGE * (1 + share % self.row.largest))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        extent = data.draw(st.sampled_from(list(self.live)))
        self.dropped(extent)
        for layout in (self.layout, self.twin):
            with pytest.raises(ValueError, match="not in use"):
                layout.drop(extent)

    @precondition(lambda self: self.live)
    @rule(seed=st.integers(0, 99))
    def crash(self, seed: int) -> None:
        """Layouts are made from the extents in use alone; the order in which they are told does not matter."""
        extents = list(self.live)
        for layout in (fresh := [self.row.new(), self.row.new()]):
            Random(seed).shuffle(extents)
            for extent in extents:
                layout.restore(extent)
            with pytest.raises(StoreError):
                layout.restore(extents[0])
        self.layout, self.twin = fresh
        self.files, self.gone = {extent.file for extent in extents}, set()

    @rule()
    def compact(self) -> None:
        file = self.layout.worn()
        assert file == self.twin.worn()
        assert file is None or isinstance(self.layout, JournalLayout)
        for extent in [extent for extent in self.live if extent.file == file]:
            self.placed(*self.live[extent], extent.nbytes)
            assert next(reversed(self.live)).file != file
            self.dropped(extent)
        assert file is None or file in self.gone

    @invariant()
    def extents_lie_apart(self) -> None:
        ends: dict[str, int] = {}
        for extent in sorted(self.live, key=lambda extent: (extent.file, extent.offset)):
            assert extent.offset >= ends.get(extent.file, 0)
            ends[extent.file] = extent.end
        assert self.layout.nbytes == self.twin.nbytes == sum(extent.nbytes for extent in self.live)
        assert not {extent.file for extent in self.live} & self.gone or isinstance(self.layout, RingLayout)

    def teardown(self) -> None:
        for extent in list(self.live):
            self.dropped(extent)
        assert len(self.files) <= self.row.kept
        assert self.layout.nbytes == 0


@every_layout
def test_layout_against_the_extents_in_use(row: Row) -> None:
    class Machine(LayoutMachine):
        pass

    Machine.row = row
    run_state_machine_as_test(Machine, settings=settings(max_examples=80, stateful_step_count=50, deadline=None))


@every_layout
def test_layout_has_its_name_and_only_takes_whole_pages(row: Row) -> None:
    layout = row.new()
    assert layout.name == row.name
    for nbytes in (0, -PAGE, PAGE + 1):
        with pytest.raises(ValueError, match="whole pages"):
            layout.place(0, 0, 0, nbytes)
    with pytest.raises(StoreError, match="no place"):
        layout.restore(Extent("elsewhere", 0, PAGE))
    with pytest.raises(ValueError, match="not in use"):
        layout.drop(Extent("elsewhere", 0, PAGE))
    assert layout.nbytes == 0 and layout.worn() is None and "0" in repr(layout)


def test_a_layout_of_an_impossible_size_is_refused() -> None:
    sizes: dict[Callable[..., Layout], list[int]] = {PagedLayout: [PAGE + 1], SegmentedLayout: [0], JournalLayout: [0], RingLayout: [1, 9]}
    for new, of in sizes.items():
        with pytest.raises(ValueError, match="not a"):
            new(*of)


def place(layout: Layout, *pages: int, layer: int = 0) -> list[Extent]:
    return [layout.place(0, layer, index, count * PAGE) for index, count in enumerate(pages)]


def where(extents: list[Extent]) -> list[tuple[str, int]]:
    return [(extent.file, extent.offset // PAGE) for extent in extents]


def test_chunks_take_the_first_gap_that_fits_and_gaps_merge() -> None:
    layout = ChunkedLayout()
    a, b, c, d, _ = place(layout, 1, 2, 1, 3, 1)
    for extent in (b, d):
        layout.drop(extent)
    assert where(place(layout, 3, 2)) == [("chunks", 4), ("chunks", 1)]
    for extent in (a, b, c):  # pages 0 to 3 are one gap then
        layout.drop(extent)
    assert where(place(layout, 4, 1)) == [("chunks", 0), ("chunks", 8)]


def test_chunks_at_the_end_are_forgotten_when_they_are_dropped() -> None:
    layout = ChunkedLayout()
    for extent in place(layout, 1, 1, 1)[1:]:
        layout.drop(extent)
    assert where(place(layout, 5)) == [("chunks", 1)]


def test_overlapping_chunks_are_refused() -> None:
    layout = ChunkedLayout()
    layout.restore(Extent("chunks", 4 * PAGE, 2 * PAGE))
    for offset in (3, 4, 5):
        with pytest.raises(StoreError, match="two records"):
            layout.restore(Extent("chunks", offset * PAGE, 2 * PAGE))
    assert where(place(layout, 4)) == [("chunks", 0)]


def test_pages_are_used_again_lowest_first_and_large_records_take_neighbours() -> None:
    layout = PagedLayout(2 * PAGE)
    extents = place(layout, 1, 2, 3, 2)
    assert where(extents) == [("pages", 0), ("pages", 2), ("pages", 4), ("pages", 8)]
    assert layout.nbytes == 8 * PAGE and layout.format == "aollm-kv-paged"
    layout.drop(extents[2])
    layout.drop(extents[0])
    assert where(place(layout, 3, 1, 1)) == [("pages", 4), ("pages", 0), ("pages", 10)]
    with pytest.raises(StoreError, match="no place"):
        layout.restore(Extent("pages", 13 * PAGE, PAGE))


def test_a_segment_begins_when_the_last_is_full() -> None:
    layout = SegmentedLayout(4 * PAGE)
    extents = place(layout, 1, 3, 1, 9, 1)
    assert where(extents) == [
        ("segment-000000", 0),
        ("segment-000000", 1),
        ("segment-000001", 0),
        ("segment-000002", 0),
        ("segment-000003", 0),
    ]
    assert [layout.drop(extent) for extent in extents] == [[], ["segment-000000"], ["segment-000001"], ["segment-000002"], []]
    assert where(place(layout, 1, 3)) == [("segment-000003", 1), ("segment-000004", 0)]


def test_a_segment_that_died_while_it_was_written_goes_with_the_next_drop() -> None:
    layout = SegmentedLayout(4 * PAGE)
    assert layout.drop(*place(layout, 3)) == []
    assert layout.drop(*place(layout, 2)) == ["segment-000000"]


def test_segments_go_on_behind_the_highest_one_restored() -> None:
    layout = SegmentedLayout(4 * PAGE)
    for number in (7, 3):
        layout.restore(Extent(f"segment-00000{number}", 0, PAGE))
    assert where(place(layout, 1)) == [("segment-000008", 0)]
    assert layout.drop(Extent("segment-000007", 0, PAGE)) == ["segment-000007"]


def test_a_worn_journal_is_compacted_once_into_the_next_generation() -> None:
    layout = JournalLayout(THRESHOLD)
    first, second = place(layout, 1, 1, 1, 1, layer=5), place(layout, 1, 1, 1, 1, layer=3)
    assert second[1] == Extent("layer-0003.000000.journal", PAGE, PAGE)
    for extents in (first, second):
        layout.drop(extents[0])
    assert layout.worn() is None
    for extents in (first, second):
        layout.drop(extents[2])
    assert [layout.worn() for _ in range(3)] == ["layer-0003.000000.journal", "layer-0005.000000.journal", None]
    assert where(place(layout, 1, 1, layer=3)) == [("layer-0003.000001.journal", 0), ("layer-0003.000001.journal", 1)]
    assert layout.drop(second[1]) == [] and layout.drop(second[3]) == ["layer-0003.000000.journal"]


def test_a_journal_of_dead_entries_goes_and_its_name_is_not_used_again() -> None:
    layout = JournalLayout()
    (extent,) = place(layout, 1, layer=-1)
    assert extent.file == "layer-none.000000.journal"
    assert layout.drop(extent) == [extent.file]
    assert where(place(layout, 1, layer=-1)) == [("layer-none.000001.journal", 0)]


def test_entries_that_died_in_an_earlier_run_wear_a_journal() -> None:
    layout = JournalLayout(THRESHOLD)
    for page in (1, 3):
        layout.restore(Extent("layer-0000.000002.journal", page * PAGE, PAGE))
    assert layout.worn() == "layer-0000.000002.journal"
    assert where(place(layout, 1)) == [("layer-0000.000003.journal", 0)]


def test_a_compaction_that_was_interrupted_is_done_again() -> None:
    layout = JournalLayout(THRESHOLD)
    for generation in (1, 0):
        layout.restore(Extent(f"layer-0000.00000{generation}.journal", 0, PAGE))
    assert [layout.worn(), layout.worn()] == ["layer-0000.000000.journal", None]
    assert where(place(layout, 1)) == [("layer-0000.000001.journal", 1)]


def test_a_ring_takes_the_room_of_a_lap_ago_once_it_is_dropped() -> None:
    layout = RingLayout(2, 2 * PAGE)
    old, other = layout.place(7, 3, 0, 2 * PAGE), layout.place(7, 3, 1, PAGE)
    assert (old, other) == (Extent("store-7.layer-3.ring", 0, 2 * PAGE), Extent("store-7.layer-3.ring", 2 * PAGE, PAGE))
    with pytest.raises(StoreError, match="still in use"):
        layout.place(7, 3, 2, PAGE)
    assert layout.drop(old) == []
    new = layout.place(7, 3, 2, PAGE)
    assert new == Extent("store-7.layer-3.ring", 0, PAGE)
    assert layout.drop(new) == [] and layout.drop(other) == ["store-7.layer-3.ring"]
    with pytest.raises(ValueError, match="larger"):
        layout.place(7, 3, 2, 3 * PAGE)


@pytest.mark.parametrize(("offset", "pages"), [(1, 1), (0, 3), (4, 1), (-2, 1)])
def test_what_fits_no_slot_is_not_restored(offset: int, pages: int) -> None:
    with pytest.raises(StoreError, match="no place"):
        RingLayout(2, 2 * PAGE).restore(Extent("store-0.layer-0.ring", offset * PAGE, pages * PAGE))
