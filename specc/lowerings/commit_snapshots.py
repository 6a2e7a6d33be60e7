"""``specc::commit_snapshots``: each row's state after its last accepted token goes into the pool."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import FLOATS, live_rows, put_rows
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op


def reference(
    states: list[Tensor],
    snapshots: list[Tensor],
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> None:
    """``states[l][slots[b]]`` <- ``snapshots[l][b, last_correct_step_indices[b]]``, for every layer l.

    states: L of [S, ...], in place; snapshots: L of [B, T, ...], the state after each token of the block;
    last_correct_step_indices: int [B], -1 leaves a row alone; slots: int [B] or None for 0, 1, 2, ...,
    negative ones touch nothing. track_slots, steps_to_track: int [B]; the state after that step goes to that
    slot, too. Steps beyond the block are clamped into it. Track slots are none of the live slots.
    Meaning after SGLang's update_mamba_state_after_mtp_verify.
    """
    alive = torch.ones_like(last_correct_step_indices, dtype=torch.bool)
    for state, snapshot in zip(states, snapshots, strict=True):
        slot, live = live_rows(slots, alive, state.shape[0])
        _commit(state, snapshot, slot, live, last_correct_step_indices)
        if track_slots is not None and steps_to_track is not None:
            track_slot, tracked = live_rows(track_slots, live, state.shape[0])
            _commit(state, snapshot, track_slot, tracked, steps_to_track)


def _commit(state: Tensor, snapshot: Tensor, slot: Tensor, live: Tensor, step: Tensor) -> None:
    row = torch.arange(len(step), device=step.device)
    chosen = snapshot[row, step.long().clamp(0, snapshot.shape[1] - 1)]
    put_rows(state, slot, live & (step >= 0), chosen)


def _triton_supports(
    states: list[Tensor],
    snapshots: list[Tensor],
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> Reason:
    others = slots, track_slots, steps_to_track
    return (
        triton_kernels.unfit(last_correct_step_indices, *states, *snapshots, *others)
        or triton_kernels.not_integers(
            *triton_kernels.INDICES,
            last_correct_step_indices=last_correct_step_indices,
            slots=slots,
            track_slots=track_slots,
            steps_to_track=steps_to_track,
        )
        or next(filter(None, map(_unheld, states, snapshots)), None)
    )


def _unheld(state: Tensor, snapshot: Tensor) -> Reason:
    if state.dtype not in FLOATS or snapshot.dtype not in FLOATS:
        return f"has no kernel for states of {state.dtype} and snapshots of {snapshot.dtype}"
    if state.shape[1:] != snapshot.shape[2:]:
        return f"needs snapshots of the states' shape, got {list(snapshot.shape)} for {list(state.shape)}"
    if not (_in_one_piece(state, 1) and _in_one_piece(snapshot, 2)):
        return "needs each state and each snapshot in one piece of memory"
    return None


def _in_one_piece(x: Tensor, first: int) -> bool:
    """Whether the dimensions from ``first`` on lie as in a contiguous tensor."""
    expected = 1
    for size, stride in zip(reversed(x.shape[first:]), reversed(x.stride()[first:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _triton(*args: Any) -> None:
    from specc.lowerings.triton_kernels import commit_snapshots

    with torch.cuda.device_of(args[2]):
        commit_snapshots.commit(*args)


def _fake(states: list[Tensor], snapshots: list[Tensor], *_: object) -> None:
    torch._check(len(states) == len(snapshots), lambda: "commit_snapshots: one snapshot for each state")


def _sample(device: str) -> tuple[object, ...]:
    states = torch.randn(3, 4, 2, 8, 16, device=device, dtype=usual_dtype(device))
    snapshots = torch.randn(3, 2, 5, 2, 8, 16, device=device, dtype=states.dtype)
    last, slots = torch.tensor([2, 4], device=device), torch.tensor([2, 0], device=device)
    track_slots, steps_to_track = torch.tensor([-1, 1], device=device), torch.tensor([-1, 0], device=device)
    return list(states), list(snapshots), last, slots, track_slots, steps_to_track


commit_snapshots = define_op(
    "commit_snapshots",
    "(Tensor(a!)[] states, Tensor[] snapshots, Tensor last_correct_step_indices, Tensor? slots, "
    "Tensor? track_slots, Tensor? steps_to_track) -> ()",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
