"""Records of a ring added to Mamba2's checkpoints."""

from __future__ import annotations

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
    place,
    slot_of,
    tiles_of,
)


@triton.jit(do_not_specialize=["ring_size"])
def _fold(
    state,
    a,
    ring_x,
    ring_b,
    ring_dt,
    base,
    upto,
    slots,
    track_slots,
    track_upto,
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
    ring_size,
    pool_rows,
    heads_per_group: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, head, p = place(BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = (tl.program_id(1) // heads_per_group).to(tl.int64)
    slot = slot_of(slots, row, pool_rows)
    if slot < 0:
        return
    start = tl.load(base + slot)
    count = tl.minimum(tl.load(upto + row) - start, ring_size).to(tl.int32)
    track_slot, track_count = slot, 0
    if track_slots is not None:
        track_slot = tl.minimum(tl.load(track_slots + row).to(tl.int64), pool_rows - 1)
        track_count = tl.minimum(tl.load(track_upto + row) - start, ring_size).to(tl.int32)
        track_count = tl.where(track_slot < 0, 0, track_count)

    tile = state + head * state_head + p[:, None] * state_p + n[None, :]
    in_p = inside(p, P, BLOCK_P)
    in_n = inside(n, N, BLOCK_N)
    in_state = in_p[:, None] & in_n[None, :]
    ring_x += slot * ring_x_row + head * ring_x_head
    ring_b += slot * ring_b_row + group * ring_b_group
    ring_dt += slot * ring_dt_row + head * ring_dt_head
    rate = tl.load(a + head).to(tl.float32)
    first = tl.maximum(start, 0).to(tl.int32) % ring_size
    carried = tl.load(tile + slot * state_row, mask=in_state, other=0.0).to(tl.float32)
    for age in tl.range(0, tl.maximum(count, track_count), loop_unroll_factor=AHEAD):
        entry = ((first + age) % ring_size).to(tl.int64)
        steps = tl.load(ring_dt + entry * ring_dt_entry)
        x_old = tl.load(ring_x + entry * ring_x_entry + p, mask=in_p, other=0.0)
        b_old = tl.load(ring_b + entry * ring_b_entry + n, mask=in_n, other=0.0)
        carried = advance(carried, x_old, b_old, steps, rate)
        if age + 1 == count:
            tl.store(tile + slot * state_row, carried.to(state.dtype.element_ty), mask=in_state)
        if age + 1 == track_count:
            tl.store(tile + track_slot * state_row, carried.to(state.dtype.element_ty), mask=in_state)


def fold(
    state: Tensor,
    a: Tensor,
    ring_x: Tensor,
    ring_b: Tensor,
    ring_dt: Tensor,
    base: Tensor,
    upto: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    track_upto: Tensor | None,
) -> None:
    """``specc::fold_ssd``, for shapes and dtypes that its provider has checked."""
    heads, dim, size = state.shape[1:]
    if not state.numel() or not len(upto):
        return
    tiles = tiles_of(dim, size, is_hip(state))
    tracks = track_slots is not None and track_upto is not None
    _fold[(triton.cdiv(dim, tiles["BLOCK_P"]), heads, len(upto))](
        state,
        a,
        ring_x,
        ring_b,
        ring_dt,
        base,
        upto.contiguous(),
        contiguous(slots),
        contiguous(track_slots) if tracks else None,
        contiguous(track_upto) if tracks else None,
        *state.stride()[:3],
        *ring_x.stride()[:3],
        *ring_b.stride()[:3],
        *ring_dt.stride(),
        ring_x.shape[1],
        state.shape[0],
        heads_per_group=heads // ring_b.shape[2],
        **tiles,
        **OPTIONS,
    )
