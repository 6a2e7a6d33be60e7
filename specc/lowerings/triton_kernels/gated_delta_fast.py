"""Gated DeltaNet from a checkpoint and a ring, in one pass over the state: the fast form of the replay.

With G the sum of g since base, ``S_t^T x = e^{G_t} S^T x + sum_i e^{G_t - G_i} (x . k_i) u_i``. All keys and
queries X of a block are multiplied with the checkpoint S at once; what the records add is a small product,
and what the block's tokens add to each other the inverse of a triangular system. A program owns some columns
of the state. It holds them in registers from its first instruction on, or streams them through shared memory;
where there is something to flush, it writes the new ones in the same pass.

Programs wait for memory and for themselves more than they compute, so what counts is what they load before
they wait, and how few instructions and registers they need: strides within a row and the ring's size are
constants, and loops stay loops.
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
    cut,
    inverse_norm,
    lossless_parts,
    product,
    slot_of,
    wide_product,
)

# The longest ring whose records' decays fit into one tile.
LONGEST_RING = 64
# Records taken at a time.
STEP = tl.constexpr(16)


@triton.jit
def _tokens(k_at, q_at, offset, inside, is_query, PICKED: tl.constexpr):
    """Keys and queries, row by row. PICKED: k_at has the pointers to both."""
    if PICKED:
        x = tl.load(k_at + offset, mask=inside, other=0.0)
    else:
        keys = tl.load(k_at + offset, mask=inside & ~is_query, other=0.0)
        x = tl.where(is_query, tl.load(q_at + offset, mask=inside & is_query, other=0.0), keys)
    return x


@triton.jit
def _records(
    ring_k, ring_u, ring_g, begin, count, start, lane_k, in_k, in_v,
    RING: tl.constexpr, ring_k_entry: tl.constexpr, ring_u_entry: tl.constexpr, ring_g_entry: tl.constexpr,
):  # fmt: skip
    """STEP records from ``begin`` on, zeros from ``count`` on: pointers to keys, which are there, keys, u
    and g.
    """
    age = begin + tl.arange(0, STEP)
    there = age < count
    entry = ((start + age) % RING).to(tl.int64)
    keys_at = ring_k + (entry * ring_k_entry)[:, None]
    keys = tl.load(keys_at + lane_k[None, :], mask=there[:, None] & in_k[None, :], other=0.0)
    u_at = ring_u + (entry * ring_u_entry)[:, None]
    u = tl.load(u_at, mask=there[:, None] & in_v[None, :], other=0.0)
    decay = tl.load(ring_g + entry * ring_g_entry, mask=there, other=0.0)
    return keys_at, there, keys, u, decay


@triton.jit
def _key_norms(keys, L2NORM: tl.constexpr):
    wide = keys.to(tl.float32)
    return inverse_norm(tl.sum(wide * wide, 1), L2NORM)


@triton.jit
def _add_records(sums, x, x_norm, total, there, keys, norm, u, since, SUMS: tl.constexpr):
    """``sums`` and what records add to it, ``since`` being the decay up to and with each."""
    scores = tl.dot(x, tl.trans(keys), input_precision="ieee") * x_norm[:, None] * norm[None, :]
    scores = scores * tl.exp(tl.minimum(total[:, None] - since[None, :], 0.0))
    return wide_product(tl.where(there[None, :], scores, 0.0), u, sums, SUMS)


@triton.jit
def _inverse(system, lane, other, tokens, TOKENS: tl.constexpr, SUMS: tl.constexpr):
    """``(1 - system)^-1``, system: [2 TOKENS, 2 TOKENS], what keys and queries take from earlier keys.

    That of 8 keys is nilpotent: (1 + N) (1 + N^2) (1 + N^4). More factors would lose digits.
    """
    solved = tl.where(lane[:, None] == other[None, :], 1.0, 0.0)
    if TOKENS == 8:
        zeros = tl.zeros_like(system)
        keys = tl.where((lane < TOKENS)[:, None], system, 0.0)
        two = wide_product(keys, keys, zeros, SUMS)
        four = wide_product(two, two, zeros, SUMS)
        solved += keys
        solved = wide_product(solved, two, solved, SUMS)
        solved = wide_product(four, solved, solved, SUMS)
        solved = wide_product(tl.where((lane >= TOKENS)[:, None], system, 0.0), solved, solved, SUMS)
    else:
        for done in range(tokens):
            one = tl.sum(tl.where((lane == done)[:, None], solved, 0.0), 0)
            factor = tl.sum(tl.where((other == done)[None, :], system, 0.0), 1)
            solved += factor[:, None] * one[None, :]
    return solved


@triton.jit
def _sweep(
    by_state, state, k_at, q_at, live, is_query, width, in_v,
    state_key: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """``by_state + X @ S``."""
    lane_c = tl.arange(0, CHUNK)
    for begin in tl.range(0, width, CHUNK, num_stages=STAGES):
        in_c = (begin + lane_c < K) | EVEN
        s_at = state + ((begin + lane_c) * state_key)[:, None]
        s = tl.load(s_at, mask=in_c[:, None] & in_v[None, :], other=0.0)
        inside = live[:, None] & in_c[None, :]
        part = _tokens(k_at, q_at, begin + lane_c[None, :], inside, is_query[:, None], PICKED)
        by_state = product(part, s.to(tl.float32), by_state, PARTS)
    return by_state


@triton.jit
def _sweep_and_fold(
    by_state, state, k_at, q_at, live, is_query, keys_at, gain, there, kept, width, in_v,
    state_key: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    FOLD_PARTS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """``by_state + X @ S``, and ``S <- kept S + keys^T gain`` in place."""
    lane_c = tl.arange(0, CHUNK)
    for begin in tl.range(0, width, CHUNK, num_stages=STAGES):
        in_c = (begin + lane_c < K) | EVEN
        inside_s = in_c[:, None] & in_v[None, :]
        s_at = state + ((begin + lane_c) * state_key)[:, None]
        s = tl.load(s_at, mask=inside_s, other=0.0).to(tl.float32)
        inside = live[:, None] & in_c[None, :]
        part = _tokens(k_at, q_at, begin + lane_c[None, :], inside, is_query[:, None], PICKED)
        some = keys_at + begin + lane_c[None, :]
        keys = tl.load(some, mask=there[:, None] & in_c[None, :], other=0.0)
        by_state = product(part, s, by_state, PARTS)
        s = product(tl.trans(keys), gain, s * kept, FOLD_PARTS).to(state.dtype.element_ty)
        tl.store(s_at, s, mask=inside_s)
    return by_state


@triton.jit
def _fold_more(
    state, ring_k, ring_u, ring_g, kept, flushed, seen, width, start, lane_k, in_k, in_v,
    state_key: tl.constexpr, RING: tl.constexpr, ring_k_entry: tl.constexpr, ring_u_entry: tl.constexpr,
    ring_g_entry: tl.constexpr, K: tl.constexpr, L2NORM: tl.constexpr, EVEN: tl.constexpr,
    PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``S <- S + sum_i weight_i k_i u_i^T``, in place, over the records to flush from STEP on."""
    lane_c = tl.arange(0, CHUNK)
    for begin in range(STEP, flushed, STEP):
        # All threads' stores, before any thread's loads.
        tl.debug_barrier()
        keys_at, there, keys, u, decay = _records(
            ring_k, ring_u, ring_g, begin, flushed, start, lane_k, in_k, in_v,
            RING, ring_k_entry, ring_u_entry, ring_g_entry,
        )  # fmt: skip
        weight = tl.exp(tl.minimum(kept - seen - tl.cumsum(decay, 0), 0.0)) * _key_norms(keys, L2NORM)
        seen += tl.sum(decay, 0)
        u = u * weight[:, None]
        for part in range(0, width, CHUNK):
            in_c = (part + lane_c < K) | EVEN
            inside = in_c[:, None] & in_v[None, :]
            at = state + ((part + lane_c) * state_key)[:, None]
            s = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            some_at = keys_at + part + lane_c[None, :]
            some = tl.load(some_at, mask=there[:, None] & in_c[None, :], other=0.0)
            tl.store(at, product(tl.trans(some), u, s, PARTS).to(state.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "width"])
def _replay(
    q, k, v, g, beta, state, ring_k, ring_u, ring_g, base, seq_lens, final_lens, slots, out,
    scale, tokens, width, heads,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, state_row, state_head,
    ring_k_row, ring_k_head, ring_u_row, ring_u_head, ring_g_row, ring_g_head,
    q_token: tl.constexpr, k_token: tl.constexpr, v_token: tl.constexpr, g_token: tl.constexpr,
    beta_token: tl.constexpr, state_key: tl.constexpr, ring_k_entry: tl.constexpr,
    ring_u_entry: tl.constexpr, ring_g_entry: tl.constexpr,
    RING: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr,
    FLUSH_EVERY: tl.constexpr, TOKENS: tl.constexpr, RECORDS: tl.constexpr,
    PARTS: tl.constexpr, FOLD_PARTS: tl.constexpr, SUMS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, FOLD_CHUNK: tl.constexpr,
    STAGES: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Rows of a tile: TOKENS keys, then TOKENS queries. ``width`` is K: a bound that is known is unrolled.

    EVEN: tiles divide keys and values, so that nothing needs a mask for them. PICKED: as for ``_tokens``,
    which AMD's compiler does not take. CHUNK: rows of the state taken at a time; BLOCK_K: it is held.
    """
    held: tl.constexpr = CHUNK == BLOCK_K
    # Wider products are the fewer registers the shorter they are.
    at_once: tl.constexpr = held or PARTS > 0
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    lane = tl.arange(0, 2 * TOKENS)
    other = tl.arange(0, 2 * TOKENS)
    token = lane % TOKENS
    is_query = lane >= TOKENS
    live = token < tokens
    written = live & (lane < TOKENS)
    new = (other < TOKENS) & (other < tokens)
    lane_k, lane_v = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = (lane_k < K) | EVEN, (lane_v < V) | EVEN
    slot = slot_of(slots, row)
    # Loads that need no lengths come before those of lengths; a dead row's are in bounds, and for nothing.
    state += tl.maximum(slot, 0) * state_row + head * state_head + lane_v[None, :]
    state_at = state + (lane_k * state_key)[:, None]
    inside_s = in_k[:, None] & in_v[None, :]
    if held:
        s = tl.load(state_at, mask=inside_s, other=0.0)
    k_at = k + row * k_row + key_head * k_head + (token * k_token)[:, None]
    q_at = q + row * q_row + key_head * q_head + (token * q_token)[:, None]
    if PICKED:
        k_at = tl.where(is_query[:, None], q_at, k_at)
    inside_x = live[:, None] & in_k[None, :]
    if at_once:
        x = _tokens(k_at, q_at, lane_k[None, :], inside_x, is_query[:, None], PICKED)
    fresh = tl.load(g + row * g_row + head * g_head + other * g_token, mask=new, other=0.0).to(tl.float32)
    rate_at = beta + row * beta_row + head * beta_head + token * beta_token
    rate = tl.load(rate_at, mask=written, other=0.0).to(tl.float32)
    rate = tl.where(is_query, 1.0, -rate)
    values_at = v + row * v_row + head * v_head + (token * v_token)[:, None] + lane_v[None, :]
    inside_v = written[:, None] & in_v[None, :]
    if held:
        values = tl.load(values_at, mask=inside_v, other=0.0)
    out_at = out + (row * tokens * heads + head) * V + (token * heads * V)[:, None] + lane_v[None, :]
    out_live = (is_query & live)[:, None] & in_v[None, :]
    start, pending, flushed, length = counts(base, seq_lens, final_lens, slot, row, RING, FLUSH_EVERY)
    if length < 0:
        tl.store(out_at, tl.zeros([2 * TOKENS, BLOCK_V], out.dtype.element_ty), mask=out_live)
        return
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head + lane_v[None, :]
    ring_g += slot * ring_g_row + head * ring_g_head
    entry = ((start + tl.arange(0, RECORDS)) % RING).to(tl.int64)
    decay = tl.load(ring_g + entry * ring_g_entry, mask=tl.arange(0, RECORDS) < pending, other=0.0)
    if PICKED:
        first_at, there, keys, u, lost = _records(
            ring_k, ring_u, ring_g, 0, pending, start, lane_k, in_k, in_v,
            RING, ring_k_entry, ring_u_entry, ring_g_entry,
        )  # fmt: skip
    by_state = tl.zeros([2 * TOKENS, BLOCK_V], tl.float32)

    if at_once:
        squares = tl.dot(x, tl.trans(x), input_precision="ieee")
    else:
        squares = tl.zeros([2 * TOKENS, 2 * TOKENS], tl.float32)
        lane_c = tl.arange(0, CHUNK)
        for begin in range(0, width, CHUNK):
            inside = live[:, None] & ((begin + lane_c < K) | EVEN)[None, :]
            part = _tokens(k_at, q_at, begin + lane_c[None, :], inside, is_query[:, None], PICKED)
            squares = tl.dot(part, tl.trans(part), squares, input_precision="ieee")
    diagonal = tl.where(lane[:, None] == other[None, :], squares, 0.0)
    x_norm = inverse_norm(tl.sum(diagonal, 1), L2NORM) * tl.where(is_query, scale, 1.0)
    passed = tl.sum(tl.where(other[None, :] <= token[:, None], fresh[None, :], 0.0), 1)
    system = squares * (x_norm * rate)[:, None] * inverse_norm(tl.sum(diagonal, 0), L2NORM)[None, :]
    system = system * tl.exp(tl.minimum(passed[:, None] - tl.cumsum(fresh, 0)[None, :], 0.0))
    earlier = other[None, :] < (token + is_query.to(tl.int32))[:, None]
    solved = _inverse(tl.where(earlier & new[None, :], system, 0.0), lane, other, tokens, TOKENS, SUMS)
    if held:
        by_state = product(x, s.to(tl.float32), by_state, PARTS)
    else:
        # Still near, and not to be kept in registers.
        x = _tokens(k_at, q_at, lane_k[None, :], inside_x, is_query[:, None], PICKED)
        values = tl.load(values_at, mask=inside_v, other=0.0)

    if not PICKED:
        first_at, there, keys, u, lost = _records(
            ring_k, ring_u, ring_g, 0, pending, start, lane_k, in_k, in_v,
            RING, ring_k_entry, ring_u_entry, ring_g_entry,
        )  # fmt: skip
    total = passed + tl.sum(decay, 0)
    norm, since = _key_norms(keys, L2NORM), tl.cumsum(lost, 0)
    sums = _add_records(-values.to(tl.float32), x, x_norm, total, there, keys, norm, u, since, SUMS)
    first_lost = tl.sum(lost, 0)
    seen = first_lost
    for begin in range(STEP, pending, STEP):
        _, there, some, more, lost = _records(
            ring_k, ring_u, ring_g, begin, pending, start, lane_k, in_k, in_v,
            RING, ring_k_entry, ring_u_entry, ring_g_entry,
        )  # fmt: skip
        if not held:
            x = _tokens(k_at, q_at, lane_k[None, :], inside_x, is_query[:, None], PICKED)
        ages = seen + tl.cumsum(lost, 0)
        sums = _add_records(sums, x, x_norm, total, there, some, _key_norms(some, L2NORM), more, ages, SUMS)
        seen += tl.sum(lost, 0)

    if flushed > 0:
        kept = tl.sum(tl.where(tl.arange(0, RECORDS) < flushed, decay, 0.0), 0)
        folded = tl.arange(0, STEP) < flushed
        weight = tl.where(folded, tl.exp(tl.minimum(kept - since, 0.0)) * norm, 0.0)
        if held:
            wide = s.to(tl.float32) * tl.exp(kept)
            wide = product(tl.trans(keys), u * weight[:, None], wide, FOLD_PARTS)
            tl.store(state_at, wide.to(state.dtype.element_ty), mask=inside_s)
        else:
            u_entry = ((start + tl.arange(0, STEP)) % RING).to(tl.int64)
            u_at = ring_u + (u_entry * ring_u_entry)[:, None]
            u = tl.load(u_at, mask=folded[:, None] & in_v[None, :], other=0.0)
            by_state = _sweep_and_fold(
                by_state, state, k_at, q_at, live, is_query, first_at, u * weight[:, None], folded,
                tl.exp(kept), width, in_v,
                state_key, K, EVEN, PARTS, FOLD_PARTS, FOLD_CHUNK, STAGES, PICKED,
            )  # fmt: skip
        _fold_more(
            state, ring_k, ring_u, ring_g, kept, flushed, first_lost, width, start, lane_k, in_k, in_v,
            state_key, RING, ring_k_entry, ring_u_entry, ring_g_entry, K, L2NORM, EVEN, FOLD_PARTS,
            FOLD_CHUNK,
        )  # fmt: skip
    elif not held:
        by_state = _sweep(
            by_state, state, k_at, q_at, live, is_query, width, in_v,
            state_key, K, EVEN, PARTS, CHUNK, STAGES, PICKED,
        )  # fmt: skip

    sums = (sums + by_state * (x_norm * tl.exp(total))[:, None]) * rate[:, None]
    result = wide_product(solved, sums, tl.zeros_like(sums), SUMS)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=out_live)
    now = ((start + pending + token) % RING).to(tl.int64)
    tl.store(ring_u + (now * ring_u_entry)[:, None], result, mask=inside_v)
    if tile == 0:
        g_entry = ((start + pending + other) % RING).to(tl.int64)
        tl.store(ring_g + g_entry * ring_g_entry, fresh, mask=new)
        if head % GROUP == 0:
            new_keys = written[:, None] & in_k[None, :]
            if not held:
                x = tl.load(k_at + lane_k[None, :], mask=new_keys, other=0.0)
            tl.store(ring_k + (now * ring_k_entry)[:, None] + lane_k[None, :], x, mask=new_keys)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``columns`` of the state a program owns, and how many of its rows come at a time: ``keys``, or
    ``folded`` where they are written too.
    """

    columns: int
    keys: int
    folded: int
    num_warps: int
    num_stages: int


# By backend and whether the rows alone fill the device.
TILES = {
    ("cuda", False): Tiles(32, 128, 128, 4, 1),
    ("cuda", True): Tiles(128, 32, 16, 2, 3),
    ("hip", False): Tiles(32, 32, 32, 4, 1),
    ("hip", True): Tiles(64, 32, 32, 4, 1),
}
# For more than 8 tokens, for wide keys, and for products without units of their own.
WIDE = Tiles(32, 32, 32, 8, 3)


def fits(ring_size: int) -> bool:
    return ring_size <= LONGEST_RING


def tiles_for(k: Tensor, heads: int) -> Tiles:
    rows, tokens, _, key_dim = k.shape
    if tokens > 8 or key_dim > 128 or k.dtype == torch.float32:
        return WIDE
    return TILES["cuda" if torch.version.hip is None else "hip", rows * heads >= 256]


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, chosen: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay``, not exact. lens: base, seq_lens, final_lens, slots."""
    k, v = block[1:3]
    ring_k, ring_u, _ = rings
    rows, tokens, heads, dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tiles = chosen or tiles_for(k, heads)
    key_dim, ring_size = k.shape[3], ring_k.shape[1]
    block_k, block_v = columns(key_dim, 256), columns(dim, tiles.columns)
    lens = tuple(None if x is None else x.contiguous() for x in lens)
    _replay[(triton.cdiv(dim, block_v), heads, rows)](
        *block, state, *rings, *lens, out, scale, tokens, key_dim, heads,
        *(x.stride(i) for x in block for i in (0, 2)), *state.stride()[:2],
        *(x.stride(i) for x in rings for i in (0, 2)),
        *(x.stride(1) for x in block), state.stride(2), *(x.stride(1) for x in rings),
        RING=ring_size, K=key_dim, V=dim, GROUP=heads // k.shape[2], L2NORM=l2norm, FLUSH_EVERY=flush_every,
        TOKENS=8 if tokens <= 8 else 16, RECORDS=columns(ring_size - tokens, LONGEST_RING),
        PARTS=cut(k, state), FOLD_PARTS=lossless_parts(k, ring_u), SUMS=cut(k, ring_u),
        EVEN=key_dim == block_k and dim % block_v == 0, BLOCK_K=block_k, BLOCK_V=block_v,
        CHUNK=min(tiles.keys, block_k), FOLD_CHUNK=min(tiles.folded, block_k), STAGES=tiles.num_stages,
        PICKED=torch.version.hip is None,
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
    return out
