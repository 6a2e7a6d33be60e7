"""Mamba2's recurrence over a few tokens, from a checkpoint of the state and a ring of the records behind it.

A program takes a stretch of one head's P and all of N, and goes through the records behind the checkpoint and
the block, token by token. Every token is the same sums in the same order wherever its block starts: its bits
do not depend on the blocks. The state is read once for a block and written once in ``flush_every`` tokens.

How long a block is and how many records there are is not specialized: nothing is compiled anew for them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.devices import device_kind

# A program's share of P, and how far records are read ahead.
BLOCK_P, HIP_BLOCK_P = 32, 16
AHEAD: tl.constexpr = tl.constexpr(4)
# Bits may not depend on what the compiler joins.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _softplus(x):
    """log(1 + e^x), right to float32 where e^x is small, too."""
    u = tl.exp(-tl.abs(x))
    # log(1 + u) = 2 artanh(u / (2 + u)), and z is at most 1/3.
    z = u / (2.0 + u)
    s = z * z
    series = tl.fma(s, 1.0 / 15, 1.0 / 13)
    series = tl.fma(s, series, 1.0 / 11)
    series = tl.fma(s, series, 1.0 / 9)
    series = tl.fma(s, series, 1.0 / 7)
    series = tl.fma(s, series, 1.0 / 5)
    series = tl.fma(s, series, 1.0 / 3)
    return tl.maximum(x, 0.0) + 2.0 * tl.fma(z * s, series, z)


@triton.jit
def _step_sizes(raw, dt_bias, head, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    steps = raw.to(tl.float32)
    if dt_bias is not None:
        steps += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        steps = _softplus(steps)
    return tl.minimum(tl.maximum(steps, dt_min), dt_max)


@triton.jit
def _slot(slots, row, pool_rows):
    """The pool row, or -1."""
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    return tl.minimum(slot, pool_rows - 1)


@triton.jit
def _inside(index, LIMIT: tl.constexpr, LENGTH: tl.constexpr):
    """``index < LIMIT``, a constant where all of a length is: masks are registers."""
    if LIMIT % LENGTH == 0:
        return tl.zeros_like(index) == 0
    return index < LIMIT


@triton.jit
def _advance(state, x, b, steps, rate):
    """The state [P, N] after the record x [P], b [N]."""
    added = x.to(tl.float32) * steps
    return tl.fma(added[:, None], b.to(tl.float32)[None, :], state * tl.exp(rate * steps))


@triton.jit
def _output(state, x, c, d, head):
    """One token's y [P] from the state behind it; c [N]."""
    y = tl.sum(state * c.to(tl.float32)[None, :], 1)
    if d is not None:
        y = tl.fma(x.to(tl.float32), tl.load(d + head).to(tl.float32), y)
    return y


@triton.jit
def _place(BLOCK_P: tl.constexpr):
    """Row, head and p of this program."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    return tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), p


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
    row, head, p = _place(BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = (tl.program_id(1) // heads_per_group).to(tl.int64)
    in_p = _inside(p, P, BLOCK_P)
    in_n = _inside(n, N, BLOCK_N)
    in_state = in_p[:, None] & in_n[None, :]
    y += row * y_row + head * y_head + p
    slot = _slot(slots, row, pool_rows)
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
        carried = _advance(carried, x_old, b_old, steps, rate)
        if (age + 1) % EVERY == 0:
            rounded = carried.to(state.dtype.element_ty)
            if age + 1 == flushed:
                tl.store(tile, rounded, mask=in_state)
            carried = rounded.to(tl.float32)

    for token in range(tokens):
        steps = _step_sizes(tl.load(dt + token * dt_token), dt_bias, head, dt_min, dt_max, SOFTPLUS)
        x_new = tl.load(x + token * x_token + p, mask=in_p, other=0.0)
        b_new = tl.load(b + token * b_token + n, mask=in_n, other=0.0)
        c_new = tl.load(c + token * c_token + n, mask=in_n, other=0.0)
        carried = _advance(carried, x_new, b_new, steps, rate)
        out = _output(carried, x_new, c_new, d, head)
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
    row, head, p = _place(BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = (tl.program_id(1) // heads_per_group).to(tl.int64)
    slot = _slot(slots, row, pool_rows)
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
    in_p = _inside(p, P, BLOCK_P)
    in_n = _inside(n, N, BLOCK_N)
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
        carried = _advance(carried, x_old, b_old, steps, rate)
        if age + 1 == count:
            tl.store(tile + slot * state_row, carried.to(state.dtype.element_ty), mask=in_state)
        if age + 1 == track_count:
            tl.store(tile + track_slot * state_row, carried.to(state.dtype.element_ty), mask=in_state)


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
    row, head, p = _place(BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    group = (tl.program_id(1) // heads_per_group).to(tl.int64)
    in_p = _inside(p, P, BLOCK_P)
    in_n = _inside(n, N, BLOCK_N)
    in_state = in_p[:, None] & in_n[None, :]
    y += row * y_row + head * y_head + p
    snapshots += row * snapshot_row + head * snapshot_head + p[:, None] * snapshot_p + n[None, :]
    slot = _slot(slots, row, pool_rows)
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
        steps = _step_sizes(tl.load(dt + token * dt_token), dt_bias, head, dt_min, dt_max, SOFTPLUS)
        x_new = tl.load(x + token * x_token + p, mask=in_p, other=0.0)
        b_new = tl.load(b + token * b_token + n, mask=in_n, other=0.0)
        c_new = tl.load(c + token * c_token + n, mask=in_n, other=0.0)
        carried = _advance(carried, x_new, b_new, steps, rate)
        out = _output(carried, x_new, c_new, d, head)
        tl.store(y + token * y_token, out.to(y.dtype.element_ty), mask=in_p)
        tl.store(snapshots, carried.to(snapshots.dtype.element_ty), mask=in_state)
        snapshots += snapshot_token


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def _tiles(dim: int, size: int, hip: bool) -> dict[str, int]:
    """How a launch cuts P; of N a program takes all."""
    block_p = min(HIP_BLOCK_P if hip else BLOCK_P, triton.next_power_of_2(dim))
    return {"P": dim, "N": size, "BLOCK_P": block_p, "BLOCK_N": triton.next_power_of_2(size)}


def _hip(x: Tensor) -> bool:
    return device_kind(x.device) == "hip"


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
    tiles = _tiles(dim, b.shape[3], _hip(x))
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
        _contiguous(slots),
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
    tiles = _tiles(dim, size, _hip(state))
    tracks = track_slots is not None and track_upto is not None
    _fold[(triton.cdiv(dim, tiles["BLOCK_P"]), heads, len(upto))](
        state,
        a,
        ring_x,
        ring_b,
        ring_dt,
        base,
        upto.contiguous(),
        _contiguous(slots),
        _contiguous(track_slots) if tracks else None,
        _contiguous(track_upto) if tracks else None,
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
    tiles = _tiles(dim, b.shape[3], _hip(x))
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
        _contiguous(slots),
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
