"""Mamba2's recurrence over a block, with the state behind each token kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.triton_kernels.ssd import (
    OPTIONS,
    advance,
    contiguous,
    inside,
    is_hip,
    output,
    place,
    slot_of,
    step_sizes,
    tiles_of,
)


@triton.jit(do_not_specialize=["tokens", "dt_row"])
def _snapshot(
    y,
    snapshots,
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    state,
    slots,
    y_row,
    y_token: tl.constexpr,
    y_head: tl.constexpr,
    snapshot_row,
    snapshot_token: tl.constexpr,
    snapshot_head: tl.constexpr,
    snapshot_p: tl.constexpr,
    x_row,
    x_token: tl.constexpr,
    x_head: tl.constexpr,
    dt_row,
    dt_token: tl.constexpr,
    dt_head: tl.constexpr,
    b_row,
    b_token: tl.constexpr,
    b_group: tl.constexpr,
    c_row,
    c_token: tl.constexpr,
    c_group: tl.constexpr,
    state_row,
    state_head: tl.constexpr,
    state_p: tl.constexpr,
    tokens,
    pool_rows,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    heads_per_group: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, head, p = place(BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = (tl.program_id(1) // heads_per_group).to(tl.int64)
    in_p = inside(p, P, BLOCK_P)
    in_n = inside(n, N, BLOCK_N)
    in_state = in_p[:, None] & in_n[None, :]
    y += row * y_row + head * y_head + p
    snapshots += row * snapshot_row + head * snapshot_head + p[:, None] * snapshot_p + n[None, :]
    slot = slot_of(slots, row, pool_rows)
    if slot < 0:
        for token in range(tokens):
            tl.store(y + token * y_token, tl.zeros([BLOCK_P], y.dtype.element_ty), mask=in_p)
            tl.store(snapshots, tl.zeros([BLOCK_P, BLOCK_N], state.dtype.element_ty), mask=in_state)
            snapshots += snapshot_token
        return
    x += row * x_row + head * x_head
    dt += row * dt_row + head * dt_head
    b += row * b_row + group * b_group
    c += row * c_row + group * c_group
    tile = state + slot * state_row + head * state_head + p[:, None] * state_p + n[None, :]
    carried = tl.load(tile, mask=in_state, other=0.0).to(tl.float32)
    rate = tl.load(a + head).to(tl.float32)
    for token in range(tokens):
        steps = step_sizes(tl.load(dt + token * dt_token), dt_bias, head, dt_min, dt_max, SOFTPLUS)
        x_new = tl.load(x + token * x_token + p, mask=in_p, other=0.0)
        b_new = tl.load(b + token * b_token + n, mask=in_n, other=0.0)
        c_new = tl.load(c + token * c_token + n, mask=in_n, other=0.0)
        carried = advance(carried, x_new, b_new, steps, rate)
        out = output(carried, x_new, c_new, d, head)
        tl.store(y + token * y_token, out.to(y.dtype.element_ty), mask=in_p)
        kept = carried.to(snapshots.dtype.element_ty)
        tl.store(snapshots, kept, mask=in_state)
        carried = kept.to(tl.float32)
        snapshots += snapshot_token


def snapshot(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    """``specc::ssd_snapshot``, for shapes and dtypes that its provider has checked."""
    batch, tokens, heads, dim = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    snapshots = state.new_empty((batch, tokens, *state.shape[1:]))
    if not snapshots.numel():
        return y, snapshots
    tiles = tiles_of(dim, b.shape[3], is_hip(x))
    _snapshot[(triton.cdiv(dim, tiles["BLOCK_P"]), heads, batch)](
        y,
        snapshots,
        x,
        dt,
        a,
        b,
        c,
        d,
        dt_bias,
        state,
        contiguous(slots),
        *y.stride()[:3],
        *snapshots.stride()[:4],
        *x.stride()[:3],
        *dt.stride(),
        *b.stride()[:3],
        *c.stride()[:3],
        *state.stride()[:3],
        tokens,
        state.shape[0],
        dt_min,
        dt_max,
        heads_per_group=heads // b.shape[2],
        SOFTPLUS=softplus,
        **tiles,
        **OPTIONS,
    )
    return y, snapshots
