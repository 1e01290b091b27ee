"""Attention folded over blocks is attention: any start, rows, window, heads and order of blocks."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aollm.maths import attention
from aollm.maths.attention import Block, Fold, attend


def plain(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, scale: float, window: int | None) -> torch.Tensor:
    """Softmax attention with a whole score matrix, in float64."""
    group = queries.shape[1] // keys.shape[1]
    q, k, v = queries.double(), keys.double().repeat_interleave(group, 1), values.double().repeat_interleave(group, 1)
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    at, seen = torch.arange(start, start + len(q))[:, None], torch.arange(len(k))[None]
    hidden = (seen > at) if window is None else (seen > at) | (seen <= at - window)
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).to(queries.dtype)


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


@settings(deadline=None, max_examples=150)
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
