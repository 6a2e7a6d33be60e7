"""Gated DeltaNet from a checkpoint and a ring, with bits that do not depend on the blocks: the exact replay.

A token is computed from the state at the last boundary and the records since. They are added one after the
other, whether they were in the ring or are the block's own, by the same fused multiply-add; a state that
crosses a boundary is folded and rounded in registers as a flush does it. Norms and products of keys are
taken from matrix products, whose elements depend on their own row and column only, so that neither the
tile's shape nor how memory is aligned can change a sum. Compile without contraction.

A segment is what lies between two boundaries. ``_prepare`` computes all that depends on keys and decays only,
per value head; ``_verify`` owns some columns of the state. Where the device can, ``_verify`` starts while
``_prepare`` still runs, and waits for it behind the loads which do not depend on it.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from specc.lowerings.gated_delta_rule_replay import LONGEST
from specc.lowerings.triton_kernels.gated_delta_rule import (
    columns,
    counts,
    inverse_norm,
    parts,
    place,
    product,
    slot_of,
)

# Of every configuration: a longer chunk would be multiplied by other instructions, with other bits; and sums
# over records depend on the warps of _prepare.
CHUNK = 32
# Records added in a row, for all of which loads are on their way.
BATCH = tl.constexpr(4)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``columns`` of the state a program of ``_verify`` owns. It has no sums: bits depend on none of this."""

    columns: int
    num_warps: int
    num_stages: int


# By whether the rows alone fill the device.
TILES = {False: Tiles(32, 2, 5), True: Tiles(128, 2, 3)}
# For more than 8 tokens, wide keys and float32.
WIDE = Tiles(32, 2, 3)


@triton.jit
def _sweep(
    x_at, state, state_key, lane_v,
    K: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, CHUNK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``x @ S`` over all of K, rows of the state coming through shared memory. x_at: one pointer per row.

    EVEN: tiles divide the state, so that its loads need no mask.
    """
    acc = tl.zeros([x_at.shape[0], lane_v.shape[0]], tl.float32)
    for start in tl.range(0, K, CHUNK_K, num_stages=STAGES):
        lane_k = start + tl.arange(0, CHUNK_K)
        in_k = lane_k < K
        at = state + (lane_k.to(tl.int64) * state_key)[:, None] + lane_v[None, :]
        inside = in_k[:, None] & (lane_v < V)[None, :]
        s = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
        s = s.to(tl.float32)
        x = tl.load(x_at[:, None] + lane_k[None, :], mask=in_k[None, :], other=0.0)
        acc = product(x, s, acc, PARTS)
    return acc


@triton.jit
def _flush(
    state, state_key, lane_v, u_at, keys_at, there, weight, kept,
    K: tl.constexpr, V: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, CHUNK_K: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """``S <- kept S + keys^T diag(weight) u``, in place."""
    in_v = lane_v < V
    u = tl.load(u_at[:, None] + lane_v[None, :], mask=there[:, None] & in_v[None, :], other=0.0)
    u = u * weight[:, None]
    for start in tl.range(0, K, CHUNK_K, num_stages=STAGES):
        lane_k = start + tl.arange(0, CHUNK_K)
        in_k = lane_k < K
        inside = in_k[:, None] & in_v[None, :]
        at = state + (lane_k.to(tl.int64) * state_key)[:, None] + lane_v[None, :]
        s = tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)
        keys_inside = there[:, None] & in_k[None, :]
        keys = tl.load(keys_at[:, None] + lane_k[None, :], mask=keys_inside, other=0.0)
        s = product(tl.trans(keys), u, s.to(tl.float32) * kept, PARTS).to(state.dtype.element_ty)
        if EVEN:
            tl.store(at, s)
        else:
            tl.store(at, s, mask=inside)


@triton.jit
def _keys_and_queries(
    q, q_token, k, k_token, tokens, xs,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TOKENS keys, then TOKENS queries, zeros behind the block's last: [2 TOKENS, BLOCK_K]; and to xs."""
    lane = tl.arange(0, 2 * TOKENS)
    step = (lane % TOKENS).to(tl.int64)
    lane_k = tl.arange(0, BLOCK_K)
    is_key = ((lane < tokens) & (lane < TOKENS))[:, None] & (lane_k < K)[None, :]
    is_query = ((lane >= TOKENS) & (lane - TOKENS < tokens))[:, None] & (lane_k < K)[None, :]
    keys = tl.load(k + (step * k_token)[:, None] + lane_k[None, :], mask=is_key, other=0.0)
    queries = tl.load(q + (step * q_token)[:, None] + lane_k[None, :], mask=is_query, other=0.0)
    x = tl.where((lane >= TOKENS)[:, None], queries, keys)
    tl.store(xs + lane[:, None] * K + lane_k[None, :], x, mask=(lane_k < K)[None, :])
    return x


@triton.jit(do_not_specialize=["tokens"])
def _prepare(
    q, k, g, ring_k, ring_g, base, seq_lens, final_lens, slots, xs, scores, weights,
    scale, tokens, heads, segments,
    q_row, q_token, q_head, k_row, k_token, k_head, g_row, g_token, g_head,
    ring_k_row, ring_k_entry, ring_k_head, ring_g_row, ring_g_entry, ring_g_head,
    K: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr, FLUSH_EVERY: tl.constexpr,
    TOKENS: tl.constexpr, RECORDS: tl.constexpr, BLOCK_K: tl.constexpr,
    RING: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """scores: [B, HV, 2 TOKENS, RECORDS + 1], what each record of its segment and, last, the state at its
    boundary counts for a key or a query; weights: [B, HV, segments, RECORDS + 1], what they count at the
    next boundary.
    """
    if OVERLAP:
        gdc_launch_dependents()
    row, head, _ = place(1, heads)
    key_head = head // GROUP
    lane = tl.arange(0, 2 * TOKENS)
    other = tl.arange(0, 2 * TOKENS)
    token = lane % TOKENS
    is_query = lane >= TOKENS
    live = token < tokens
    lane_k = tl.arange(0, BLOCK_K)
    in_k = lane_k < K
    k += row * k_row + key_head * k_head
    q += row * q_row + key_head * q_head
    g += row * g_row + head * g_head
    xs += (row * heads + head) * 2 * TOKENS * K
    x = _keys_and_queries(q, q_token, k, k_token, tokens, xs, K, TOKENS, BLOCK_K)
    slot = slot_of(slots, row)
    start, pending, _, length = counts(base, seq_lens, final_lens, slot, row, RING, FLUSH_EVERY)
    if length < 0:
        return
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_g += slot * ring_g_row + head * ring_g_head
    scores += ((row * heads + head) * 2 * TOKENS + lane) * (RECORDS + 1)
    weights += (row * heads + head) * segments * (RECORDS + 1)

    x_squares = tl.dot(x, tl.trans(x), input_precision="ieee")
    x_squares = tl.where(lane[:, None] == other[None, :], x_squares, 0.0)
    x_norm = inverse_norm(tl.sum(x_squares, 1), L2NORM) * tl.where(is_query, scale, 1.0)
    age = tl.arange(0, RECORDS)
    column = tl.arange(0, RECORDS)
    for segment in range((pending + tokens - 1) // FLUSH_EVERY + 1):
        # First the ring's records, then the block's.
        begin = segment * FLUSH_EVERY
        fresh = (begin + age - pending).to(tl.int64)
        held = (fresh < 0) & (age < FLUSH_EVERY)
        new = (fresh >= 0) & (fresh < tokens) & (age < FLUSH_EVERY)
        entry = ((start + begin + age) % RING).to(tl.int64)
        ring_at = ring_k + (entry * ring_k_entry)[:, None] + lane_k[None, :]
        old_keys = tl.load(ring_at, mask=held[:, None] & in_k[None, :], other=0.0)
        fresh_at = k + (fresh * k_token)[:, None] + lane_k[None, :]
        new_keys = tl.load(fresh_at, mask=new[:, None] & in_k[None, :], other=0.0)
        keys = tl.where(held[:, None], old_keys, new_keys)
        decay = tl.load(ring_g + entry * ring_g_entry, mask=held, other=0.0)
        decay += tl.load(g + fresh * g_token, mask=new, other=0.0).to(tl.float32)
        squares = tl.dot(keys, tl.trans(keys), input_precision="ieee")
        squares = tl.where(age[:, None] == column[None, :], squares, 0.0)
        norm = inverse_norm(tl.sum(squares, 0), L2NORM)
        since = tl.cumsum(decay, 0)
        total = tl.sum(decay, 0)
        tl.store(weights + segment * (RECORDS + 1) + age, tl.exp(total - since) * norm)
        tl.store(weights + segment * (RECORDS + 1) + RECORDS, tl.exp(total))

        place_of = pending + token - begin
        here = (place_of >= 0) & (place_of < FLUSH_EVERY) & live
        passed = tl.sum(tl.where(age[None, :] == place_of[:, None], since[None, :], 0.0), 1)
        dots = tl.dot(x, tl.trans(keys), input_precision="ieee")
        dots = (dots * x_norm[:, None]) * norm[None, :]
        dots = dots * tl.exp(tl.minimum(passed[:, None] - since[None, :], 0.0))
        seen = age[None, :] < (place_of + is_query.to(tl.int32))[:, None]
        tl.store(scores[:, None] + age[None, :], tl.where(seen, dots, 0.0), mask=here[:, None])
        tl.store(scores + RECORDS, x_norm * tl.exp(passed), mask=here)

        tl.store(ring_g + entry * ring_g_entry, decay, mask=new)
        if head % GROUP == 0:
            tl.store(ring_at, keys, mask=new[:, None] & in_k[None, :])


@triton.jit
def _sweep_over(
    x_at, state, state_key, lane_v, ring_k, ring_k_entry, ring_u, ring_u_entry, weights,
    start, first, last,
    RING: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, FOLD_PARTS: tl.constexpr,
    FLUSH_EVERY: tl.constexpr, RECORDS: tl.constexpr, CHUNK_K: tl.constexpr,
):  # fmt: skip
    """``_sweep`` over the state behind the segments ``first ... last - 1``, which is in registers only."""
    in_v = lane_v < V
    acc = tl.zeros([x_at.shape[0], lane_v.shape[0]], tl.float32)
    age = tl.arange(0, RECORDS)
    there = age < FLUSH_EVERY
    for begin in range(0, K, CHUNK_K):
        lane_k = begin + tl.arange(0, CHUNK_K)
        in_k = lane_k < K
        at = state + (lane_k.to(tl.int64) * state_key)[:, None] + lane_v[None, :]
        s = tl.load(at, mask=in_k[:, None] & in_v[None, :], other=0.0).to(tl.float32)
        for segment in range(first, last):
            entry = ((start + segment * FLUSH_EVERY + age) % RING).to(tl.int64)
            keys_at = ring_k + (entry * ring_k_entry)[:, None] + lane_k[None, :]
            keys = tl.load(keys_at, mask=there[:, None] & in_k[None, :], other=0.0)
            u_at = ring_u + (entry * ring_u_entry)[:, None] + lane_v[None, :]
            u = tl.load(u_at, mask=there[:, None] & in_v[None, :], other=0.0)
            weight = tl.load(weights + segment * (RECORDS + 1) + age, mask=there, other=0.0)
            kept = tl.load(weights + segment * (RECORDS + 1) + RECORDS)
            s = product(tl.trans(keys), u * weight[:, None], s * kept, FOLD_PARTS)
            s = s.to(state.dtype.element_ty).to(tl.float32)
        x = tl.load(x_at[:, None] + lane_k[None, :], mask=in_k[None, :], other=0.0)
        acc = product(x, s, acc, PARTS)
    return acc


@triton.jit(do_not_specialize=["tokens"])
def _verify(
    v, beta, state, ring_k, ring_u, base, seq_lens, final_lens, slots, xs, scores, weights, out,
    tokens, heads, tiles, segments,
    v_row, v_token, v_head, beta_row, beta_token, beta_head, state_row, state_head, state_key,
    ring_k_row, ring_k_entry, ring_k_head, ring_u_row, ring_u_entry, ring_u_head,
    RING: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, FLUSH_EVERY: tl.constexpr,
    TOKENS: tl.constexpr, RECORDS: tl.constexpr, PARTS: tl.constexpr, FOLD_PARTS: tl.constexpr,
    EVEN: tl.constexpr, CHUNK_K: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows of a tile: TOKENS keys, then TOKENS queries."""
    row, head, tile = place(tiles, heads)
    key_head = head // GROUP
    lane = tl.arange(0, 2 * TOKENS)
    token = lane % TOKENS
    is_query = lane >= TOKENS
    live = token < tokens
    lane_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = lane_v < V
    out_at = out + (((row * tokens + token) * heads + head) * V)[:, None] + lane_v[None, :]
    out_live = (is_query & live)[:, None] & in_v[None, :]
    written = (lane < TOKENS) & live
    value_at = v + row * v_row + head * v_head + (token * v_token)[:, None] + lane_v[None, :]
    values = tl.load(value_at, mask=written[:, None] & in_v[None, :], other=0.0).to(tl.float32)
    rate_at = beta + row * beta_row + head * beta_head + token * beta_token
    rate = tl.load(rate_at, mask=written, other=0.0).to(tl.float32)
    slot = slot_of(slots, row)
    start, pending, flushed, length = counts(base, seq_lens, final_lens, slot, row, RING, FLUSH_EVERY)
    if OVERLAP:
        gdc_wait()
    if length < 0:
        tl.store(out_at, tl.zeros([2 * TOKENS, BLOCK_V], out.dtype.element_ty), mask=out_live)
        return
    state += slot * state_row + head * state_head
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head
    scores += ((row * heads + head) * 2 * TOKENS + lane) * (RECORDS + 1)
    weights += (row * heads + head) * segments * (RECORDS + 1)

    age = tl.arange(0, RECORDS)
    there = age < FLUSH_EVERY
    flushes = flushed // FLUSH_EVERY
    for segment in range(flushes):
        entry = ((start + segment * FLUSH_EVERY + age) % RING).to(tl.int64)
        weight = tl.load(weights + segment * (RECORDS + 1) + age, mask=there, other=0.0)
        kept = tl.load(weights + segment * (RECORDS + 1) + RECORDS)
        _flush(
            state, state_key, lane_v, ring_u + entry * ring_u_entry, ring_k + entry * ring_k_entry,
            there, weight, kept, K, V, EVEN, FOLD_PARTS, CHUNK_K, STAGES,
        )  # fmt: skip
        # All threads' stores, before any thread's loads.
        tl.debug_barrier()

    x_at = xs + ((row * heads + head) * 2 * TOKENS + lane) * K
    for segment in range(pending // FLUSH_EVERY, (pending + tokens - 1) // FLUSH_EVERY + 1):
        if segment == flushes:
            acc = _sweep(x_at, state, state_key, lane_v, K, V, EVEN, PARTS, CHUNK_K, STAGES)
        else:
            acc = _sweep_over(
                x_at, state, state_key, lane_v, ring_k, ring_k_entry, ring_u, ring_u_entry, weights,
                start, flushes, segment,
                RING, K, V, PARTS, FOLD_PARTS, FLUSH_EVERY, RECORDS, CHUNK_K,
            )  # fmt: skip
        offset = segment * FLUSH_EVERY - pending
        here = (token >= offset) & (token < offset + FLUSH_EVERY) & live
        acc = acc * tl.load(scores + RECORDS, mask=here, other=0.0)[:, None]
        held = tl.minimum(tl.maximum(-offset, 0), FLUSH_EVERY)
        for begin in range(0, held, BATCH):
            # Behind the last one zeros are added, which can change the sign of a zero only.
            for number in tl.static_range(BATCH):
                inside = in_v & ((begin + number + tl.zeros_like(lane_v)) < held)
                at = ((start + segment * FLUSH_EVERY + begin + number) % RING).to(tl.int64) * ring_u_entry
                one = tl.load(ring_u + at + lane_v, mask=inside, other=0.0)
                counted = here & ((begin + number + tl.zeros_like(lane)) < held)
                factor = tl.load(scores + begin + number, mask=counted, other=0.0)
                factor = tl.broadcast_to(factor[:, None], acc.shape)
                acc = tl.fma(factor, tl.broadcast_to(one[None, :], acc.shape), acc)
        for now in range(tl.maximum(offset, 0), tl.minimum(offset + FLUSH_EVERY, tokens)):
            factor = tl.load(scores + now - offset, mask=here, other=0.0)
            at = ((start + pending + now) % RING).to(tl.int64) * ring_u_entry
            one = tl.sum(tl.where((lane == now)[:, None], (values - acc) * rate[:, None], 0.0), 0)
            tl.store(ring_u + at + lane_v, one, mask=in_v)
            factor = tl.broadcast_to(factor[:, None], acc.shape)
            acc = tl.fma(factor, tl.broadcast_to(one[None, :], acc.shape), acc)
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=out_live & here[:, None])
        tl.debug_barrier()


@functools.cache
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel may start before the one in front of it ends."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def prepare_warps(dtype: torch.dtype) -> int:
    return 4 if dtype == torch.float32 else 2


def tiles_for(k: Tensor, heads: int) -> Tiles:
    rows, tokens, _, key_dim = k.shape
    if tokens > 8 or key_dim > 128 or k.dtype == torch.float32:
        return WIDE
    return TILES[rows * heads >= 512]


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, chosen: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay``, exact. lens: base, seq_lens, final_lens, slots."""
    q, k, v, g, beta = block
    ring_k, ring_u, ring_g = rings
    rows, tokens, heads, dim = v.shape
    tiles = chosen or tiles_for(k, heads)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    block_v, overlap = columns(dim, tiles.columns), _overlaps(q.device)
    across = triton.cdiv(dim, block_v)
    key_dim, ring_size = k.shape[3], ring_k.shape[1]
    padded, records = 8 if tokens <= 8 else 16, columns(flush_every, LONGEST)
    segments = (ring_size + tokens - 1) // flush_every + 1
    xs = k.new_empty((rows, heads, 2 * padded, key_dim))
    scores = ring_u.new_empty((rows, heads, 2 * padded, records + 1))
    weights = ring_u.new_empty((rows, heads, segments, records + 1))
    lens = tuple(None if x is None else x.contiguous() for x in lens)
    shared = {
        "K": key_dim, "GROUP": heads // k.shape[2], "FLUSH_EVERY": flush_every, "TOKENS": padded,
        "RECORDS": records, "RING": ring_size, "OVERLAP": overlap, "num_stages": 1,
        "enable_fp_fusion": False,
    }  # fmt: skip
    _prepare[(rows * heads,)](
        q, k, g, ring_k, ring_g, *lens, xs, scores, weights, scale, tokens, heads, segments,
        *(stride for x in (q, k, g, ring_k, ring_g) for stride in x.stride()[:3]),
        L2NORM=l2norm, BLOCK_K=columns(key_dim, 256), num_warps=prepare_warps(k.dtype),
        **shared,
    )  # fmt: skip
    _verify[(rows * heads * across,)](
        v, beta, state, ring_k, ring_u, *lens, xs, scores, weights, out,
        tokens, heads, across, segments,
        *(stride for x in (v, beta, state, ring_k, ring_u) for stride in x.stride()[:3]),
        V=dim, PARTS=parts(k, state), FOLD_PARTS=parts(k, ring_u), CHUNK_K=CHUNK, BLOCK_V=block_v,
        EVEN=key_dim % CHUNK == 0 and dim % block_v == 0, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, **shared, **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip
    return out
