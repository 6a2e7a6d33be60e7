"""``specc::gated_delta_rule_snapshot``: a block's outputs and the state behind each of its tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import along, as_one_call, live_rows
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.gated_delta_rule import (
    advance,
    block_unfit,
    check_block,
    per_head,
    read,
    sample_block,
    state_unfit,
)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    """``specc::gated_delta_rule`` from a pool that is only read, and the states on the way.

    q, k, v, g, beta, scale, l2norm: as there; state: [S, HV, K, V]; slots: int [B], the pool row of each
    batch row, negative for none, or None for 0, 1, 2, ... Returns o [B, T, HV, V] in v's dtype and the
    states behind each token, [B, T, HV, K, V] in the pool's dtype, to which the state is rounded after each
    token, so that no bit depends on the block. Rows of negative slots give 0.
    """
    tokens, heads = v.shape[1:3]
    alive = torch.ones(v.shape[0], dtype=torch.bool, device=v.device)
    slot, live = live_rows(slots, alive, state.shape[0])
    q, k = per_head(q, heads, l2norm) * scale, per_head(k, heads, l2norm)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    snapshots = state.new_empty((v.shape[0], tokens, *state.shape[1:]))
    carried = state[slot].float()
    for token in range(tokens):
        carried = advance(carried, k[:, token], v[:, token], g[:, token], beta[:, token])
        carried = torch.where(along(live, carried), carried, 0)
        snapshots[:, token] = carried
        o[:, token] = torch.where(live[:, None, None], read(carried, q[:, token]), 0)
        carried = snapshots[:, token].float()
    return o, snapshots


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    check_block("gated_delta_rule_snapshot", q, k, v, g, beta)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    return o, state.new_empty((*v.shape[:2], *state.shape[1:]))


def _triton_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
) -> Reason:
    if slots is not None and slots.dtype not in triton_kernels.INDICES:
        return f"has no kernel for slots of {slots.dtype}"
    why = block_unfit(q, k, v, g, beta) or state_unfit(state)
    return why or triton_kernels.unfit(q, k, v, g, beta, state, slots)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
) -> tuple[Tensor, Tensor]:
    from specc.lowerings.triton_kernels import gated_delta_rule

    with torch.cuda.device_of(q):
        return gated_delta_rule.snapshots(q, k, v, g, beta, state, slots, scale, l2norm)


def _sample(device: str) -> tuple[object, ...]:
    state = torch.randn(3, 4, 32, 64, device=device)
    return *sample_block(device), state, torch.tensor([2, 0], device=device), 32**-0.5, True


gated_delta_rule_snapshot = define_op(
    "gated_delta_rule_snapshot",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, Tensor? slots, float scale, "
    "bool l2norm) -> (Tensor, Tensor)",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)
