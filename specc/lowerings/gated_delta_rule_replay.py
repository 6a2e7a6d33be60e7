"""``specc::gated_delta_rule_replay``: a block's outputs from a checkpoint and the records behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.checkpoints import along, as_one_call, live_rows, longest, put_block, put_rows
from specc.lowerings.fold_gated_delta_rule import fold, records, ring_unfit, sample_pool
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.gated_delta_rule import block_unfit, check_block, per_head, sample_block

# The records between two boundaries are one tile of the exact kernel.
LONGEST = 64


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
    flush_every: int,
    exact: bool,
) -> Tensor:
    """Outputs [B, T, HV, V] of the tokens at positions ``seq_lens ...``, after ``specc::gated_delta_rule``.

    q, k, v, g, beta, scale, l2norm: as there; state: [S, HV, K, V], float32 or bfloat16; the rings hold
    k, u and g of past tokens: ring_k [S, R, H, K] in k's dtype, ring_u [S, R, HV, V] and ring_g [S, R, HV]
    in float32, position p at entry ``p % R``; base: int64 [S]; seq_lens, final_lens: int64 [B]; slots: int
    [B], the pool row of each batch row, or None for 0, 1, 2, ...

    ``state[s]`` is that before position ``base[s]``; the positions up to ``seq_lens`` are read from the
    rings, the block's records are written there. Of every ``flush_every`` records behind base the state is
    rounded to its dtype; ``n = max(0, (final_lens - base) // flush_every * flush_every)`` records are
    folded into the pool. ``base`` stays: add n to it after all layers. R >= seq_lens - base + T. Unused
    entries do not matter, NaN included. Rows of negative slots or seq_lens give 0 and touch nothing.

    exact: a token's bits depend on the state at the last boundary and the records since, not on the block
    it comes in. Otherwise a kernel may sum in any order and need not round a state that only its own block
    crosses. The reference is exact either way. After ReplaySSM (Dao AI
    Lab): cache the inputs, not the states.
    """
    tokens, heads = v.shape[1:3]
    slot, live = live_rows(slots, seq_lens >= 0, state.shape[0])
    first = base[slot]
    pending = torch.where(live, seq_lens - first, 0).clamp(min=0)
    flushed = torch.where(live, final_lens - first, 0).clamp(min=0) // flush_every * flush_every

    carried = state[slot].float()
    stored = carried
    for segment in range(longest(pending // flush_every, ring_k.shape[1] // flush_every)):
        count = (pending - segment * flush_every).clamp(max=flush_every)
        start = first + segment * flush_every
        held = records(ring_k, ring_u, ring_g, slot, start, count, flush_every, l2norm)
        folded = fold(carried, *held).to(state.dtype).float()
        carried = torch.where(along(count == flush_every, folded), folded, carried)
        stored = torch.where(along(flushed == (segment + 1) * flush_every, folded), folded, stored)
    place = pending % flush_every
    start = first + pending - place
    held = records(ring_k, ring_u, ring_g, slot, start, place, flush_every, l2norm)

    new_q, new_k = per_head(q, heads, l2norm) * scale, per_head(k.to(ring_k.dtype), heads, l2norm)
    values, decays, rates = v.float(), g.float(), beta.float()
    u = torch.empty_like(values, memory_format=torch.contiguous_format)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    for token in range(tokens):
        if token:
            carried, place = _cross(carried, held, place + 1, flush_every, state.dtype)
        x = torch.stack([new_k[:, token], new_q[:, token]], -2)
        read, u[:, token] = _take(
            carried, held, place, x, values[:, token], decays[:, token], rates[:, token]
        )
        o[:, token] = torch.where(live[:, None, None], read, 0)

    put_rows(state, slot, live & (flushed > 0), stored)
    for ring, block in ((ring_k, k), (ring_u, u), (ring_g, g)):
        put_block(ring, slot, live, seq_lens, block)
    return o


def _cross(
    carried: Tensor, held: tuple[Tensor, ...], place: Tensor, flush_every: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """State and place [B] of the next token; rows at a boundary fold their records, which are cleared."""
    crossed = place == flush_every
    if longest(crossed.long(), 1):
        folded = fold(carried, *held).to(dtype).float()
        carried = torch.where(along(crossed, folded), folded, carried)
        for each in held:
            each.masked_fill_(along(crossed, each), 0)
    return carried, place % flush_every


def _take(
    state: Tensor, held: tuple[Tensor, ...], place: Tensor, x: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token's output and u [B, HV, V], from x, its key and query [B, HV, 2, K]; its record is added."""
    k, u, decay = held
    row = torch.arange(len(place), device=place.device)
    decay[row, :, place] = g
    since = decay.cumsum(-1)
    grown = since[..., -1:].exp()[..., None]
    decays = (since[..., -1:] - since).exp()[..., None, :]
    sums = grown * (x @ state) + (x @ k.mT * decays) @ u
    fresh = (v - sums[..., 0, :]) * beta[..., None]
    k[row, :, place], u[row, :, place] = x[..., 0, :], fresh
    return sums[..., 1, :] + (x[..., 0, :] * x[..., 1, :]).sum(-1, keepdim=True) * fresh, fresh


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
    flush_every: int,
    exact: bool,
) -> Tensor:
    check_block("gated_delta_rule_replay", q, k, v, g, beta)
    torch._check(flush_every >= 1, lambda: "gated_delta_rule_replay: flush_every of 1 or more")
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _triton_supports(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
    flush_every: int,
    exact: bool,
) -> Reason:
    indices = {"base": base, "seq_lens": seq_lens, "final_lens": final_lens, "slots": slots}
    why = triton_kernels.not_integers(*triton_kernels.INDICES, **indices)
    if why is not None:
        return why
    if not 1 <= flush_every <= LONGEST:
        return f"flushes every 1 to {LONGEST} tokens, not every {flush_every}"
    if ring_k.dtype != k.dtype:
        return f"needs keys of the ring's dtype, got {k.dtype} and {ring_k.dtype}"
    why = block_unfit(q, k, v, g, beta) or ring_unfit(state, ring_k, ring_u, ring_g)
    return why or triton_kernels.unfit(q, k, v, g, beta, state, ring_k, ring_u, ring_g, *indices.values())


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    ring_k: Tensor,
    ring_u: Tensor,
    ring_g: Tensor,
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    slots: Tensor | None,
    scale: float,
    l2norm: bool,
    flush_every: int,
    exact: bool,
) -> Tensor:
    from specc.lowerings.triton_kernels import gated_delta_rule

    block, rings = (q, k, v, g, beta), (ring_k, ring_u, ring_g)
    lens = base, seq_lens, final_lens, slots
    with torch.cuda.device_of(q):
        return gated_delta_rule.replay(block, state, rings, lens, scale, l2norm, flush_every, exact)


def _sample(device: str) -> tuple[object, ...]:
    base = torch.tensor([7, 0, 30], device=device)
    seq_lens = torch.tensor([48, 6], device=device)
    slots = torch.tensor([2, 0], device=device)
    block, pool = sample_block(device), sample_pool(device)
    return *block, *pool, base, seq_lens, seq_lens - 1, slots, 32**-0.5, True, 16, True


gated_delta_rule_replay = define_op(
    "gated_delta_rule_replay",
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor(a!) state, Tensor(b!) ring_k, "
    "Tensor(c!) ring_u, Tensor(d!) ring_g, Tensor base, Tensor seq_lens, Tensor final_lens, Tensor? slots, "
    "float scale, bool l2norm, int flush_every, bool exact) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), as_one_call(reference)),
)
