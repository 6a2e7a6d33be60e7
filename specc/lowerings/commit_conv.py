"""``specc::commit_conv``: the convolution window moves on to the last accepted token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.causal_conv1d import sample_inputs
from specc.lowerings.checkpoints import FLOATS, live_rows, put_rows
from specc.lowerings.framework import Provider, Reason, define_op


def reference(
    conv_state: Tensor,
    x: Tensor,
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> None:
    """``conv_state[slots[b]]`` <- the last Wc inputs up to token ``last_correct_step_indices[b]`` of x.

    conv_state: [S, C, Wc], in place; x: [B, C, T], the block's inputs; last_correct_step_indices: int [B], -1
    leaves a row alone; slots: int [B] or None for 0, 1, 2, ..., negative ones touch nothing. track_slots,
    steps_to_track: int [B]; the window up to that step goes to that slot, from the state before the call.
    Steps beyond the block are clamped into it. Track slots are none of the live slots.
    """
    last = last_correct_step_indices
    slot, live = live_rows(slots, torch.ones_like(last, dtype=torch.bool), conv_state.shape[0])
    inputs = torch.cat([conv_state[slot], x.to(conv_state.dtype)], -1)
    put_rows(conv_state, slot, live & (last >= 0), _window(inputs, x, last))
    if track_slots is not None and steps_to_track is not None:
        track_slot, tracked = live_rows(track_slots, live & (steps_to_track >= 0), conv_state.shape[0])
        put_rows(conv_state, track_slot, tracked, _window(inputs, x, steps_to_track))


def _window(inputs: Tensor, x: Tensor, last: Tensor) -> Tensor:
    """[B, C, Wc]: what of ``inputs`` [B, C, Wc + T] ends with token ``last`` of x."""
    width = inputs.shape[2] - x.shape[2]
    first = last.long().clamp(-1, x.shape[2] - 1) + 1
    at = first[:, None, None] + torch.arange(width, device=x.device)
    return inputs.gather(2, at.expand(-1, inputs.shape[1], -1))


def _triton_supports(
    conv_state: Tensor,
    x: Tensor,
    last_correct_step_indices: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    steps_to_track: Tensor | None,
) -> Reason:
    if conv_state.dtype not in FLOATS or x.dtype not in FLOATS:
        return f"has no kernel for x of {x.dtype} and a window of {conv_state.dtype}"
    others = last_correct_step_indices, slots, track_slots, steps_to_track
    return triton_kernels.unfit(conv_state, x, *others) or triton_kernels.not_integers(
        *triton_kernels.INDICES,
        last_correct_step_indices=last_correct_step_indices,
        slots=slots,
        track_slots=track_slots,
        steps_to_track=steps_to_track,
    )


def _triton(*args: Any) -> None:
    from specc.lowerings.triton_kernels import causal_conv1d

    with torch.cuda.device_of(args[0]):
        causal_conv1d.commit(*args)


def _fake(conv_state: Tensor, x: Tensor, last_correct_step_indices: Tensor, *_: object) -> None:
    torch._check(
        x.shape[0] == last_correct_step_indices.shape[0], lambda: "commit_conv: one last step for each row"
    )


def _sample(device: str) -> tuple[object, ...]:
    x = sample_inputs(device)[0]
    conv_state = torch.randn(4, 8, 4, device=device, dtype=x.dtype)
    last, slots = torch.tensor([2, 4], device=device), torch.tensor([2, 0], device=device)
    track_slots, steps_to_track = torch.tensor([-1, 1], device=device), torch.tensor([-1, 0], device=device)
    return conv_state, x, last, slots, track_slots, steps_to_track


commit_conv = define_op(
    "commit_conv",
    "(Tensor(a!) conv_state, Tensor x, Tensor last_correct_step_indices, Tensor? slots, Tensor? track_slots, "
    "Tensor? steps_to_track) -> ()",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
