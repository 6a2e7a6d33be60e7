"""``specc::fold_gated_delta_rule``: bring checkpoints of Gated DeltaNet layers up to a position."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import along, live_rows, put_rows
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.gated_delta_rule import FLOATS, per_head, state_unfit


def records(
    ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, slot: Tensor, first: Tensor, count: Tensor, length: int,
    l2norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The records of ``length`` positions from ``first`` [B] on, zeros behind the first ``count`` [B].

    Returns the keys per value head, normalised, [B, HV, length, K]; u [B, HV, length, V]; g [B, HV, length].
    """
    age = torch.arange(length, device=first.device)
    at = slot[:, None], (first[:, None] + age) % ring_k.shape[1]
    there = age < count[:, None]
    k = per_head(ring_k[at], ring_u.shape[2], l2norm)
    k, u, g = (torch.where(along(there, x), x, 0).transpose(1, 2) for x in (k, ring_u[at], ring_g[at]))
    return k, u, g


def fold(state: Tensor, k: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The state [B, HV, K, V] with the records of ``records`` folded in."""
    since = g.cumsum(-1)
    total = since[..., -1:]
    weighted = u * (total - since).exp()[..., None]
    return state * total.exp()[..., None] + k.mT @ weighted


def reference(
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    upto: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    track_upto: Tensor | None,
    l2norm: bool,
) -> None:
    """``state[slots[b]]`` takes in the records of the positions ``base[slots[b]] ... upto[b] - 1``, in place.

    state: [S, HV, K, V], float32 or bfloat16; ring_k: [S, R, H, K], ring_u: [S, R, HV, V] and ring_g:
    [S, R, HV] in float32, as ``specc::gated_delta_rule_replay`` leaves them; base: int64 [S]; upto: int64
    [B], a row of ``upto <= base`` stays as it is; slots: int [B], the pool row of each batch row, negative
    for none, or None for 0, 1, 2, ... Where ``track_slots[b] >= 0`` and ``track_upto[b] > base``, that pool
    row takes row b's state with the records up to there; track rows differ from all live ones. At most R
    records count. Computed in float32. base stays: the caller sets it.
    """
    slot, live = live_rows(slots, torch.ones_like(upto, dtype=torch.bool), state.shape[0])
    first, old = base[slot], state[slot].float()
    targets = [(slot, live, upto)]
    if track_slots is not None and track_upto is not None:
        track, tracked = live_rows(track_slots, live, state.shape[0])
        targets.append((track, tracked, track_upto))
    for row, wanted, end in targets:
        count = torch.where(wanted, end - first, 0)
        held = records(ring_k, ring_u, ring_g, slot, first, count, ring_k.shape[1], l2norm)
        put_rows(state, row, wanted & (count > 0), fold(old, *held))


def _fake(
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    upto: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    track_upto: Tensor | None,
    l2norm: bool,
) -> None:
    torch._check(slots is None or slots.shape == upto.shape, lambda: "fold_gated_delta_rule: a slot per row")
    torch._check(
        (track_slots is None) == (track_upto is None),
        lambda: "fold_gated_delta_rule: track slots and their ends together",
    )


def ring_unfit(state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor) -> Reason:
    """Why the kernels cannot take these rings, or None."""
    if ring_k.dtype not in FLOATS or ring_u.dtype != torch.float32 or ring_g.dtype != torch.float32:
        return f"has no kernel for rings of {ring_k.dtype}, {ring_u.dtype}, {ring_g.dtype}"
    if any(x.stride(-1) != 1 for x in (ring_k, ring_u)):
        return "needs rings contiguous in the last dimension"
    dims = ring_k.shape[3], ring_u.shape[3]
    if not all(16 <= dim <= 256 for dim in dims):
        return f"takes key and value dimensions of 16 to 256, got {dims}"
    return state_unfit(state)


def _triton_supports(
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    upto: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    track_upto: Tensor | None,
    l2norm: bool,
) -> Reason:
    indices = {"base": base, "upto": upto, "slots": slots, "track_slots": track_slots}
    why = triton_kernels.not_integers(*triton_kernels.INDICES, **indices)
    why = why or ring_unfit(state, ring_k, ring_u, ring_g)
    return why or triton_kernels.unfit(
        state, ring_k, ring_u, ring_g, base, upto, slots, track_slots, track_upto
    )


def _triton(
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    upto: Tensor,
    slots: Tensor | None,
    track_slots: Tensor | None,
    track_upto: Tensor | None,
    l2norm: bool,
) -> None:
    from specc.lowerings.triton_kernels import gated_delta_rule

    with torch.cuda.device_of(state):
        gated_delta_rule.fold(
            state, ring_k, ring_u, ring_g, base, upto, slots, track_slots, track_upto, l2norm
        )


def sample_pool(device: str, ring_size: int = 24) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """state, ring_k, ring_u, ring_g of three pool rows for the blocks of ``sample_block``."""
    return (
        torch.randn(3, 4, 32, 64, device=device),
        torch.randn(3, ring_size, 2, 32, device=device).to(usual_dtype(device)),
        torch.randn(3, ring_size, 4, 64, device=device),
        -torch.rand(3, ring_size, 4, device=device),
    )


def _sample(device: str) -> tuple[object, ...]:
    base = torch.tensor([7, 0, 30], device=device)
    upto, slots = torch.tensor([48, 6], device=device), torch.tensor([2, 0], device=device)
    track_slots, track_upto = torch.tensor([1, -1], device=device), torch.tensor([40, 9], device=device)
    return *sample_pool(device), base, upto, slots, track_slots, track_upto, True


fold_gated_delta_rule = define_op(
    "fold_gated_delta_rule",
    "(Tensor(a!) state, Tensor ring_k, Tensor ring_u, Tensor ring_g, Tensor base, Tensor upto, "
    "Tensor? slots, Tensor? track_slots, Tensor? track_upto, bool l2norm) -> ()",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
