"""Copies each row's state after its last accepted token from the block's snapshots into the pool.

One launch for all layers that lie at one distance from each other: a layer is then a stride. Offsets are of
64 bits: the snapshots of a few hundred rows are more than 2**31 numbers.
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _copy(source, target, slot, step, at, elements, pool_rows, tokens, state_row, snapshot_token):
    if (slot >= 0) & (step >= 0):
        slot = tl.minimum(slot, pool_rows - 1)
        step = tl.minimum(step, tokens - 1)
        mask = at < elements
        value = tl.load(source + step * snapshot_token + at, mask=mask)
        tl.store(target + slot * state_row + at, value.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "snapshot_row"])
def _commit(
    states,
    snapshots,
    last_steps,
    slots,
    track_slots,
    track_steps,
    state_layer,
    state_row,
    snapshot_layer,
    snapshot_row,
    snapshot_token,
    elements,
    pool_rows,
    tokens,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    source = snapshots + layer * snapshot_layer + row * snapshot_row
    target = states + layer * state_layer
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    step = tl.load(last_steps + row).to(tl.int64)
    _copy(source, target, slot, step, at, elements, pool_rows, tokens, state_row, snapshot_token)
    if track_slots is not None:
        track_slot = tl.load(track_slots + row).to(tl.int64)
        track_slot = tl.where(slot < 0, -1, track_slot)
        step = tl.load(track_steps + row).to(tl.int64)
        _copy(source, target, track_slot, step, at, elements, pool_rows, tokens, state_row, snapshot_token)


def commit(
    states: list[Tensor],
    snapshots: list[Tensor],
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> None:
    """``specc::commit_snapshots``, for shapes and dtypes that its provider has checked."""
    tracks = track_slots is not None and steps_to_track is not None
    indices = [
        None if index is None else index.contiguous()
        for index in (
            last_correct_step_indices,
            slots,
            track_slots if tracks else None,
            steps_to_track if tracks else None,
        )
    ]
    if not states:
        return
    distances = _distance(states), _distance(snapshots)
    if None in distances:
        for state, snapshot in zip(states, snapshots, strict=True):
            _launch(state, snapshot, 1, (0, 0), indices)
    else:
        _launch(states[0], snapshots[0], len(states), distances, indices)


def _distance(layers: list[Tensor]) -> int | None:
    """How many numbers each layer lies behind the one before, or None where that is not one number."""
    first = layers[0]
    if len({(each.shape, each.stride(), each.dtype) for each in layers}) > 1:
        return None
    addresses = [each.data_ptr() for each in layers]
    steps = {after - before for before, after in itertools.pairwise(addresses)} or {0}
    step = steps.pop()
    return None if steps or step % first.element_size() else step // first.element_size()


def _launch(
    state: Tensor,
    snapshot: Tensor,
    layers: int,
    distances: tuple[int | None, int | None],
    indices: list[Tensor | None],
) -> None:
    elements = state[0].numel() if len(state) else 0
    if not elements or not snapshot.numel():
        return
    _commit[(triton.cdiv(elements, BLOCK), layers, snapshot.shape[0])](
        state,
        snapshot,
        *indices,
        distances[0],
        state.stride(0),
        distances[1],
        *snapshot.stride()[:2],
        elements,
        state.shape[0],
        snapshot.shape[1],
        BLOCK=BLOCK,
        num_warps=4,
    )
