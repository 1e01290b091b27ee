"""MXFP4 weights: the numbers of transformers bit for bit, products within rounding, with numba's kernels and without numba."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from aollm.errors import CheckpointError
from aollm.maths import mxfp4
from aollm.maths.mxfp4 import FUSED_ROWS, compiled, dequantize, mxfp4_linear

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = {BF16: 2**-8, F32: 2**-20, F16: 2**-10}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(1)


@pytest.fixture(params=["compiled", "torch alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "compiled":
        assert compiled()
        yield request.param
        return
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "aollm.maths.mxfp4_kernels", raising=False)
    mxfp4._kernels.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"pip install 'aollm\[mxfp4\]'"):
        assert not compiled()
    yield request.param
    mxfp4._kernels.cache_clear()


def packed(*shape: int, low: int = 118, high: int = 126, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random blocks [*shape, 16] and scales [*shape] from low to high, both included."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
    return blocks, torch.randint(low, high + 1, shape, dtype=torch.uint8, generator=generator)


def same_bits(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype and a.shape == b.shape
    kind = torch.int32 if a.dtype == F32 else torch.int16
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_every_byte_under_every_scale_is_that_of_transformers(way: str, dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(2, 256, 16).contiguous()
    theirs = _convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
    assert same_bits(dequantize(blocks, scales, dtype), theirs)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 7), (5, 3), (2, 9, 4), (2, 3, 4, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_shapes(way: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    blocks, scales = packed(*shape, low=0, high=254)
    flat = _convert_moe_packed_tensors(blocks.reshape(1, -1, 1, 16), scales.reshape(1, -1, 1), dtype=dtype)
    theirs = flat.transpose(1, 2).reshape(*shape[:-1], shape[-1] * 32)
    assert same_bits(dequantize(blocks, scales, dtype), theirs)


def test_low_nibble_comes_first_and_known_values(way: str) -> None:
    blocks = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2, dtype=torch.uint8).view(1, 1, 16)
    sizes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    once = torch.tensor(sizes + [-size for size in sizes])
    for scale, factor in ((127, 1.0), (128, 2.0), (120, 2**-7), (0, 2.0**-127), (254, 2.0**127)):
        weights = dequantize(blocks, torch.tensor([[scale]], dtype=torch.uint8), F32)
        assert torch.equal(weights, (once.double() * factor).float().repeat(2)[None])


@pytest.mark.parametrize("rows", [0, 1, 4, 7, 9, 33])
@pytest.mark.parametrize(("outs", "groups"), [(1, 1), (7, 2), (34, 9)])
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
def test_products_within_rounding(way: str, dtype: torch.dtype, outs: int, groups: int, rows: int) -> None:
    blocks, scales = packed(outs, groups, seed=rows)
    x, bias = torch.randn(rows, groups * 32).to(dtype), torch.randn(outs).to(dtype)
    weights = dequantize(blocks, scales, F32).double()
    for given in (None, bias):
        exact = x.double() @ weights.T + (0 if given is None else given.double())
        reach = x.double().abs() @ weights.abs().T + bias.abs()  # rounding grows with what is summed, not with the sum
        y = mxfp4_linear(x, blocks, scales, given)
        assert y.dtype == dtype and y.shape == (rows, outs)
        assert bool(((y.double() - exact).abs() <= exact.abs() * ROUNDING[dtype] + reach * 2**-20).all())


@pytest.mark.parametrize("scale", [0, 1, 2, 126, 127, 128, 252])
@pytest.mark.parametrize("rows", [1, 4, 40])
def test_products_under_the_ends_of_the_scales(way: str, rows: int, scale: int) -> None:
    blocks, _ = packed(6, 2)
    scales = torch.full((6, 2), scale, dtype=torch.uint8)
    x = torch.full((rows, 64), 2.0**-10)
    exact = x.double() @ dequantize(blocks, scales, F32).double().T
    y = mxfp4_linear(x, blocks, scales)
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=2.0**-145)


def test_tiles_that_do_not_divide(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mxfp4, "SCRATCH_NBYTES", 1000)
    blocks, scales = packed(23, 3)
    x, bias = torch.randn(40, 96), torch.randn(23)
    expected = torch.nn.functional.linear(x, dequantize(blocks, scales, F32), bias)
    assert torch.allclose(mxfp4_linear(x, blocks, scales, bias), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 4, 50])
def test_views_into_larger_tensors(way: str, rows: int) -> None:
    stacked_blocks, stacked_scales = packed(3, 10, 4)
    wide = torch.randn(rows, 256)
    x = wide[:, 64:192]
    blocks, scales = stacked_blocks[1, ::2], stacked_scales[1, ::2]
    y = mxfp4_linear(x, blocks, scales)
    assert torch.allclose(y, x @ dequantize(blocks, scales, F32).T, rtol=1e-5, atol=1e-4)
    odd = torch.zeros(stacked_blocks.numel() + 1, dtype=torch.uint8)  # no address is promised to be even
    odd[1:] = stacked_blocks.flatten()
    assert torch.equal(mxfp4_linear(x, odd[1:].view_as(stacked_blocks)[1, ::2], scales), y)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_one_row_is_the_same_for_any_number_of_threads(threads: int) -> None:
    blocks, scales = packed(101, 6)
    x = torch.randn(6, 192)
    before = torch.get_num_threads()
    alone = mxfp4_linear(x, blocks, scales)
    torch.set_num_threads(threads)
    assert torch.equal(mxfp4_linear(x, blocks, scales), alone)
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_two_callers_at_once(way: str) -> None:
    blocks, scales = packed(64, 8)
    rows = [torch.randn(count, 256) for count in (1, FUSED_ROWS[F32] + 1)]
    alone = [mxfp4_linear(x, blocks, scales) for x in rows]

    def same(turn: int) -> bool:
        return torch.allclose(mxfp4_linear(rows[turn % 2], blocks, scales), alone[turn % 2], rtol=1e-5, atol=1e-4)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(same, range(60)))


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(4, 2, 8, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16, dtype=torch.int8), torch.zeros(4, 2, dtype=torch.uint8)),
        (torch.zeros(4, 2, 16, dtype=torch.uint8), torch.zeros(4, 2)),
        (torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)),
        (torch.zeros(4, 0, 16, dtype=torch.uint8), torch.zeros(4, 0, dtype=torch.uint8)),
    ],
)
def test_weights_that_do_not_go_together_are_refused(blocks: Tensor, scales: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"uint8 blocks \[..., out, in/32, 16\].*download"):
        dequantize(blocks, scales)
    with pytest.raises(CheckpointError, match="MXFP4 weights must be"):
        mxfp4_linear(torch.zeros(1, 64), blocks, scales)


def test_rows_and_biases_that_do_not_fit_are_refused() -> None:
    blocks, scales = packed(4, 2)
    with pytest.raises(CheckpointError, match="rows of 32 numbers do not go with MXFP4 weights of 64 inputs"):
        mxfp4_linear(torch.zeros(1, 32), blocks, scales)
    with pytest.raises(CheckpointError, match="a bias of 3 numbers does not go with MXFP4 weights of 4 outputs"):
        mxfp4_linear(torch.zeros(1, 64), blocks, scales, torch.zeros(3))
    with pytest.raises(CheckpointError, match=r"2 dimensions"):
        mxfp4_linear(torch.zeros(1, 64), blocks[None], scales[None])


FRESH = """
import sys, torch
from aollm.maths import mxfp4
assert "numba" not in sys.modules
torch.set_num_threads(1)
assert mxfp4.compiled() and torch.get_num_threads() == 1
generator = torch.Generator().manual_seed(5)
blocks = torch.randint(0, 256, (37, 5, 16), dtype=torch.uint8, generator=generator)
scales = torch.arange(37 * 5).view(37, 5).to(torch.uint8)
for dtype in (torch.bfloat16, torch.float32):
    by_torch = torch.empty(37, 160, dtype=dtype)
    mxfp4._look_up(by_torch, blocks, scales)
    assert torch.equal(mxfp4.dequantize(blocks, scales, dtype), by_torch)
x = torch.randn(6, 160, generator=generator)
y = mxfp4.mxfp4_linear(x, blocks, scales.clamp(100, 127))
by_torch = torch.nn.functional.linear(x, mxfp4.dequantize(blocks, scales.clamp(100, 127), torch.float32))
assert torch.allclose(y, by_torch, rtol=1e-5, atol=1e-4)
print(sum(mxfp4._kernels().product.stats.cache_hits.values()))
"""


def fresh(folder: Path, **environment: str) -> int:
    """Decode and multiply in a process of its own; how often it found machine code in the cache."""
    given = {**os.environ, "NUMBA_CACHE_DIR": str(folder), **environment}
    done = subprocess.run([sys.executable, "-W", "error", "-c", FRESH], env=given, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_compiles_once_and_never_at_import(tmp_path: Path) -> None:
    assert fresh(tmp_path) == 0
    assert fresh(tmp_path) == 1


def test_without_wide_registers_and_where_no_cache_can_be_written(tmp_path: Path) -> None:
    """Both at once, for each would compile anew."""
    (tmp_path / "file").touch()
    where = {"NUMBA_CACHE_DIR": str(tmp_path / "file" / "below"), "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    assert fresh(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="", **where) == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
