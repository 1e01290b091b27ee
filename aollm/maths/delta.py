"""Gated DeltaNet over the rows of one sequence: a causal convolution, then an associative memory with decay.

Yang et al., 2024 (arXiv 2412.06464): for each row, S ← eᵍ S, S ← S + k ⊗ β (v - kᵀS), and qᵀS comes out. Many rows go in
chunks, after Yang et al., 2024 (arXiv 2406.06484): inside one, all updates are one triangular system. Nothing here knows
where states are kept; given ones are never written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CHUNK = 64
"""Rows that are solved at once."""

_NORM_EPSILON = 1e-6


def causal_conv(rows: Tensor, weight: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """SiLU of the depthwise causal convolution of rows [T, C] with weight [C, K], in the rows' dtype, and the state after them.

    `state` [C, K-1] float32: the K-1 rows before the first one, as the last call gave them; None at the beginning. Sums are
    float32, and rounded once before the SiLU.
    """
    channels, size = weight.shape
    count = rows.shape[0]
    before = rows.new_zeros(size - 1, channels, dtype=torch.float32) if state is None else state.T
    padded = torch.cat((before, rows.float()))  # [K-1+T, C]
    taps = weight.T.float().contiguous()  # [K, C]
    out = padded[:count] * taps[0]
    for tap in range(1, size):
        out.addcmul_(padded[tap : tap + count], taps[tap])
    return functional.silu(out.to(rows.dtype)), padded[count:].T.clone(memory_format=torch.contiguous_format)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gated delta rule for q, k [T, Hk, Dk] and v [T, Hv, Dv]; returns [T, Hv, Dv] in v's dtype, and the state after the rows.

    Each of the Hk heads serves Hv/Hk consecutive heads of v. g [T, Hv]: log of the decay, float32; beta [T, Hv]: weight of the
    update; state [Hv, Dk, Dv] float32, None at the beginning. q and k are brought to length 1 here, and q scaled by Dk^-½.
    """
    if state is None:
        state = v.new_zeros(v.shape[1], k.shape[2], v.shape[2], dtype=torch.float32)
    outs = []
    advance = _step if v.shape[0] == 1 else _chunk  # from two rows on, a chunk is faster than as many steps
    for at in range(0, v.shape[0], CHUNK):
        rows = slice(at, at + CHUNK)
        out, state = advance(_unit(q[rows]) * q.shape[-1] ** -0.5, _unit(k[rows]), v[rows].float(), g[rows], beta[rows].float(), state)
        outs.append(out.to(v.dtype))
    return outs[0] if len(outs) == 1 else torch.cat(outs), state


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _NORM_EPSILON)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One row. What comes out follows from products with the state before it, so the new state is written and not read again."""
    group = v.shape[1] // k.shape[1]
    both = torch.stack((k[0], q[0]), 1).repeat_interleave(group, 0)  # [Hv, 2, Dk]
    decay = g[0].exp()[:, None, None]  # [Hv, 1, 1]
    seen, asked = (torch.bmm(both, state) * decay).unbind(1)  # [Hv, Dv]
    update = (v[0] - seen) * beta[0, :, None]
    out = asked + (both[:, 0] * both[:, 1]).sum(-1, keepdim=True) * update
    after = (both[:, 0, :, None] * update[:, None]).addcmul_(state, decay)
    return out[None], after


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Up to `CHUNK` rows, n of them; heads go first. R heads of v share one of k, and what is theirs alone is computed once."""
    n, heads = v.shape[:2]
    groups, dim = k.shape[1:]
    total = g.T.double().cumsum(-1)  # [Hv, n]; float64, because differences of large sums follow
    future = q.new_full((n, n), -torch.inf).triu_(1)
    between = (total[:, :, None] - total[:, None]).float().add_(future).exp_().view(groups, -1, 1, n, n)
    both = torch.stack((k, q)).permute(2, 0, 1, 3).contiguous()  # [Hk, 2, n, Dk]
    scores = torch.bmm(both.view(groups, 2 * n, dim), both[:, 0].transpose(1, 2)).view(groups, 1, 2, n, n) * between  # [Hk, R, 2, n, n]
    among, asked = scores.view(heads, 2, n, n).unbind(1)
    since = total.float().exp().view(groups, -1, 1, n, 1)
    seen, out = torch.bmm((both[:, None] * since).view(heads, 2 * n, dim), state).view(heads, 2, n, -1).unbind(1)
    rate = beta.T[..., None]  # [Hv, n, 1]
    wanted = (v.transpose(0, 1) - seen).mul_(rate)
    system = among.mul_(rate)
    update = torch.linalg.solve_triangular(system.mT, wanted.mT, upper=True, left=False, unitriangular=True).mT  # [Hv, n, Dv]
    out.baddbmm_(asked, update)
    until = (total[:, -1:] - total).float().exp().view(groups, -1, n, 1)
    faded = (both[:, None, 0] * until).view(heads, n, dim)
    after = torch.mul(state, total[:, -1].float().exp()[:, None, None]).baddbmm_(faded.transpose(1, 2), update)
    return out.transpose(0, 1), after
