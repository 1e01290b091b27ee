"""The gated delta rule and its convolution are those of Qwen3-Next, however the rows are split."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import (
    causal_conv1d_fn,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from aollm.maths.delta import causal_conv, gated_delta

Inputs = tuple[torch.Tensor, ...]

SPLITS = [(70,), (1, 69), (33, 37), (64, 64), (63, 1, 1), (128, 2), (200,), (2, 3, 65), (1,) * 9]


def made(rows: int, key_heads: int, heads: int, key_dim: int, dim: int, decay: float = 1.0, seed: int = 0) -> tuple[Inputs, torch.Tensor]:
    """q, k, v, g and beta, and a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(rows, key_heads, key_dim), normal(rows, key_heads, key_dim), normal(rows, heads, dim)
    return (q, k, v, -decay * normal(rows, heads).exp(), normal(rows, heads).sigmoid()), normal(heads, key_dim, dim)


def in_parts(inputs: Inputs, split: tuple[int, ...], state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    outs = []
    for part in zip(*(x.split_with_sizes(list(split)) for x in inputs), strict=True):
        q, k, v, g, beta = part
        out, state = gated_delta(q, k, v, g, beta, state)
        outs.append(out)
    return torch.cat(outs), state


def theirs(rule: str, inputs: Inputs, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, g, beta = (x[None] for x in inputs)
    run = torch_recurrent_gated_delta_rule if rule == "recurrent" else torch_chunk_gated_delta_rule
    before = None if state is None else state[None].clone()
    out, after = run(q, k, v, g=g, beta=beta, initial_state=before, output_final_state=True, use_qk_l2norm_in_kernel=True)
    return out[0], after[0]


def exact(inputs: Inputs, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule as it is written, row by row in float64."""
    q, k, v, g, beta = (x.double() for x in inputs)
    heads, group = v.shape[1], v.shape[1] // k.shape[1]
    q, k = ((x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)).repeat_interleave(group, 1) for x in (q, k))
    memory = torch.zeros(heads, k.shape[2], v.shape[2], dtype=torch.float64) if state is None else state.double()
    outs = []
    for row in range(len(v)):
        memory = memory * g[row].exp()[:, None, None]
        wrong = v[row] - torch.einsum("hkv,hk->hv", memory, k[row])
        memory = memory + torch.einsum("hk,hv->hkv", k[row], wrong * beta[row, :, None])
        outs.append(torch.einsum("hkv,hk->hv", memory, q[row]) * q.shape[-1] ** -0.5)
    return torch.stack(outs).float(), memory.float()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("key_heads", "heads"), [(2, 2), (2, 6), (1, 4)])
@pytest.mark.parametrize("split", SPLITS)
def test_any_split_is_the_rule_of_transformers(split: tuple[int, ...], key_heads: int, heads: int, fresh: bool) -> None:
    inputs, given = made(sum(split), key_heads, heads, 16, 24)
    state = None if fresh else given
    found = in_parts(inputs, split, state)
    for rule in ("recurrent", "chunk"):
        torch.testing.assert_close(found, theirs(rule, inputs, state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.1, 3.0, 40.0])
@pytest.mark.parametrize("split", [(130,), (65, 1, 64)])
def test_weak_and_strong_decay(split: tuple[int, ...], decay: float) -> None:
    inputs, state = made(130, 2, 4, 16, 16, decay)
    torch.testing.assert_close(in_parts(inputs, split, state), exact(inputs, state), rtol=1e-5, atol=1e-5)


def test_a_moment_that_forgets_all_does_not_blur_what_follows() -> None:
    (q, k, v, g, beta), state = made(64, 1, 2, 16, 16, 0.01)
    g[5] = -1e5
    inputs = (q, k, v, g, beta)
    torch.testing.assert_close(in_parts(inputs, (64,), state), exact(inputs, state), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [(64,), (100,), (1,) * 20])
def test_the_same_key_again_and_again(split: tuple[int, ...]) -> None:
    (q, k, v, g, _), state = made(sum(split), 1, 2, 16, 16, 0.0)
    inputs = (q, k[:1].expand_as(k), v, g, torch.ones(sum(split), 2))
    found, after = in_parts(inputs, split, state)
    wanted, state_after = exact(inputs, state)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after, state_after, rtol=1e-5, atol=1e-5)


def test_the_sizes_of_the_published_model() -> None:
    inputs, state = made(96, 16, 32, 128, 128, 0.1)
    wanted = theirs("chunk", inputs, state)
    torch.testing.assert_close(in_parts(inputs, (96,), state), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(in_parts(inputs, (95, 1), state), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, rows: int) -> None:
    (q, k, v, g, beta), state = made(rows, 2, 4, 16, 16)
    half = (q.to(dtype), k.to(dtype), v.to(dtype), g, beta.to(dtype))
    found, after = gated_delta(*half, state)
    wanted, state_after = gated_delta(*(x.float() for x in half), state)
    assert found.dtype == dtype and after.dtype == torch.float32
    assert torch.equal(found, wanted.to(dtype)) and torch.equal(after, state_after)


@pytest.mark.parametrize("rows", [1, 64, 70])
def test_what_is_given_is_not_written(rows: int) -> None:
    inputs, state = made(rows, 2, 4, 16, 16)
    before = [x.clone() for x in (*inputs, state)]
    _, after = gated_delta(*inputs, state)
    assert all(torch.equal(x, y) for x, y in zip((*inputs, state), before, strict=True))
    assert after.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("split", [(1,), (2,), (40,), (1, 39), (3, 37), (20, 1, 1, 18), (1,) * 8])
def test_any_split_is_the_convolution_of_transformers(split: tuple[int, ...], size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, weight = torch.randn(sum(split), 12, generator=generator), torch.randn(12, size, generator=generator)
    wanted = causal_conv1d_fn(rows.T[None], weight, activation="silu")[0].T
    state, outs = None, []
    edges = [0, *torch.tensor(split).cumsum(0).tolist()]
    for low, high in pairwise(edges):
        given = None if state is None else state.clone()
        out, after = causal_conv(rows[low:high], weight, state)
        assert state is None or torch.equal(state, given)
        assert torch.equal(after, functional.pad(rows[:high].T, (size - 1, 0))[:, -(size - 1) :])
        assert after.untyped_storage().nbytes() == after.nbytes  # it keeps no rows alive
        outs.append(out)
        state = after
    torch.testing.assert_close(torch.cat(outs), wanted, rtol=1e-5, atol=1e-6)


def test_the_convolution_rounds_once_before_the_silu() -> None:
    generator = torch.Generator().manual_seed(2)
    rows, weight = torch.randn(30, 64, generator=generator).bfloat16(), torch.randn(64, 4, generator=generator).bfloat16()
    out, state = causal_conv(rows, weight, None)
    wanted = functional.conv1d(functional.pad(rows.float().T, (3, 0))[None], weight.float()[:, None], groups=64)[0].T
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(out, functional.silu(wanted.bfloat16()), rtol=2**-7, atol=2**-9)
    assert (out == functional.silu(wanted.bfloat16())).float().mean() > 0.99
    one, _ = causal_conv(rows[-1:], weight, causal_conv(rows[:-1], weight, None)[1])
    assert torch.equal(one, out[-1:])
