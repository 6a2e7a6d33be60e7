"""Mamba2's recurrence over a block, from a checkpoint and a ring: one pass over the states."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.triton_kernels.ssd import (
    AHEAD,
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


@triton.jit(do_not_specialize=["tokens", "ring_size", "dt_row"])
def _replay(
    y,
    x,
    dt,
    a,
    b,
    c,
    d,
    dt_bias,
    state,
    ring_x,
    ring_b,
    ring_dt,
    base,
    seq_lens,
    final_lens,
    slots,
    y_row,
    y_token: tl.constexpr,
    y_head: tl.constexpr,
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
    ring_x_row,
    ring_x_entry: tl.constexpr,
    ring_x_head: tl.constexpr,
    ring_b_row,
    ring_b_entry: tl.constexpr,
    ring_b_group: tl.constexpr,
    ring_dt_row,
    ring_dt_entry: tl.constexpr,
    ring_dt_head: tl.constexpr,
    tokens,
    ring_size,
    pool_rows,
    dt_min,
    dt_max,
    SOFTPLUS: tl.constexpr,
    EVERY: tl.constexpr,
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
    slot = slot_of(slots, row, pool_rows)
    seq_len = tl.load(seq_lens + row)
    if (slot < 0) | (seq_len < 0):
        for token in range(tokens):
            tl.store(y + token * y_token, tl.zeros([BLOCK_P], y.dtype.element_ty), mask=in_p)
        return

    tile = state + slot * state_row + head * state_head + p[:, None] * state_p + n[None, :]
    carried = tl.load(tile, mask=in_state, other=0.0).to(tl.float32)
    ring_x += slot * ring_x_row + head * ring_x_head
    ring_b += slot * ring_b_row + group * ring_b_group
    ring_dt += slot * ring_dt_row + head * ring_dt_head
    x += row * x_row + head * x_head
    b += row * b_row + group * b_group
    dt += row * dt_row + head * dt_head
    c += row * c_row + group * c_group

    start = tl.load(base + slot)
    pending = tl.minimum(tl.maximum(seq_len - start, 0), ring_size).to(tl.int32)
    flushed = tl.maximum(tl.load(final_lens + row) - start, 0).to(tl.int32) // EVERY * EVERY
    first = tl.maximum(start, 0).to(tl.int32) % ring_size
    rate = tl.load(a + head).to(tl.float32)
    for age in tl.range(0, pending, loop_unroll_factor=AHEAD):
        entry = ((first + age) % ring_size).to(tl.int64)
        steps = tl.load(ring_dt + entry * ring_dt_entry)
        x_old = tl.load(ring_x + entry * ring_x_entry + p, mask=in_p, other=0.0)
        b_old = tl.load(ring_b + entry * ring_b_entry + n, mask=in_n, other=0.0)
        carried = advance(carried, x_old, b_old, steps, rate)
        if (age + 1) % EVERY == 0:
            rounded = carried.to(state.dtype.element_ty)
            if age + 1 == flushed:
                tl.store(tile, rounded, mask=in_state)
            carried = rounded.to(tl.float32)

    for token in range(tokens):
        steps = step_sizes(tl.load(dt + token * dt_token), dt_bias, head, dt_min, dt_max, SOFTPLUS)
        x_new = tl.load(x + token * x_token + p, mask=in_p, other=0.0)
        b_new = tl.load(b + token * b_token + n, mask=in_n, other=0.0)
        c_new = tl.load(c + token * c_token + n, mask=in_n, other=0.0)
        carried = advance(carried, x_new, b_new, steps, rate)
        out = output(carried, x_new, c_new, d, head)
        tl.store(y + token * y_token, out.to(y.dtype.element_ty), mask=in_p)
        age = pending + token
        if (age + 1) % EVERY == 0:
            carried = carried.to(state.dtype.element_ty).to(tl.float32)

        entry = ((first + age) % ring_size).to(tl.int64)
        tl.store(ring_x + entry * ring_x_entry + p, x_new, mask=in_p)
        if tl.program_id(0) == 0:
            tl.store(ring_dt + entry * ring_dt_entry, steps)
            if tl.program_id(1) % heads_per_group == 0:
                tl.store(ring_b + entry * ring_b_entry + n, b_new, mask=in_n)


def replay(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    ring_x: Tensor,
    ring_b: Tensor,
    ring_dt: Tensor,
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    slots: Tensor | None,
    softplus: bool,
    dt_min: float,
    dt_max: float,
    flush_every: int,
) -> Tensor:
    """``specc::ssd_replay``, for shapes and dtypes that its provider has checked."""
    batch, tokens, heads, dim = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not y.numel():
        return y
    tiles = tiles_of(dim, b.shape[3], is_hip(x))
    _replay[(triton.cdiv(dim, tiles["BLOCK_P"]), heads, batch)](
        y,
        x,
        dt,
        a,
        b,
        c,
        d,
        dt_bias,
        state,
        ring_x,
        ring_b,
        ring_dt,
        base,
        seq_lens.contiguous(),
        final_lens.contiguous(),
        contiguous(slots),
        *y.stride()[:3],
        *x.stride()[:3],
        *dt.stride(),
        *b.stride()[:3],
        *c.stride()[:3],
        *state.stride()[:3],
        *ring_x.stride()[:3],
        *ring_b.stride()[:3],
        *ring_dt.stride(),
        tokens,
        ring_x.shape[1],
        state.shape[0],
        dt_min,
        dt_max,
        heads_per_group=heads // b.shape[2],
        SOFTPLUS=softplus,
        EVERY=flush_every,
        **tiles,
        **OPTIONS,
    )
    return y
