"""Gated DeltaNet from a checkpoint and a ring, in one pass over the state: the fast form of the replay.

With G the sum of g since base, ``S_t^T x = e^{G_t} S^T x + sum_i e^{G_t - G_i} (x . k_i) u_i``. All keys and
queries X of a block are multiplied with the checkpoint S at once; what the records add, and what the
block's tokens add to each other, are small matrices that depend on keys and decays only:

* ``_prepare`` solves for them, per value head: [u; o] = M_x (X S) + M_u U - M_v V;
* ``_verify`` streams its columns of S through shared memory, applies them, and, where there is something to
  flush, goes over the state once more and writes the new checkpoint.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.triton_kernels.gated_delta_rule import (
    columns,
    dots,
    inverse_norm,
    parts,
    place,
    product,
    slot_of,
)

# The longest ring whose records fit into one tile.
LONGEST_RING = 64
LONG_WARPS = 8
# Records that a flush takes at a time.
FOLDED = tl.constexpr(16)


@triton.jit
def sweep(
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
def flush(
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
def keys_and_queries(
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


@triton.jit
def counts(base, seq_lens, final_lens, slot, row, ring_size, FLUSH_EVERY: tl.constexpr):
    """The ring entry of base, the records since, those to flush; and the row's length, negative if dead."""
    length = tl.load(seq_lens + row).to(tl.int64)
    first = tl.load(base + tl.maximum(slot, 0)).to(tl.int64)
    final = tl.load(final_lens + row).to(tl.int64)
    pending = tl.minimum(tl.maximum(length - first, 0), ring_size).to(tl.int32)
    flushed = tl.minimum(tl.maximum(final - first, 0), pending).to(tl.int32) // FLUSH_EVERY * FLUSH_EVERY
    length = tl.where(slot < 0, -1, length)
    return (first % ring_size).to(tl.int32), pending, flushed, length


@triton.jit(do_not_specialize=["tokens"])
def _prepare(
    q, k, g, beta, ring_k, ring_g, base, seq_lens, final_lens, slots, plan, xs, matrices, weights,
    scale, tokens, ring_size, heads,
    q_row, q_token, q_head, k_row, k_token, k_head, g_row, g_token, g_head,
    beta_row, beta_token, beta_head, ring_k_row, ring_k_entry, ring_k_head,
    ring_g_row, ring_g_entry, ring_g_head,
    K: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr, FLUSH_EVERY: tl.constexpr,
    TOKENS: tl.constexpr, RECORDS: tl.constexpr, DOTS: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """matrices: [B, HV, 2 TOKENS, 4 TOKENS + RECORDS], M_x, M_v and M_u, the rows being TOKENS keys, then
    TOKENS queries; weights: [B, HV, RECORDS + 1], of the records to flush and, last, of the old state.
    """
    row, head, _ = place(1, heads)
    key_head = head // GROUP
    lane = tl.arange(0, 2 * TOKENS)
    other = tl.arange(0, 2 * TOKENS)
    token = lane % TOKENS
    is_query = lane >= TOKENS
    live = token < tokens
    slot = slot_of(slots, row)
    start, pending, flushed, length = counts(base, seq_lens, final_lens, slot, row, ring_size, FLUSH_EVERY)
    if head == 0:
        tl.store(plan + row * 3, tl.where(length < 0, -1, start))
        tl.store(plan + row * 3 + 1, pending)
        tl.store(plan + row * 3 + 2, flushed)
    if length < 0:
        return
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_g += slot * ring_g_row + head * ring_g_head
    k += row * k_row + key_head * k_head
    q += row * q_row + key_head * q_head
    g += row * g_row + head * g_head
    beta += row * beta_row + head * beta_head

    lane_k = tl.arange(0, BLOCK_K)
    in_k = lane_k < K
    step = token.to(tl.int64)
    xs += (row * heads + head) * 2 * TOKENS * K
    x = keys_and_queries(q, q_token, k, k_token, tokens, xs, K, TOKENS, BLOCK_K)
    age = tl.arange(0, RECORDS)
    there = age < pending
    entry = ((start + age) % ring_size).to(tl.int64)
    keys_at = ring_k + entry * ring_k_entry
    keys = tl.load(keys_at[:, None] + lane_k[None, :], mask=there[:, None] & in_k[None, :], other=0.0)
    decay = tl.load(ring_g + entry * ring_g_entry, mask=there, other=0.0)
    new = (other < TOKENS) & (other < tokens)
    fresh = tl.load(g + other.to(tl.int64) * g_token, mask=new, other=0.0).to(tl.float32)
    rate = tl.load(beta + step * beta_token, mask=live & (lane < TOKENS), other=0.0).to(tl.float32)
    rate = tl.where(is_query, 1.0, -rate)

    since = tl.cumsum(decay, 0)
    passed = tl.sum(tl.where(other[None, :] <= token[:, None], fresh[None, :], 0.0), 1)
    passed_other = tl.cumsum(fresh, 0)
    total = passed + tl.sum(decay, 0)
    dots = tl.dot(x, tl.trans(x), input_precision=DOTS)
    squares = tl.where(lane[:, None] == other[None, :], dots, 0.0)
    x_norm = inverse_norm(tl.sum(squares, 1), L2NORM) * tl.where(is_query, scale, 1.0)
    wide = keys.to(tl.float32)
    norm = inverse_norm(tl.sum(wide * wide, 1), L2NORM)

    # The block's tokens, one after the other: (1 - system)^-1 diag(rate).
    system = dots * (x_norm * rate)[:, None] * inverse_norm(tl.sum(squares, 0), L2NORM)[None, :]
    system = system * tl.exp(tl.minimum(passed[:, None] - passed_other[None, :], 0.0))
    earlier = other[None, :] < (token + is_query.to(tl.int32))[:, None]
    system = tl.where(earlier & new[None, :], system, 0.0)
    solved = tl.where((lane[:, None] == other[None, :]) & live[:, None], rate[:, None], 0.0)
    for done in range(tokens):
        one = tl.sum(tl.where((lane == done)[:, None], solved, 0.0), 0)
        factor = tl.sum(tl.where((other == done)[None, :], system, 0.0), 1)
        solved += factor[:, None] * one[None, :]

    scores = tl.dot(x, tl.trans(keys), input_precision=DOTS) * x_norm[:, None] * norm[None, :]
    scores = scores * tl.exp(tl.minimum(total[:, None] - since[None, :], 0.0))
    scores = tl.where(there[None, :], scores, 0.0)
    by_records = tl.dot(solved, scores, input_precision=SUMS)
    grown = tl.sum(tl.where(lane[:, None] == other[None, :], (x_norm * tl.exp(total))[:, None], 0.0), 0)

    width: tl.constexpr = 4 * TOKENS + RECORDS
    at = matrices + ((row * heads + head) * 2 * TOKENS + lane)[:, None] * width
    tl.store(at + other[None, :], solved * grown[None, :])
    tl.store(at + 2 * TOKENS + other[None, :], solved)
    tl.store(at + 4 * TOKENS + age[None, :], by_records)
    weights += (row * heads + head) * (RECORDS + 1)
    kept = tl.sum(tl.where(age < flushed, decay, 0.0), 0)
    tl.store(weights + age, tl.where(age < flushed, tl.exp(tl.minimum(kept - since, 0.0)) * norm, 0.0))
    tl.store(weights + RECORDS, tl.exp(kept))

    written = live & (lane < TOKENS)
    fresh_entry = ((start + pending + token) % ring_size).to(tl.int64)
    tl.store(ring_g + fresh_entry * ring_g_entry, fresh, mask=written)
    if head % GROUP == 0:
        k_at = ring_k + (fresh_entry * ring_k_entry)[:, None] + lane_k[None, :]
        tl.store(k_at, x, mask=written[:, None] & in_k[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _verify(
    v, state, ring_k, ring_u, slots, plan, xs, matrices, weights, out,
    tokens, ring_size, heads, tiles,
    v_row, v_token, v_head, state_row, state_head, state_key, ring_k_row, ring_k_entry, ring_k_head,
    ring_u_row, ring_u_entry, ring_u_head,
    K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    TOKENS: tl.constexpr, RECORDS: tl.constexpr, PARTS: tl.constexpr, FOLD_PARTS: tl.constexpr,
    SUMS: tl.constexpr, EVEN: tl.constexpr, CHUNK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row, head, tile = place(tiles, heads)
    key_head = head // GROUP
    lane = tl.arange(0, 2 * TOKENS)
    other = tl.arange(0, 2 * TOKENS)
    token = lane % TOKENS
    is_query = lane >= TOKENS
    live = token < tokens
    lane_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = lane_v < V
    out_at = out + (((row * tokens + token) * heads + head) * V)[:, None] + lane_v[None, :]
    out_live = (is_query & live)[:, None] & in_v[None, :]
    slot = slot_of(slots, row)
    start = tl.load(plan + row * 3)
    pending = tl.load(plan + row * 3 + 1)
    flushed = tl.load(plan + row * 3 + 2)
    if start < 0:
        tl.store(out_at, tl.zeros([2 * TOKENS, BLOCK_V], out.dtype.element_ty), mask=out_live)
        return
    state += slot * state_row + head * state_head
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head
    step = token.to(tl.int64)
    x_at = xs + ((row * heads + head) * 2 * TOKENS + lane) * K
    age = tl.arange(0, RECORDS)
    there = age < pending
    entry = ((start + age) % ring_size).to(tl.int64)
    u_at = ring_u + (entry * ring_u_entry)[:, None] + lane_v[None, :]
    u = tl.load(u_at, mask=there[:, None] & in_v[None, :], other=0.0)

    width: tl.constexpr = 4 * TOKENS + RECORDS
    matrices += ((row * heads + head) * 2 * TOKENS + lane)[:, None] * width
    values = tl.load(
        v + row * v_row + head * v_head + (step * v_token)[:, None] + lane_v[None, :],
        mask=(live & (lane < TOKENS))[:, None] & in_v[None, :],
        other=0.0,
    )
    by_state = tl.load(matrices + other[None, :])
    by_values = tl.load(matrices + 2 * TOKENS + other[None, :])
    by_records = tl.load(matrices + 4 * TOKENS + age[None, :])

    acc = sweep(x_at, state, state_key, lane_v, K, V, EVEN, PARTS, CHUNK_K, STAGES)
    result = tl.dot(by_state, acc, input_precision=SUMS)
    result = tl.dot(by_records, u, result, input_precision=SUMS)
    result = tl.dot(by_values, -values.to(tl.float32), result, input_precision=SUMS)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=out_live)
    fresh_entry = ((start + pending + token) % ring_size).to(tl.int64)
    fresh_at = ring_u + (fresh_entry * ring_u_entry)[:, None] + lane_v[None, :]
    tl.store(fresh_at, result, mask=(live & (lane < TOKENS))[:, None] & in_v[None, :])
    if flushed > 0:
        # Of its own, after the sweep: read again it comes from the L2 cache, and registers are scarce.
        tl.debug_barrier()
        weights += (row * heads + head) * (RECORDS + 1)
        kept = tl.load(weights + RECORDS)
        for begin in range(0, flushed, FOLDED):
            folded = begin + tl.arange(0, FOLDED)
            at = ((start + folded) % ring_size).to(tl.int64)
            weight = tl.load(weights + folded, mask=folded < flushed, other=0.0)
            flush(
                state, state_key, lane_v, ring_u + at * ring_u_entry, ring_k + at * ring_k_entry,
                folded < flushed, weight, tl.where(begin == 0, kept, 1.0),
                K, V, EVEN, FOLD_PARTS, CHUNK_K, STAGES,
            )  # fmt: skip
            tl.debug_barrier()


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``columns`` of the state a program owns, read ``keys`` rows at a time.

    Warps are those for blocks of up to 8 tokens; longer ones get LONG_WARPS.
    """

    columns: int
    keys: int
    num_warps: int
    num_stages: int
    prepare_warps: int


# By backend and whether the rows alone fill the device.
TILES = {
    ("cuda", False): Tiles(32, 32, 4, 4, 4),
    ("cuda", True): Tiles(64, 32, 2, 3, 1),
    ("hip", False): Tiles(32, 32, 4, 1, 4),
    ("hip", True): Tiles(64, 32, 4, 1, 2),
}


def fits(ring_size: int) -> bool:
    return ring_size <= LONGEST_RING


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, chosen: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay``, not exact. lens: base, seq_lens, final_lens, slots."""
    q, k, v, g, beta = block
    ring_k, ring_u, ring_g = rings
    rows, tokens, heads, dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    backend = "cuda" if torch.version.hip is None else "hip"
    tiles = chosen or TILES[backend, rows * heads >= 256]
    block_v = columns(dim, tiles.columns)
    num_tiles = triton.cdiv(dim, block_v)
    key_dim, ring_size = k.shape[3], ring_k.shape[1]
    padded, records = 8 if tokens <= 8 else 16, columns(ring_size - tokens, LONGEST_RING)
    plan = ring_u.new_empty((rows, 3), dtype=torch.int32)
    xs = k.new_empty((rows, heads, 2 * padded, key_dim))
    matrices = ring_u.new_empty((rows, heads, 2 * padded, 4 * padded + records))
    weights = ring_u.new_empty((rows, heads, records + 1))
    lens = tuple(None if x is None else x.contiguous() for x in lens)
    shared = {
        "K": key_dim, "GROUP": heads // k.shape[2], "TOKENS": padded, "RECORDS": records,
         "SUMS": "ieee" if parts(k, ring_u) == 0 else "tf32x3", "num_stages": 1,
    }  # fmt: skip
    _prepare[(rows * heads,)](
        q, k, g, beta, ring_k, ring_g, *lens, plan, xs, matrices, weights, scale, tokens, ring_size, heads,
        *(stride for x in (q, k, g, beta, ring_k, ring_g) for stride in x.stride()[:3]),
        L2NORM=l2norm, FLUSH_EVERY=flush_every, DOTS=dots(k), BLOCK_K=columns(key_dim, 256),
        num_warps=tiles.prepare_warps if padded == 8 else LONG_WARPS, **shared,
    )  # fmt: skip
    _verify[(rows * heads * num_tiles,)](
        v, state, ring_k, ring_u, lens[3], plan, xs, matrices, weights, out,
        tokens, ring_size, heads, num_tiles,
        *(stride for x in (v, state, ring_k, ring_u) for stride in x.stride()[:3]),
        V=dim, PARTS=parts(k, state), FOLD_PARTS=parts(k, ring_u), CHUNK_K=tiles.keys, BLOCK_V=block_v,
        EVEN=key_dim % tiles.keys == 0 and dim % block_v == 0, STAGES=tiles.num_stages,
        num_warps=tiles.num_warps if padded == 8 else LONG_WARPS, **shared,
    )  # fmt: skip
    return out
