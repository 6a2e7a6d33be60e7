"""Short convolutions over a block and a ring of the inputs before it, and windows that move on.

One launch reads the ring and writes it: the program that reads a channel's past is also the one that writes
its ring, and writes last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Tokens of a program, at least as many as a filter reaches back, and channels.
BLOCK_T, BLOCK_C = 8, 64
# Bits may not depend on what the compiler joins.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _inside(index, limit, EVEN: tl.constexpr):
    """``index < limit``, a constant where it always is: masks are registers."""
    if EVEN:
        return tl.zeros_like(index) == 0
    return index < limit


@triton.jit
def _slot(slots, row, pool_rows):
    """The pool row, or -1."""
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    return tl.minimum(slot, pool_rows - 1)


@triton.jit
def _input(x, ring, token, seq_len, x_token, ring_entry, ring_size, tokens, in_c):
    """Inputs [BLOCK_T, BLOCK_C] at ``token`` of the block, or before it; 0 where there is none."""
    position = seq_len + token
    there = (position >= 0)[:, None] & in_c[None, :]
    new = (token >= 0) & (token < tokens)
    block = tl.load(x + token.to(tl.int64)[:, None] * x_token, mask=there & new[:, None], other=0.0)
    entry = tl.maximum(position, 0) % ring_size
    past = tl.load(
        ring + entry.to(tl.int64)[:, None] * ring_entry, mask=there & (token < 0)[:, None], other=0.0
    )
    return tl.where(new[:, None], block, past.to(block.dtype))


@triton.jit
def _keep(x, ring, seq_len, x_token, ring_entry, ring_size, tokens, in_c, BLOCK_T: tl.constexpr):
    """Write the block's last tokens to the ring, after all threads have read it."""
    tl.debug_barrier()
    for first in range(tl.maximum(tokens - ring_size, 0), tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        position = seq_len + token
        live = ((token < tokens) & (position >= 0))[:, None] & in_c[None, :]
        block = tl.load(x + token.to(tl.int64)[:, None] * x_token, mask=live)
        entry = tl.maximum(position, 0) % ring_size
        tl.store(ring + entry.to(tl.int64)[:, None] * ring_entry, block.to(ring.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["tokens", "ring_size", "x_row", "y_row"])
def _replay(
    y,
    x,
    ring,
    weight,
    bias,
    seq_lens,
    slots,
    y_row,
    y_channel: tl.constexpr,
    y_token: tl.constexpr,
    x_row,
    x_channel,
    x_token,
    ring_row,
    ring_entry: tl.constexpr,
    ring_channel: tl.constexpr,
    weight_channel: tl.constexpr,
    weight_tap: tl.constexpr,
    bias_channel: tl.constexpr,
    channels,
    tokens,
    ring_size,
    pool_rows,
    WIDTH: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = _inside(channel, channels, EVEN)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = y + row * y_row + token.to(tl.int64)[:, None] * y_token + channel[None, :] * y_channel
    in_y = (token < tokens)[:, None] & in_c[None, :]
    slot = _slot(slots, row, pool_rows)
    if slot < 0:
        tl.store(out, tl.zeros([BLOCK_T, BLOCK_C], y.dtype.element_ty), mask=in_y)
        return
    seq_len = tl.load(seq_lens + row).to(tl.int32)
    x += row * x_row + channel[None, :] * x_channel
    ring += slot * ring_row + channel[None, :] * ring_channel
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for tap in tl.static_range(WIDTH):
        at = token + (tap - WIDTH + 1)
        value = _input(x, ring, at, seq_len, x_token, ring_entry, ring_size, tokens, in_c)
        taps = tl.load(weight + channel * weight_channel + tap * weight_tap, mask=in_c, other=0.0)
        total = tl.fma(value.to(tl.float32), taps.to(tl.float32)[None, :], total)
    if bias is not None:
        total += tl.load(bias + channel * bias_channel, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where((seq_len + token >= 0)[:, None], total, 0.0)
    tl.store(out, total.to(y.dtype.element_ty), mask=in_y)
    if tl.program_id(1) == 0:
        _keep(x, ring, seq_len, x_token, ring_entry, ring_size, tokens, in_c, BLOCK_T)


@triton.jit(do_not_specialize=["tokens", "ring_size", "x_row", "y_row"])
def _inputs(
    y,
    x,
    ring,
    seq_lens,
    slots,
    y_row,
    y_channel: tl.constexpr,
    y_token: tl.constexpr,
    x_row,
    x_channel,
    x_token,
    ring_row,
    ring_entry: tl.constexpr,
    ring_channel: tl.constexpr,
    channels,
    tokens,
    ring_size,
    pool_rows,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = _inside(channel, channels, EVEN)
    column = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    out = y + row * y_row + column.to(tl.int64)[:, None] * y_token + channel[None, :] * y_channel
    in_y = (column < tokens + WIDTH - 1)[:, None] & in_c[None, :]
    slot = _slot(slots, row, pool_rows)
    if slot < 0:
        tl.store(out, tl.zeros([BLOCK_T, BLOCK_C], y.dtype.element_ty), mask=in_y)
        return
    seq_len = tl.load(seq_lens + row).to(tl.int32)
    x += row * x_row + channel[None, :] * x_channel
    ring += slot * ring_row + channel[None, :] * ring_channel
    at = column - (WIDTH - 1)
    value = _input(x, ring, at, seq_len, x_token, ring_entry, ring_size, tokens, in_c)
    tl.store(out, value.to(y.dtype.element_ty), mask=in_y)
    if tl.program_id(1) == 0:
        _keep(x, ring, seq_len, x_token, ring_entry, ring_size, tokens, in_c, BLOCK_T)


@triton.jit
def _window(old, x, last, tokens, tap, in_c, state_tap, x_token, WIDTH: tl.constexpr):
    """What the old window and the block hold at each tap of the window that ends with token ``last``."""
    at = tl.minimum(last, tokens - 1).to(tl.int32) + 1 + tap
    kept = (at < WIDTH) & (tap < WIDTH)
    before = tl.load(old + at[None, :] * state_tap, mask=in_c[:, None] & kept[None, :], other=0.0)
    new = (at >= WIDTH) & (tap < WIDTH)
    token = (at - WIDTH).to(tl.int64)
    block = tl.load(x + token[None, :] * x_token, mask=in_c[:, None] & new[None, :], other=0.0)
    return tl.where(kept[None, :], before, block.to(before.dtype))


@triton.jit(do_not_specialize=["tokens", "x_row"])
def _commit(
    state,
    x,
    last_steps,
    slots,
    track_slots,
    track_steps,
    state_row,
    state_channel: tl.constexpr,
    state_tap: tl.constexpr,
    x_row,
    x_channel,
    x_token,
    channels,
    tokens,
    pool_rows,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, BLOCK_W)
    in_c = _inside(channel, channels, EVEN)
    in_state = in_c[:, None] & (tap < WIDTH)[None, :]
    slot = _slot(slots, row, pool_rows)
    if slot < 0:
        return
    x += row * x_row + channel[:, None] * x_channel
    state += channel[:, None] * state_channel
    old = state + slot * state_row
    last = tl.load(last_steps + row)
    if track_slots is not None:
        track_slot = tl.minimum(tl.load(track_slots + row).to(tl.int64), pool_rows - 1)
        step = tl.load(track_steps + row)
        if (track_slot >= 0) & (step >= 0):
            tracked = _window(old, x, step, tokens, tap, in_c, state_tap, x_token, WIDTH)
            tl.store(state + track_slot * state_row + tap[None, :] * state_tap, tracked, mask=in_state)
    if last >= 0:
        moved = _window(old, x, last, tokens, tap, in_c, state_tap, x_token, WIDTH)
        # The new window lies over the old one: all threads have to have read it.
        tl.debug_barrier()
        tl.store(old + tap[None, :] * state_tap, moved, mask=in_state)


def _contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def replay(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_lens: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """``specc::causal_conv1d_replay``, for shapes and dtypes that its provider has checked."""
    batch, channels, tokens = x.shape
    y = x.new_empty((batch, tokens, channels)).transpose(1, 2)
    if not y.numel():
        return y
    _replay[(triton.cdiv(channels, BLOCK_C), triton.cdiv(tokens, BLOCK_T), batch)](
        y,
        x,
        ring,
        weight,
        bias,
        seq_lens.contiguous(),
        _contiguous(slots),
        *y.stride(),
        *x.stride(),
        *ring.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        channels,
        tokens,
        ring.shape[1],
        ring.shape[0],
        WIDTH=weight.shape[1],
        SILU=activation is not None,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
        EVEN=channels % BLOCK_C == 0,
        **OPTIONS,
    )
    return y


def inputs(x: Tensor, ring: Tensor, seq_lens: Tensor, slots: Tensor | None, width: int) -> Tensor:
    """``specc::conv_inputs``, for shapes and dtypes that its provider has checked."""
    batch, channels, tokens = x.shape
    columns = width - 1 + tokens
    y = x.new_empty((batch, columns, channels)).transpose(1, 2)
    if not y.numel():
        return y
    _inputs[(triton.cdiv(channels, BLOCK_C), triton.cdiv(columns, BLOCK_T), batch)](
        y,
        x,
        ring,
        seq_lens.contiguous(),
        _contiguous(slots),
        *y.stride(),
        *x.stride(),
        *ring.stride(),
        channels,
        tokens,
        ring.shape[1],
        ring.shape[0],
        WIDTH=width,
        BLOCK_T=BLOCK_T,
        BLOCK_C=BLOCK_C,
        EVEN=channels % BLOCK_C == 0,
        **OPTIONS,
    )
    return y


def commit(
    conv_state: Tensor,
    x: Tensor,
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> None:
    """``specc::commit_conv``, for shapes and dtypes that its provider has checked."""
    batch, channels, tokens = x.shape
    width = conv_state.shape[2]
    if not x.numel() or not conv_state.numel():
        return
    tracks = track_slots is not None and steps_to_track is not None
    _commit[(triton.cdiv(channels, BLOCK_C), batch)](
        conv_state,
        x,
        last_correct_step_indices.contiguous(),
        _contiguous(slots),
        _contiguous(track_slots) if tracks else None,
        _contiguous(steps_to_track) if tracks else None,
        *conv_state.stride(),
        *x.stride(),
        channels,
        tokens,
        conv_state.shape[0],
        WIDTH=width,
        BLOCK_W=triton.next_power_of_2(width),
        BLOCK_C=BLOCK_C,
        EVEN=channels % BLOCK_C == 0,
        **OPTIONS,
    )
