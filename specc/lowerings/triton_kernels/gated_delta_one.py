"""Gated DeltaNet from a checkpoint and a ring for blocks of one token: matrices times vectors.

What ``gated_delta_fast`` computes, by sums over the state as it lies in registers. Next to the plain
recurrence, which reads and writes the state, it reads the state and the records, and writes every so often.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.triton_kernels.gated_delta_rule import (
    columns,
    counts,
    inverse_norm,
    parts,
    product,
    slot_of,
)

# The longest rings whose records, but for the block's own, fit into registers: of 16 bits and of 32.
LONGEST_RING, LONGEST_WIDE_RING = 33, 17


@triton.jit
def _add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _replay(
    q, k, v, g, beta, state, ring_k, ring_u, ring_g, base, seq_lens, final_lens, slots, out, scale, heads,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, state_row, state_head,
    ring_k_row, ring_k_head, ring_u_row, ring_u_head, ring_g_row, ring_g_head,
    state_key: tl.constexpr, ring_k_entry: tl.constexpr, ring_u_entry: tl.constexpr,
    ring_g_entry: tl.constexpr, RING: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr,
    L2NORM: tl.constexpr, FLUSH_EVERY: tl.constexpr, RECORDS: tl.constexpr, FOLD_PARTS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """EVEN: tiles divide keys and values, so that nothing needs a mask for them."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    lane_k, lane_v = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = (lane_k < K) | EVEN, (lane_v < V) | EVEN
    inside = in_k[:, None] & in_v[None, :]
    out_at = out + (row * heads + head) * V + lane_v
    slot = slot_of(slots, row)
    start, pending, flushed, length = counts(base, seq_lens, final_lens, slot, row, RING, FLUSH_EVERY)
    if length < 0:
        tl.store(out_at, tl.zeros([BLOCK_V], out.dtype.element_ty), mask=in_v)
        return
    state += slot * state_row + head * state_head
    state_at = state + (lane_k * state_key)[:, None] + lane_v[None, :]
    s = tl.load(state_at, mask=inside, other=0.0)
    key = tl.load(k + row * k_row + key_head * k_head + lane_k, mask=in_k, other=0.0)
    query = tl.load(q + row * q_row + key_head * q_head + lane_k, mask=in_k, other=0.0).to(tl.float32)
    fresh = tl.load(g + row * g_row + head * g_head).to(tl.float32)
    rate = tl.load(beta + row * beta_row + head * beta_head).to(tl.float32)
    value = tl.load(v + row * v_row + head * v_head + lane_v, mask=in_v, other=0.0).to(tl.float32)
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head
    ring_g += slot * ring_g_row + head * ring_g_head
    age = tl.arange(0, RECORDS)
    there = age < pending
    entry = ((start + age) % RING).to(tl.int64)
    keys_at = ring_k + (entry * ring_k_entry)[:, None] + lane_k[None, :]
    keys = tl.load(keys_at, mask=there[:, None] & in_k[None, :], other=0.0)
    u_at = ring_u + (entry * ring_u_entry)[:, None] + lane_v[None, :]
    u = tl.load(u_at, mask=there[:, None] & in_v[None, :], other=0.0)
    decay = tl.load(ring_g + entry * ring_g_entry, mask=there, other=0.0)

    wide_key, wide = key.to(tl.float32), keys.to(tl.float32)
    key_norm = inverse_norm(tl.sum(wide_key * wide_key, 0), L2NORM)
    query_norm = inverse_norm(tl.sum(query * query, 0), L2NORM) * scale
    between = tl.sum(wide_key * query, 0) * key_norm * query_norm
    by_key, by_query, squares = tl.reduce(
        (wide * wide_key[None, :], wide * query[None, :], wide * wide), 1, _add_three
    )
    norm = inverse_norm(squares, L2NORM)
    since = tl.cumsum(decay, 0)
    total = tl.sum(decay, 0) + fresh
    weight = tl.exp(total - since) * norm
    wide_s = s.to(tl.float32)
    state_key_sums, state_query_sums = tl.reduce(
        (wide_s * wide_key[:, None], wide_s * query[:, None]), 0, _add_two
    )
    ring_key_sums, ring_query_sums = tl.reduce(
        (u * (by_key * weight)[:, None], u * (by_query * weight)[:, None]), 0, _add_two
    )
    grown = tl.exp(total)
    one = (value - (state_key_sums * grown + ring_key_sums) * key_norm) * rate
    o = (state_query_sums * grown + ring_query_sums) * query_norm + between * one
    tl.store(out_at, o.to(out.dtype.element_ty), mask=in_v)
    now = ((start + pending) % RING).to(tl.int64)
    tl.store(ring_u + now * ring_u_entry + lane_v, one, mask=in_v)
    if tile == 0:
        tl.store(ring_g + now * ring_g_entry, fresh)
        if head % GROUP == 0:
            tl.store(ring_k + now * ring_k_entry + lane_k, key, mask=in_k)
    if flushed > 0:
        folded = age < flushed
        kept = tl.sum(tl.where(folded, decay, 0.0), 0)
        weight = tl.where(folded, tl.exp(tl.minimum(kept - since, 0.0)) * norm, 0.0)
        # Read again: to keep it takes more registers than there are.
        tl.debug_barrier()
        old = tl.load(state_at, mask=inside, other=0.0).to(tl.float32) * tl.exp(kept)
        old = product(tl.trans(keys), u * weight[:, None], old, FOLD_PARTS).to(state.dtype.element_ty)
        tl.store(state_at, old, mask=inside)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``columns`` of the state a program owns."""

    columns: int
    num_warps: int


# By whether the rows alone fill the device.
TILES = {False: Tiles(32, 4), True: Tiles(64, 2)}
# For wide keys, float32, and longer rings.
WIDE = Tiles(32, 8)


def fits(k: Tensor, ring_size: int) -> bool:
    return ring_size <= (LONGEST_WIDE_RING if k.dtype == torch.float32 else LONGEST_RING)


def tiles_for(k: Tensor, heads: int, records: int) -> Tiles:
    if k.shape[3] > 128 or k.dtype == torch.float32 or records > 16:
        return WIDE
    return TILES[k.shape[0] * heads >= 256]


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, chosen: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay`` of one token, not exact. lens: base, seq_lens, final_lens, slots."""
    k, v = block[1:3]
    ring_k, ring_u, _ = rings
    rows, _, heads, dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    key_dim, ring_size = k.shape[3], ring_k.shape[1]
    records = columns(ring_size - 1, LONGEST_RING)
    tiles = chosen or tiles_for(k, heads, records)
    block_k, block_v = columns(key_dim, 256), columns(dim, tiles.columns)
    lens = tuple(None if x is None else x.contiguous() for x in lens)
    _replay[(triton.cdiv(dim, block_v), heads, rows)](
        *block, state, *rings, *lens, out, scale, heads,
        *(x.stride(i) for x in block for i in (0, 2)), *state.stride()[:2],
        *(x.stride(i) for x in rings for i in (0, 2)), state.stride(2), *(x.stride(1) for x in rings),
        RING=ring_size, K=key_dim, V=dim, GROUP=heads // k.shape[2], L2NORM=l2norm, FLUSH_EVERY=flush_every,
        RECORDS=records, FOLD_PARTS=parts(k, ring_u), EVEN=key_dim == block_k and dim % block_v == 0,
        BLOCK_K=block_k, BLOCK_V=block_v, num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    return out
