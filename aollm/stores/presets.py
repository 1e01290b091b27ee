"""The eight presets: rows of a table over the axes. No code compares a preset's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..maths.attention import BLOCK
from .chunked import ChunkedLayout
from .codec import Codec, Int8Codec, RawCodec
from .journal import JournalLayout
from .layout import Layout
from .paged import PagedLayout
from .residency import BufferedTail, FullyResident, Residency, WriteBack
from .ring import RingLayout
from .segmented import SegmentedLayout

SEGMENT_NBYTES = 64 << 20
RAW, BUFFERED = RawCodec(), BufferedTail()


@dataclass(frozen=True, slots=True)
class Preset:
    """One KV cache strategy. `layout(record_nbytes, window)` makes its layout, None where nothing is written; `root` is its
    folder under `cache_dir`."""

    strategy_id: str
    persistence_format: str
    root: str
    layout: Callable[[int, int | None], Layout] | None = None
    residency: Residency = BUFFERED
    codec: Codec = RAW
    windowed: bool = False


def ring_cells(window: int) -> int:
    """Blocks of a sequence that a ring keeps on disk for a window of so many tokens."""
    return -(-window // BLOCK) + 3


def _journal(record_nbytes: int, window: int | None) -> Layout:
    return JournalLayout()


PRESETS: dict[str, Preset] = {
    preset.strategy_id: preset
    for preset in (
        Preset("resident", "resident-only", "", None, FullyResident()),
        Preset("chunked", "chunked-manifest", "kv_cache_chunked", lambda record, window: ChunkedLayout()),
        Preset("paged", "paged-manifest", "kv_cache_paged", lambda record, window: PagedLayout(record)),
        Preset(
            "streamed-segmented", "streamed-segmented", "kv_cache_streamed_segmented",
            lambda record, window: SegmentedLayout(max(SEGMENT_NBYTES, record)),
        ),
        Preset("log-structured-journal", "log-structured-journal", "kv_cache_log_structured_journal", _journal),
        Preset(
            "sliding-window-ring-buffer", "sliding-window-ring-buffer", "kv_cache_sliding_window_ring_buffer",
            lambda record, window: RingLayout(ring_cells(window or 1), record), windowed=True,
        ),
        Preset("quantized-cold-tier", "log-structured-journal", "kv_cache_quantized_cold_tier", _journal, codec=Int8Codec()),
        Preset("tiered-write-back", "log-structured-journal", "kv_cache_tiered_write_back/cold", _journal, WriteBack()),
    )
}  # fmt: skip
