"""``specc::fold_ssd``: Mamba2 records folded into their checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import along, as_one_call, live_rows, longest, put_rows
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.ssd import advance, per_head, sample_block
from specc.lowerings.ssd_replay import sample_pool, unheld_block, unheld_pool


def reference(
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
    """``state[slots[b]]`` <- that state after the records of positions ``base .. upto[b] - 1``, in place.

    state, A, rings, base, slots: as in ``specc::ssd_replay``; upto, track_upto: int64 [B]; track_slots:
    int [B]. ``upto <= base`` leaves a row alone. Where ``track_slots[b] >= 0`` and ``track_upto[b] > base``,
    ``state[track_slots[b]]`` <- the state up to there, from what it was before the call; track slots are
    none of the live slots. Carried in float32, rounded at the end. Of more records than a ring holds, its R.
    """
    slot, live = live_rows(slots, torch.ones_like(upto, dtype=torch.bool), state.shape[0])
    start, size = base[slot], ring_x.shape[1]
    counts = [torch.where(live, upto - start, 0).clamp(max=size)]
    targets = [slot]
    if track_slots is not None and track_upto is not None:
        track_slot, tracked = live_rows(track_slots, live, state.shape[0])
        counts.append(torch.where(tracked, track_upto - start, 0).clamp(max=size))
        targets.append(track_slot)

    carried = state[slot].float()
    results = [state[slot] for _ in counts]
    for age in range(longest(torch.cat(counts), size)):
        entry = (start + age) % size
        b = per_head(ring_b[slot, entry], ring_x.shape[2])
        carried = advance(carried, a, ring_x[slot, entry], b, ring_dt[slot, entry])
        for i, count in enumerate(counts):
            ended = along(count == age + 1, carried)
            results[i] = torch.where(ended, carried.to(state.dtype), results[i])
    for count, target, result in zip(counts, targets, results, strict=True):
        put_rows(state, target, count > 0, result)


def _triton_supports(
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
) -> Reason:
    others = a, ring_x, ring_b, ring_dt, base, upto, slots, track_slots, track_upto
    return (
        triton_kernels.unfit(state, *others)
        or unheld_block(ring_x, ring_b, ring_b)
        or unheld_pool(state)
        or triton_kernels.not_integers(torch.int64, base=base, upto=upto, track_upto=track_upto)
        or triton_kernels.not_integers(*triton_kernels.INDICES, slots=slots, track_slots=track_slots)
    )


def _triton(*args: Any) -> None:
    from specc.lowerings.triton_kernels import ssd_fold

    with torch.cuda.device_of(args[0]):
        ssd_fold.fold(*args)


def _fake(*_: object) -> None:
    return None


def _sample(device: str) -> tuple[object, ...]:
    state, *rings = sample_pool(device)
    base = torch.tensor([7, 0, 30], device=device)
    upto = torch.tensor([41, 6], device=device)
    slots = torch.tensor([2, 0], device=device)
    track_slots = torch.tensor([1, -1], device=device)
    return state, sample_block(device)[2], *rings, base, upto, slots, track_slots, upto - 1


fold_ssd = define_op(
    "fold_ssd",
    "(Tensor(a!) state, Tensor A, Tensor ring_x, Tensor ring_b, Tensor ring_dt, Tensor base, Tensor upto, "
    "Tensor? slots, Tensor? track_slots, Tensor? track_upto) -> ()",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)
