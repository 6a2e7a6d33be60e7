"""``specc::ssd_snapshot``: a block's Mamba2 outputs and the state after each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import along, as_one_call, live_rows
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.ssd import advance, block_steps, per_head, read, sample_block
from specc.lowerings.ssd_replay import unheld_block, unheld_pool


def reference(
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
    """``specc::ssd`` from ``state[slots[b]]``, which stays as it is.

    state: [S, NH, P, N], float32 or bfloat16; slots: int [B] or None for 0, 1, 2, ... Returns y [B, T, NH, P]
    in x's dtype and snapshots [B, T, NH, P, N] in the pool's: the state after each token, rounded to that
    dtype, so that no bit depends on the block. Rows of negative slots give 0.
    """
    batch, tokens, heads = x.shape[:3]
    alive = torch.ones(batch, dtype=torch.bool, device=x.device)
    slot, live = live_rows(slots, alive, state.shape[0])
    steps = block_steps(dt, dt_bias, softplus, dt_min, dt_max)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    snapshots = state.new_empty((batch, tokens, *state.shape[1:]))
    b, c = per_head(b, heads), per_head(c, heads)
    carried = state[slot].float()
    for token in range(tokens):
        carried = advance(carried, a, x[:, token], b[:, token], steps[:, token])
        snapshots[:, token] = carried
        y[:, token] = read(carried, x[:, token], c[:, token], d)
        carried = snapshots[:, token].float()
    return tuple(each.masked_fill_(~along(live, each), 0) for each in (y, snapshots))  # type: ignore[return-value]


def _triton_supports(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    slots: Tensor | None,
    *_: object,
) -> Reason:
    return (
        triton_kernels.unfit(x, dt, a, b, c, d, dt_bias, state, slots)
        or unheld_block(x, b, c)
        or unheld_pool(state)
        or triton_kernels.not_integers(*triton_kernels.INDICES, slots=slots)
    )


def _triton(*args: Any) -> tuple[Tensor, Tensor]:
    from specc.lowerings.triton_kernels import ssd_snapshot as kernel

    with torch.cuda.device_of(args[0]):
        return kernel.snapshot(*args)


def _fake(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor,
    *_: object,
) -> tuple[Tensor, Tensor]:
    snapshots = state.new_empty((*x.shape[:2], *state.shape[1:]))
    return torch.empty_like(x, memory_format=torch.contiguous_format), snapshots


def _sample(device: str) -> tuple[object, ...]:
    state = torch.randn(3, 4, 32, 32, device=device)
    return *sample_block(device), state, torch.tensor([2, 0], device=device), True, 0.0, float("inf")


ssd_snapshot = define_op(
    "ssd_snapshot",
    "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor state, "
    "Tensor? slots, bool softplus, float dt_min, float dt_max) -> (Tensor, Tensor)",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)
