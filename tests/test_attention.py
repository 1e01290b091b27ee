"""Attention folded over blocks is attention: any start, rows, window, heads, sinks, spans and order of blocks."""

from collections.abc import Sequence
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from aollm.maths import attention
from aollm.maths.attention import Block, Fold, attend


def plain(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float, window: int | None,
    sinks: torch.Tensor | None = None, spans: Sequence[tuple[int, int]] = (),
) -> torch.Tensor:  # fmt: skip
    """Softmax attention with a whole score matrix, in float64."""
    group = queries.shape[1] // keys.shape[1]
    q, k, v = queries.double(), keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.masked_fill(~visible(start, start + len(q), len(k), window, spans), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, len(q), 1)), -1)
    return torch.einsum("hts,shd->thd", scores.softmax(-1)[..., : len(k)], v).to(queries.dtype)


def visible(start: int, end: int, keys: int, window: int | None, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Which keys the queries [start, end) see: causally or of the same span, and within the window."""
    at, seen = torch.arange(start, end)[:, None], torch.arange(keys)[None]
    mask = seen <= at
    for low, high in spans:
        mask = mask | ((at >= low) & (at < high) & (seen >= low) & (seen < high))
    return mask if window is None else mask & (seen > at - window)


def made(
    seed: int, start: int, rows: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    total = start + rows
    shapes = ((rows, heads, dim), (total, kv_heads, dim), (total, kv_heads, dim))
    return tuple((torch.randn(shape, generator=generator) * 2).to(dtype) for shape in shapes)


def cut(keys: torch.Tensor, values: torch.Tensor, size: int) -> list[Block]:
    return [Block(at, keys[at : at + size], values[at : at + size]) for at in range(0, len(keys), size)]


def test_a_query_that_sees_nothing_of_the_first_two_parts() -> None:
    q, k, v = made(0, 22, 3, 1, 1, 2)
    with patch.object(attention, "BLOCK", 7):
        found = attend(q, cut(k, v, 7), 22, 0.7, 3)
    torch.testing.assert_close(found, plain(q, k, v, 22, 0.7, 3), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_cut_in_any_order_is_plain_attention(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([1, 2, 4, 7, 16]), "block")
    start, rows = data.draw(st.integers(0, 40), "start"), data.draw(st.integers(1, 40), "rows")
    kv_heads, group = data.draw(st.integers(1, 3), "kv heads"), data.draw(st.integers(1, 3), "group")
    dim = data.draw(st.sampled_from([2, 5, 8, 16, 20]), "dim")
    window = data.draw(st.none() | st.integers(1, 90), "window")
    q, k, v = made(data.draw(st.integers(0, 99), "seed"), start, rows, kv_heads * group, kv_heads, dim)
    blocks = data.draw(st.permutations(cut(k, v, block)), "order")
    with patch.object(attention, "BLOCK", block):
        found = attend(q, blocks, start, dim**-0.5, window)
    torch.testing.assert_close(found, plain(q, k, v, start, dim**-0.5, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 100, 1000, 1024, 1025, 1500])
@pytest.mark.parametrize(
    ("start", "rows"), [(0, 1), (0, 1024), (0, 1025), (1023, 1), (1023, 3), (1024, 1), (700, 700), (1, 2100), (2047, 2)]
)
def test_blocks_of_the_real_size(start: int, rows: int, window: int | None) -> None:
    q, k, v = made(3, start, rows, 4, 2, 8)
    found = attend(q, cut(k, v, attention.BLOCK), start, 0.3, window)
    torch.testing.assert_close(found, plain(q, k, v, start, 0.3, window), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize(("start", "rows"), [(0, 50), (33, 1), (30, 30)])
def test_half_precision_is_within_rounding(dtype: torch.dtype, window: int | None, start: int, rows: int) -> None:
    q, k, v = made(4, start, rows, 4, 2, 16, dtype)
    with patch.object(attention, "BLOCK", 16):
        found = attend(q, cut(k, v, 16), start, 0.25, window)
    assert found.dtype == dtype
    wanted = plain(q.float(), k.float(), v.float(), start, 0.25, window)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol={torch.bfloat16: 0.05, torch.float16: 0.006}[dtype])


def test_many_folds_in_half_precision_do_not_add_up_errors() -> None:
    q, k, v = made(5, 2000, 1, 4, 2, 16, torch.bfloat16)
    with patch.object(attention, "BLOCK", 4):
        found = attend(q, cut(k, v, 4), 2000, 0.01, None)
    torch.testing.assert_close(found.float(), plain(q.float(), k.float(), v.float(), 2000, 0.01, None), rtol=0, atol=0.004)


@pytest.mark.parametrize("size", [1e4, 1e-4, 0.0])
def test_extreme_scores_stay_finite(size: float) -> None:
    q, k, v = made(6, 20, 20, 2, 1, 8)
    with patch.object(attention, "BLOCK", 8):
        found = attend(q * size, cut(k * max(size, 1), v, 8), 20, 1.0)
    torch.testing.assert_close(found, plain(q * size, k * max(size, 1), v, 20, 1.0, None), rtol=1e-3, atol=1e-3)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 60), st.integers(1, 20), st.none() | st.integers(1, 40), st.integers(0, 80), st.integers(1, 20))
def test_a_block_is_wanted_just_when_a_query_sees_one_of_its_keys(start: int, rows: int, window: int | None, low: int, size: int) -> None:
    fold = Fold(torch.zeros(rows, 1, 2), start, 1.0, window)
    seen = any(k <= q and (window is None or k > q - window) for q in range(start, start + rows) for k in range(low, low + size))
    assert fold.wants(low, low + size) == seen


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int]]]:
    """Where rows begin, how many there are, and spans: some before the rows, some among them, wholly."""
    start, rows = draw(st.integers(0, 40)), draw(st.integers(1, 40))
    edges = sorted(draw(st.lists(st.integers(0, start + rows), max_size=8, unique=True)))
    spans = [(low, high) for low, high in zip(edges[::2], edges[1::2], strict=False) if high <= start or low >= start]
    return start, rows, spans


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_spans_and_sinks_under_any_cut_and_order(data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([3, 4, 7, 16]), "block")
    start, rows, spans = data.draw(layouts(), "layout")
    kv_heads, group = data.draw(st.integers(1, 2), "kv heads"), data.draw(st.integers(1, 3), "group")
    window = data.draw(st.none() | st.integers(1, 60), "window")
    q, k, v = made(data.draw(st.integers(0, 99), "seed"), start, rows, kv_heads * group, kv_heads, 8)
    sinks = data.draw(st.sampled_from([None, torch.linspace(-3, 5, kv_heads * group)]), "sinks")
    blocks = data.draw(st.permutations(cut(k, v, block)), "order")
    with patch.object(attention, "BLOCK", block):
        found = attend(q, blocks, start, 0.3, window, sinks, spans)
    torch.testing.assert_close(found, plain(q, k, v, start, 0.3, window, sinks, spans), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3, 30])
def test_spans_fold_to_the_same_bits_in_any_order(window: int | None) -> None:
    q, k, v = made(13, 10, 30, 2, 1, 8)
    spans, blocks = [(12, 21), (22, 24), (30, 40)], cut(k, v, 8)
    with patch.object(attention, "BLOCK", 8):
        in_order = attend(q, blocks, 10, 0.3, window, None, spans)
        assert torch.equal(attend(q, blocks[::-1], 10, 0.3, window, None, spans), in_order)
        assert torch.equal(attend(q, [*blocks[1::2], *blocks[::2]], 10, 0.3, window, None, spans), in_order)


@pytest.mark.parametrize("window", [None, 100, 512, 1500])
@pytest.mark.parametrize(
    ("start", "rows", "span"),
    [
        (0, 1100, (900, 1100)),  # across a boundary, up to the last row
        (900, 300, (1000, 1150)),
        (1023, 2, (1023, 1025)),  # one query of the span on each side
        (1000, 1100, (1010, 2090)),  # a whole block within the span
        (1024, 256, (1024, 1280)),
        (768, 256, (768, 1024)),
        (1300, 1, (1000, 1256)),  # decoding after an image
        (1256, 700, (1000, 1256)),
    ],
)
def test_spans_across_blocks_of_the_real_size(start: int, rows: int, span: tuple[int, int], window: int | None) -> None:
    q, k, v = made(7, start, rows, 2, 1, 8)
    found = attend(q, cut(k, v, attention.BLOCK), start, 0.3, window, None, [span])
    torch.testing.assert_close(found, plain(q, k, v, start, 0.3, window, None, [span]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize("spans", [[], [(3, 9)], [(0, 6), (6, 12), (20, 31)], [(34, 44)]])
def test_gemma3s_images_see_themselves_as_in_transformers(spans: list[tuple[int, int]], layer_type: str) -> None:
    rows, window = 44, 11
    config = Gemma3TextConfig(
        hidden_size=16, num_hidden_layers=2, sliding_window=window, layer_types=["sliding_attention", "full_attention"]
    )  # fmt: skip
    config._attn_implementation = "eager"
    images = torch.full((1, rows), -1)
    for number, (low, high) in enumerate(spans):
        images[0, low:high] = number
    masks = create_masks_for_vision_model(config, torch.zeros(1, rows, 16), None, None, torch.arange(rows)[None], images)
    own = window if layer_type == "sliding_attention" else None
    assert torch.equal(masks[layer_type][0, 0] == 0, visible(0, rows, rows, own, spans))
    q, k, v = made(8, 0, rows, 4, 2, 8)
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(2, 1)) * 0.3 + masks[layer_type][0]
    wanted = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(2, 1))
    with patch.object(attention, "BLOCK", 8):
        torch.testing.assert_close(attend(q, cut(k, v, 8), 0, 0.3, own, None, spans), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 128])
@pytest.mark.parametrize(("start", "rows"), [(0, 1), (50, 1), (0, 40), (30, 33), (200, 7)])
@pytest.mark.parametrize("block", [8, 1024])
def test_sinks_are_gpt_osss(start: int, rows: int, window: int | None, block: int) -> None:
    q, k, v = made(9, start, rows, 4, 2, 16)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 9.0])
    hidden = ~visible(start, start + rows, start + rows, window, [])
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    wanted, _ = eager_attention_forward(module, *(x.transpose(0, 1)[None] for x in (q, k, v)), mask, 0.25)
    with patch.object(attention, "BLOCK", block):
        found = attend(q, cut(k, v, block), start, 0.25, window, sinks)
    torch.testing.assert_close(found, wanted[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sinks_in_half_precision(dtype: torch.dtype, block: int) -> None:
    q, k, v = made(10, 20, 20, 4, 2, 16, dtype)
    sinks = torch.tensor([-1.0, 0.0, 2.0, 4.0], dtype=dtype)
    with patch.object(attention, "BLOCK", block):
        found = attend(q, cut(k, v, block), 20, 0.25, None, sinks)
    assert found.dtype == dtype
    wanted = plain(q.float(), k.float(), v.float(), 20, 0.25, None, sinks)
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol={torch.bfloat16: 0.05, torch.float16: 0.006}[dtype])


@pytest.mark.parametrize(("start", "rows"), [(0, 30), (25, 1), (17, 12)])
@pytest.mark.parametrize("window", [None, 6])
def test_what_is_not_there_changes_no_bit(start: int, rows: int, window: int | None) -> None:
    q, k, v = made(11, start, rows, 2, 1, 8)
    with patch.object(attention, "BLOCK", 8):
        bare = attend(q, cut(k, v, 8), start, 0.3, window)
        found = attend(q, cut(k, v, 8), start, 0.3, window, torch.full((2,), -torch.inf), [(0, start), (start + rows, 99)])
    assert torch.equal(found, bare)


def test_a_result_may_be_asked_for_again() -> None:
    q, k, v = made(12, 0, 20, 2, 1, 8)
    folded = attention.Attention(q, 0, 0.3, sinks=torch.ones(2))
    folded.add(Block(0, k, v))
    assert torch.equal(folded.result(), folded.result())


@settings(deadline=None, max_examples=200)
@given(layouts(), st.none() | st.integers(1, 40), st.integers(0, 80), st.integers(1, 20))
def test_a_block_that_a_span_sees_is_wanted(
    layout: tuple[int, int, list[tuple[int, int]]], window: int | None, low: int, size: int
) -> None:  # fmt: skip
    start, rows, spans = layout
    middle = start + rows // 2 + 1  # a tile may end or begin within a span
    for first, end in ((start, middle), (middle, start + rows)):
        if first < end:
            fold = Fold(torch.zeros(end - first, 1, 2), first, 1.0, window, None, spans)
            assert fold.wants(low, low + size) == bool(visible(first, end, 100, window, spans)[:, low : low + size].any())


@pytest.mark.parametrize(
    ("span", "low", "wanted"),
    [((20, 30), 20, False), ((15, 30), 20, True), ((15, 30), 30, False), ((2, 10), 6, False), ((5, 12), 5, False), ((5, 12), 4, False)],
)
def test_a_span_beside_a_tile_is_none_of_its_own(span: tuple[int, int], low: int, wanted: bool) -> None:
    fold = Fold(torch.zeros(10, 1, 2), 10, 1.0, 3, None, [span])
    assert fold.wants(low, low + 1) == wanted
