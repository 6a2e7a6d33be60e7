"""``specc::ssd_replay``: a block's Mamba2 outputs from a checkpoint and the records behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import (
    FLOATS,
    along,
    as_one_call,
    live_rows,
    longest,
    put_block,
    put_rows,
)
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.ssd import advance, block_steps, per_head, read, sample_block


def reference(
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
    exact: bool,
) -> Tensor:
    """Outputs [B, T, NH, P] of the tokens at positions ``seq_lens ...``, after ``specc::ssd``.

    x, dt, A, B, C, D, dt_bias: as there; state: [S, NH, P, N], float32 or bfloat16; ring_x: [S, R, NH, P],
    ring_b: [S, R, G, N], ring_dt: [S, R, NH] float32; base: int64 [S]; seq_lens, final_lens: int64 [B];
    slots: int [B], the pool row of each batch row, or None for 0, 1, 2, ...

    ``state[s]`` is that before position ``base[s]``; the positions up to ``seq_lens`` are read from the
    rings, the block's records are written there. Of every ``flush_every`` records behind base the state is
    rounded to its dtype; ``n = max(0, (final_lens - base) // flush_every * flush_every)`` records are
    folded into the pool. ``base`` stays: add n to it after all layers. R >= seq_lens - base + T. Unused
    entries do not matter, NaN included. Rows of negative slots or seq_lens give 0 and touch nothing.

    The recurrence is taken token by token, so that the bits do not depend on the blocks, ``exact`` or not.
    After ReplaySSM (Dao AI Lab): cache the inputs, not the states.
    """
    heads, tokens = x.shape[2], x.shape[1]
    slot, live = live_rows(slots, seq_lens >= 0, state.shape[0])
    steps = block_steps(dt, dt_bias, softplus, dt_min, dt_max)
    start = base[slot]
    pending = torch.where(live, seq_lens - start, 0)
    flushed = torch.where(live, final_lens - start, 0).clamp(min=0) // flush_every * flush_every

    stored = state[slot]
    carried = stored.float()
    for age in range(longest(pending, ring_x.shape[1])):
        entry = (start + age) % ring_x.shape[1]
        records = ring_x[slot, entry], per_head(ring_b[slot, entry], heads), ring_dt[slot, entry]
        fed = advance(carried, a, *records)
        if (age + 1) % flush_every == 0:
            fed = fed.to(state.dtype).float()
        carried = torch.where(along(age < pending, fed), fed, carried)
        stored = torch.where(along(flushed == age + 1, fed), fed.to(state.dtype), stored)

    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    new_b, new_c = per_head(b, heads), per_head(c, heads)
    for token in range(tokens):
        carried = advance(carried, a, x[:, token], new_b[:, token], steps[:, token])
        y[:, token] = torch.where(live[:, None, None], read(carried, x[:, token], new_c[:, token], d), 0)
        at_boundary = (pending + token + 1) % flush_every == 0
        carried = torch.where(along(at_boundary, carried), carried.to(state.dtype).float(), carried)

    put_rows(state, slot, live, stored)
    for ring, block in ((ring_x, x), (ring_b, b), (ring_dt, steps)):
        put_block(ring, slot, live, seq_lens, block)
    return y


# Of N, what the Triton kernels hold in registers.
MAX_SIZE = 256


def _triton_supports(
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
    exact: bool,
) -> Reason:
    if (ring_x.dtype, ring_b.dtype) != (x.dtype, b.dtype):
        return f"needs rings of the block's dtypes, got {ring_x.dtype} and {ring_b.dtype}"
    others = dt, a, b, c, d, dt_bias, state, ring_x, ring_b, ring_dt, base, seq_lens, final_lens, slots
    return (
        triton_kernels.unfit(x, *others)
        or unheld_block(x, b, c)
        or unheld_pool(state, ring_x, ring_b)
        or triton_kernels.not_integers(torch.int64, base=base, seq_lens=seq_lens, final_lens=final_lens)
        or triton_kernels.not_integers(*triton_kernels.INDICES, slots=slots)
    )


def unheld_block(x: Tensor, b: Tensor, c: Tensor) -> Reason:
    """Why the Triton kernels cannot read such a block, or None."""
    if x.dtype not in FLOATS or b.dtype not in FLOATS or b.dtype != c.dtype:
        return f"has no kernel for blocks of {x.dtype}, {b.dtype}, {c.dtype}"
    if any(each.stride(-1) != 1 for each in (x, b, c)):
        return "needs x, B and C contiguous in the last dimension"
    return None


def unheld_pool(state: Tensor, *rings: Tensor) -> Reason:
    """Why the Triton kernels cannot work on such states and rings, or None."""
    if state.dtype not in FLOATS:
        return f"has no kernel for states of {state.dtype}"
    if state.shape[3] > MAX_SIZE:
        return f"serves states up to N = {MAX_SIZE}, got {state.shape[3]}"
    if any(each.stride(-1) != 1 for each in (state, *rings)):
        return "needs the state and its rings contiguous in the last dimension"
    return None


def _triton(*args: Any) -> Tensor:
    from specc.lowerings.triton_kernels import ssd_replay as kernel

    with torch.cuda.device_of(args[0]):
        # There is one form, and it is exact.
        return kernel.replay(*args[:-1])


def _fake(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def sample_pool(device: str, ring_size: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """state, ring_x, ring_b, ring_dt of three pool rows for the blocks of ``sample_block``."""
    x, _, _, b, *_ = sample_block(device)
    return (
        torch.randn(3, 4, 32, 32, device=device),
        torch.randn(3, ring_size, *x.shape[2:], device=device, dtype=x.dtype),
        torch.randn(3, ring_size, *b.shape[2:], device=device, dtype=b.dtype),
        torch.rand(3, ring_size, 4, device=device),
    )


def _sample(device: str) -> tuple[object, ...]:
    base = torch.tensor([7, 0, 30], device=device)
    seq_lens = torch.tensor([48, 6], device=device)
    slots = torch.tensor([2, 0], device=device)
    block, pool = sample_block(device), sample_pool(device)
    return *block, *pool, base, seq_lens, seq_lens - 1, slots, True, 0.0, float("inf"), 16, True


ssd_replay = define_op(
    "ssd_replay",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor(a!) state, "
    "Tensor(b!) ring_x, Tensor(c!) ring_b, Tensor(d!) ring_dt, Tensor base, Tensor seq_lens, "
    "Tensor final_lens, Tensor? slots, bool softplus, float dt_min, float dt_max, int flush_every, "
    "bool exact) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)
