"""The fast replay of ``gated_delta_fast`` for short blocks, for Nvidia's GPUs (Gluon).

What limits the form in Triton is not memory, but the way of a state from there to the products: through
shared memory and its bank conflicts, and through conversions. Here it is transposed, S^T: [V, K], and held as
the accumulators of products (``gluon_accumulators``). A thread copies just what it will hold; a product takes
it as its first operand, and a fold adds to it where it is.

Sums are transposed as well: [V, 16], columns 0 ... 7 for the block's keys and 8 ... 15 for its queries.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from specc.lowerings.triton_kernels.gluon_accumulators import (
    accumulator,
    add_product_of_thirds,
    add_wide_product,
    high,
    in_memory,
    operand,
    thirds,
    to_accumulator,
    to_memory,
    wide_first,
    wide_second,
)
from specc.lowerings.triton_kernels.gluon_names import async_load, barrier, reinterpret

# Tokens of a block that tiles have room for, and records: two tiles of 16, of which one may be folded.
TOKENS, RECORDS, FLUSH_EVERY = 8, 32, 16
KEY_DIM = 128
# What 32 bits reach.
FAR = 2**31


@gluon.constexpr_function
def _rows_of_keys(chunk, warps):
    """[K // chunk * 16, chunk]: 16 rows of keys for each chunk of their elements."""
    return gl.BlockedLayout([1, 8], [256 // chunk, chunk // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def _shared_keys(chunk):
    return gl.SwizzledSharedLayout(8, max(1, 64 // chunk), min(8, chunk // 8), [1, 0])


@gluon.constexpr_function
def _vector(warps):
    """32 elements, in each warp anew."""
    lanes = [[1 << bit] for bit in range(5)]
    return gl.DistributedLinearLayout([], lanes, [[0]] * (warps.bit_length() - 1), [], [32])


@gluon.constexpr_function
def _whole_rows(columns, warps):
    return gl.BlockedLayout([max(1, columns // warps // 32), 16], [32, 1], [warps, 1], [1, 0])


@gluon.jit
def _inverse_norm(squares, L2NORM: gl.constexpr):
    return gl.rsqrt(squares + 1e-6) if L2NORM else gl.zeros_like(squares) + 1.0


@gluon.jit
def _entry(age, RING: gl.constexpr):
    """``age % RING`` of an age below 2 RING; beyond it nothing is read."""
    return gl.where(age >= RING, age - RING, age)


@gluon.jit
def _records(
    ring_k, ring_u, ring_g, begin, pending, start, lane_v, column, row, key_row, key_at,
    RING: gl.constexpr, ring_k_entry: gl.constexpr, ring_u_entry: gl.constexpr, ring_g_entry: gl.constexpr,
):  # fmt: skip
    """16 records from ``begin`` on, zeros behind the last: keys by chunks, u^T and g."""
    age = begin + key_row % 16
    keys_at = ring_k + (_entry(start + age, RING) * ring_k_entry)[:, None] + key_at
    keys = gl.load(keys_at, mask=(age < pending)[:, None], other=0.0)
    age = begin + column
    u_at = ring_u + lane_v[:, None] + (_entry(start + age, RING) * ring_u_entry)[None, :]
    u = gl.load(u_at, mask=(age < pending)[None, :], other=0.0)
    age = begin + row
    lost = gl.load(ring_g + _entry(start + age, RING) * ring_g_entry, mask=age < pending, other=0.0)
    return keys, u, lost


@gluon.jit
def _squares(x_shared, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """``x x^T``."""
    squares = gl.zeros([16, 16], gl.float32, accumulator(WARPS))
    for i in gl.static_range(CHUNKS):
        x = x_shared.index(i).permute((1, 0)).load(operand(1, 16, WARPS))
        squares = mma_v2(x_shared.index(i).load(operand(0, 16, WARPS)), x, squares)
    return squares


@gluon.jit
def _scores(x_shared, keys_shared, CHUNKS: gl.constexpr, WARPS: gl.constexpr):
    """``x keys^T`` and ``keys keys^T``."""
    scores = gl.zeros([16, 16], gl.float32, accumulator(WARPS))
    squares = gl.zeros([16, 16], gl.float32, accumulator(WARPS))
    for i in gl.static_range(CHUNKS):
        keys = keys_shared.index(i).permute((1, 0)).load(operand(1, 16, WARPS))
        scores = mma_v2(x_shared.index(i).load(operand(0, 16, WARPS)), keys, scores)
        squares = mma_v2(keys_shared.index(i).load(operand(0, 16, WARPS)), keys, squares)
    return scores, squares


@gluon.jit
def _norms(squares, WARPS: gl.constexpr, L2NORM: gl.constexpr):
    """Inverse norms, by columns, of what has these products with itself."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, accumulator(WARPS)))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, accumulator(WARPS)))
    return _inverse_norm(gl.sum(gl.where(row[:, None] == column[None, :], squares, 0.0), 0), L2NORM)


@gluon.jit
def _system(
    x_shared, fresh_row, fresh_column, rate_row, column_new, scale,
    CHUNKS: gl.constexpr, WARPS: gl.constexpr, L2NORM: gl.constexpr,
):  # fmt: skip
    """What keys and queries take from earlier keys of the block; their inverse norms by rows, queries'
    scaled, and by columns; the decay up to and with each, by rows and by columns.
    """
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, accumulator(WARPS)))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, accumulator(WARPS)))
    squares = _squares(x_shared, CHUNKS, WARPS)
    diagonal = gl.where(row[:, None] == column[None, :], squares, 0.0)
    norm_row = _inverse_norm(gl.sum(diagonal, 1), L2NORM)
    norm_column = _inverse_norm(gl.sum(diagonal, 0), L2NORM)
    x_norm = gl.where(row >= 8, norm_row * scale, norm_row)
    passed_row = gl.sum(gl.where(column[None, :] <= (row % 8)[:, None], fresh_column[None, :], 0.0), 1)
    passed_column = gl.sum(gl.where(row[:, None] <= (column % 8)[None, :], fresh_row[:, None], 0.0), 0)
    system = squares * (x_norm * rate_row)[:, None] * norm_column[None, :]
    system = system * gl.exp(gl.minimum(passed_row[:, None] - passed_column[None, :], 0.0))
    earlier = (column[None, :] < (row % 8 + (row >= 8).to(gl.int32))[:, None]) & column_new[None, :]
    return gl.where(earlier, system, 0.0), x_norm, norm_column, passed_row, passed_column


@gluon.jit
def _solve(sums, system_shared, LAYOUT: gl.constexpr):
    """Token by token, what each adds to the later ones. A row is one thread's."""
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))
    for i in gl.static_range(8):
        one = gl.sum(gl.where(column[None, :] == i, sums, -0.0), 1)
        later = ((column > i) & (column < 8)) | (column >= 8 + i)
        added = sums + one[:, None] * system_shared.slice(i, 1).load(LAYOUT)
        sums = gl.where(later[None, :], added, sums)
    return sums


@gluon.jit
def _since(lost, WARPS: gl.constexpr):
    """The decay up to and with each of 16 records, by columns; lost: by rows."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, accumulator(WARPS)))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, accumulator(WARPS)))
    return gl.sum(gl.where(row[:, None] <= column[None, :], lost[:, None], 0.0), 0)


@gluon.jit
def _add_records(sums, u, scores, x_norm, total, key_norm, since, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """``sums`` and what records add to it, ``since`` being the decay up to and with each."""
    scores = scores * x_norm[:, None] * key_norm[None, :]
    scores = scores * gl.exp(gl.minimum(total[:, None] - since[None, :], 0.0))
    return add_wide_product(sums, to_accumulator(u, COLUMNS, 16, WARPS), scores, COLUMNS, WARPS)


@gluon.jit
def _sweep(
    by_state, state_at, s_shared, x_shared, keys_shared, gain_1, gain_2, gain_3, kept, chunks, mask,
    FOLD: gl.constexpr, state_key: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr,
    CHUNK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """``by_state + S^T X^T`` over all chunks, STAGES of which are on their way; and, if FOLD,
    ``S^T <- kept S^T + gain^T keys`` in place.
    """
    MEMORY: gl.constexpr = in_memory(COLUMNS, CHUNK, WARPS)
    stage = 0
    for i in range(chunks):
        async_copy.wait_group(STAGES - 1)
        s = s_shared.index(stage).load(MEMORY)
        more = gl.full([COLUMNS, CHUNK], i + STAGES < chunks, gl.int1, MEMORY)
        ahead = state_at + STAGES * CHUNK * state_key
        async_load(s_shared.index(stage), ahead, mask=more)
        async_copy.commit_group()
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)

        s = to_accumulator(s, COLUMNS, CHUNK, WARPS)
        x = x_shared.index(i).permute((1, 0)).load(operand(1, 16, WARPS))
        x = wide_second(x.to(gl.float32), CHUNK, 16, WARPS)
        y = wide_first(s, COLUMNS, CHUNK, WARPS)
        upper = high(y, mask)
        by_state = mma_v2(y - upper, x, by_state, input_precision="tf32")
        by_state = mma_v2(upper, x, by_state, input_precision="tf32")
        if FOLD:
            keys = keys_shared.index(i).load(operand(1, 16, WARPS))
            s = add_product_of_thirds(s * kept, gain_1, gain_2, gain_3, keys)
            gl.store(state_at, to_memory(s, COLUMNS, CHUNK, WARPS))
        state_at += CHUNK * state_key
    # Copies that bring nothing write zeros, and what comes next may lie where they do.
    async_copy.wait_group(0)
    barrier()
    return by_state


@gluon.jit(do_not_specialize=["tokens", "chunks", "mask"])
def _replay(
    q, k, v, g, beta, state, ring_k, ring_u, ring_g, base, seq_lens, final_lens, slots, out,
    scale, tokens, chunks, mask, heads,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, state_row, state_head,
    ring_k_row, ring_k_head, ring_u_row, ring_u_head, ring_g_row, ring_g_head,
    q_token: gl.constexpr, k_token: gl.constexpr, v_token: gl.constexpr, g_token: gl.constexpr,
    beta_token: gl.constexpr, state_key: gl.constexpr, ring_k_entry: gl.constexpr,
    ring_u_entry: gl.constexpr, ring_g_entry: gl.constexpr,
    RING: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GROUP: gl.constexpr, L2NORM: gl.constexpr,
    FLUSH_EVERY: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr, CHUNK: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """``chunks`` is K // CHUNK: a bound that is known is unrolled. ``mask`` is -8192: one that ptxas knows it
    drops before a product of tf32, and moves registers instead.
    """
    ACC: gl.constexpr = accumulator(WARPS)
    MEMORY: gl.constexpr = in_memory(COLUMNS, CHUNK, WARPS)
    SUMS: gl.constexpr = in_memory(COLUMNS, 16, WARPS)
    KEYS: gl.constexpr = _rows_of_keys(CHUNK, WARPS)
    KEYS_SHARED: gl.constexpr = _shared_keys(CHUNK)
    WHOLE: gl.constexpr = _whole_rows(COLUMNS, WARPS)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [0, 1])
    CHUNKS: gl.constexpr = K // CHUNK
    tile, head, row = gl.program_id(0), gl.program_id(1), gl.program_id(2).to(gl.int64)
    key_head = head // GROUP
    slot = row
    if slots is not None:
        slot = gl.load(slots + row).to(gl.int64)
    there = gl.maximum(slot, 0)

    # The state's first chunks, for which nothing but the slot is needed; a dead row's are for nothing.
    state_lane = tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, MEMORY))
    state_column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, MEMORY))
    state_at = state + there * state_row + head * state_head
    state_at = state_at + (state_lane[:, None] + state_column[None, :] * state_key)
    s_shared = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS, CHUNK], SHARED)
    for i in gl.static_range(STAGES):
        async_load(s_shared.index(i), state_at + i * CHUNK * state_key)
        async_copy.commit_group()
    length = gl.load(seq_lens + row).to(gl.int64)
    first = gl.load(base + there).to(gl.int64)
    final = gl.load(final_lens + row).to(gl.int64)

    # Keys, then queries, chunk after chunk.
    key_row = gl.arange(0, CHUNKS * 16, layout=gl.SliceLayout(1, KEYS))
    key_column = gl.arange(0, CHUNK, layout=gl.SliceLayout(0, KEYS))
    key_at = (key_row // 16 * CHUNK)[:, None] + key_column[None, :]
    key_token = key_row % 8
    k_at = k + row * k_row + key_head * k_head + (key_token * k_token)[:, None]
    q_at = q + row * q_row + key_head * q_head + (key_token * q_token)[:, None]
    x_at = gl.where((key_row % 16 >= 8)[:, None], q_at, k_at) + key_at
    x = gl.load(x_at, mask=(key_token < tokens)[:, None], other=0.0)
    i_row = gl.arange(0, 16, layout=gl.SliceLayout(1, ACC))
    i_column = gl.arange(0, 16, layout=gl.SliceLayout(0, ACC))
    row_token, row_query = i_row % 8, i_row >= 8
    column_token, column_query = i_column % 8, i_column >= 8
    row_new, column_new = (i_row < 8) & (i_row < tokens), (i_column < 8) & (i_column < tokens)
    lane_v = tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, SUMS))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, SUMS))
    column_live = column % 8 < tokens
    values_at = v + row * v_row + head * v_head + (lane_v[:, None] + (column % 8 * v_token)[None, :])
    g_at = g + row * g_row + head * g_head
    fresh_row = gl.load(g_at + i_row * g_token, mask=row_new, other=0.0).to(gl.float32)
    fresh_column = gl.load(g_at + i_column * g_token, mask=column_new, other=0.0).to(gl.float32)
    beta_at = beta + row * beta_row + head * beta_head
    rate_row = gl.load(beta_at + row_token * beta_token, mask=row_new, other=0.0).to(gl.float32)
    rate_column = gl.load(beta_at + column_token * beta_token, mask=column_new, other=0.0).to(gl.float32)
    values = gl.load(values_at, mask=((column < 8) & column_live)[None, :], other=0.0)
    # Otherwise the assembler puts loads off to where they are used, the state's behind all others.
    barrier()

    pending = gl.minimum(gl.maximum(length - first, 0), RING).to(gl.int32)
    flushed = gl.minimum(gl.maximum(final - first, 0), pending).to(gl.int32) // FLUSH_EVERY * FLUSH_EVERY
    start = (first % RING).to(gl.int32)
    if (slot < 0) | (length < 0):
        out_at = (
            out + (row * tokens * heads + head) * V + (lane_v[:, None] + (column % 8 * (heads * V))[None, :])
        )
        nothing = gl.zeros([COLUMNS, 16], out.dtype.element_ty, SUMS)
        gl.store(out_at, nothing, mask=((column >= 8) & column_live)[None, :])
        async_copy.wait_group(0)
        return
    ring_k += slot * ring_k_row + key_head * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head
    ring_g += slot * ring_g_row + head * ring_g_head
    keys, u, lost = _records(
        ring_k, ring_u, ring_g, 0, pending, start, lane_v, column, i_row, key_row, key_at,
        RING, ring_k_entry, ring_u_entry, ring_g_entry,
    )  # fmt: skip
    age = gl.arange(0, 32, layout=_vector(WARPS))
    decay = gl.load(ring_g + _entry(start + age, RING) * ring_g_entry, mask=age < pending, other=0.0)
    barrier()

    # What needs no records.
    x_shared = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, 16, CHUNK], KEYS_SHARED)
    x_whole = reinterpret(x_shared, [CHUNKS * 16, CHUNK])
    x_whole.store(x)
    rate_row = gl.where(row_query, 1.0, -rate_row)
    rate_column = gl.where(column_query, 1.0, -rate_column)
    system, x_norm, norm_column, passed_row, passed_column = _system(
        x_shared, fresh_row, fresh_column, rate_row, column_new, scale, CHUNKS, WARPS, L2NORM
    )
    # [earlier token, token], one half of which is zeros.
    system_shared = gl.allocate_shared_memory(gl.float32, [16, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    system_shared.store(gl.permute(system, (1, 0)))

    # What records add.
    total_row = passed_row + gl.sum(decay, 0)
    total_column = passed_column + gl.sum(decay, 0)
    keys_shared = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, 16, CHUNK], KEYS_SHARED)
    reinterpret(keys_shared, [CHUNKS * 16, CHUNK]).store(keys)
    scores, squares = _scores(x_shared, keys_shared, CHUNKS, WARPS)
    key_norm = _norms(squares, WARPS, L2NORM)
    since = _since(lost, WARPS)
    sums = to_accumulator(-values.to(gl.float32), COLUMNS, 16, WARPS)
    sums = _add_records(sums, u, scores, x_norm, total_row, key_norm, since, COLUMNS, WARPS)
    seen = gl.sum(lost, 0)
    for begin in range(16, pending, 16):
        some, more, lost = _records(
            ring_k, ring_u, ring_g, begin, pending, start, lane_v, column, i_row, key_row, key_at,
            RING, ring_k_entry, ring_u_entry, ring_g_entry,
        )  # fmt: skip
        some_shared = gl.allocate_shared_memory(gl.bfloat16, [CHUNKS, 16, CHUNK], KEYS_SHARED)
        reinterpret(some_shared, [CHUNKS * 16, CHUNK]).store(some)
        scores, squares = _scores(x_shared, some_shared, CHUNKS, WARPS)
        ages = seen + _since(lost, WARPS)
        sums = _add_records(
            sums, more, scores, x_norm, total_row, _norms(squares, WARPS, L2NORM), ages, COLUMNS, WARPS,
        )  # fmt: skip
        seen += gl.sum(lost, 0)
    # Parked where they cost no registers.
    sums_shared = gl.allocate_shared_memory(gl.float32, [COLUMNS, 16], SHARED)
    sums_shared.store(to_memory(sums * rate_column[None, :], COLUMNS, 16, WARPS))
    factor = gl.where(column_query, norm_column * scale, norm_column) * gl.exp(total_column) * rate_column

    by_state = gl.zeros([COLUMNS, 16], gl.float32, ACC)
    if flushed > 0:
        kept = gl.sum(gl.where(age < flushed, decay, 0.0), 0)
        weight = gl.where(i_column < flushed, gl.exp(gl.minimum(kept - since, 0.0)) * key_norm, 0.0)
        # Still near, and not to be kept in registers.
        u_at = ring_u + lane_v[:, None] + (_entry(start + column, RING) * ring_u_entry)[None, :]
        u = gl.load(u_at, mask=(column < flushed)[None, :], other=0.0)
        gain_1, gain_2, gain_3 = thirds(to_accumulator(u, COLUMNS, 16, WARPS) * weight[None, :], WARPS)
        by_state = _sweep(
            by_state, state_at, s_shared, x_shared, keys_shared, gain_1, gain_2, gain_3, gl.exp(kept), chunks,
            mask, True, state_key, COLUMNS, WARPS, CHUNK, STAGES,
        )  # fmt: skip
    else:
        by_state = _sweep(
            by_state, state_at, s_shared, x_shared, keys_shared, 0, 0, 0, 0, chunks,
            mask, False, state_key, COLUMNS, WARPS, CHUNK, STAGES,
        )  # fmt: skip
    sums = by_state * factor[None, :] + to_accumulator(sums_shared.load(SUMS), COLUMNS, 16, WARPS)

    result = _solve(gl.convert_layout(to_memory(sums, COLUMNS, 16, WARPS), WHOLE), system_shared, WHOLE)
    lane_v = tile * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, WHOLE))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, WHOLE))
    token = column % 8
    out_at = out + (row * tokens * heads + head) * V + (lane_v[:, None] + (token * (heads * V))[None, :])
    gl.store(out_at, result.to(out.dtype.element_ty), mask=((column >= 8) & (token < tokens))[None, :])
    end = _entry(start + pending, RING)
    u_at = ring_u + (lane_v[:, None] + (_entry(end + token, RING) * ring_u_entry)[None, :])
    gl.store(u_at, result, mask=((column < 8) & (token < tokens))[None, :])
    if tile == 0:
        new = (age < 8) & (age < tokens)
        fresh = gl.load(g_at + age * g_token, mask=new, other=0.0).to(gl.float32)
        gl.store(ring_g + _entry(end + age, RING) * ring_g_entry, fresh, mask=new)
        if head % GROUP == 0:
            new_at = ring_k + (_entry(end + key_token, RING) * ring_k_entry)[:, None] + key_at
            gl.store(new_at, x_whole.load(KEYS), mask=((key_token < tokens) & (key_row % 16 < 8))[:, None])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """``columns`` of the state a program owns, 32 or more a warp, and how many keys come at a time."""

    columns: int
    keys: int
    num_warps: int
    num_stages: int


# By whether programs of 128 columns are enough for the device.
TILES = {False: Tiles(32, 16, 1, 4), True: Tiles(128, 16, 2, 2)}
WIDEST = TILES[True].columns


@functools.cache
def _has_units(index: int) -> bool:
    """Products of bfloat16 and of tf32, and asynchronous copies."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def fits(block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], flush_every: int) -> bool:
    """Whether ``replay`` takes these."""
    k, v = block[1:3]
    tokens, dim = v.shape[1], v.shape[3]
    ring_size = rings[0].shape[1]
    return (
        (k.is_cuda and _has_units(k.device.index))
        and (k.dtype == torch.bfloat16 and state.dtype == torch.float32)
        and (tokens <= TOKENS and ring_size - tokens < RECORDS and flush_every == FLUSH_EVERY)
        and (k.shape[3] == KEY_DIM and dim % WIDEST == 0)
        and (state.data_ptr() % 16 == 0 and not any(stride % 16 for stride in state.stride()[:3]))
        and all(_is_near(each) for each in (*block, state, *rings))
    )


def _is_near(x: Tensor) -> bool:
    """Whether 32 bits reach everything within a row."""
    return all(map(FAR.__gt__, map(operator.mul, x.shape[1:], x.stride()[1:])))


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, chosen: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay``, not exact. lens: base, seq_lens, final_lens, slots."""
    k, v = block[1:3]
    rows, tokens, heads, dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    tiles = chosen or TILES[rows * heads * dim >= 128 * WIDEST]
    lens = tuple(None if x is None else x.contiguous() for x in lens)
    _replay[(dim // tiles.columns, heads, rows)](
        *block, state, *rings, *lens, out, scale, tokens, KEY_DIM // tiles.keys, -8192, heads,
        *(x.stride(i) for x in block for i in (0, 2)), *state.stride()[:2],
        *(x.stride(i) for x in rings for i in (0, 2)),
        *(x.stride(1) for x in block), state.stride(2), *(x.stride(1) for x in rings),
        RING=rings[0].shape[1], K=KEY_DIM, V=dim, GROUP=heads // k.shape[2], L2NORM=l2norm,
        FLUSH_EVERY=flush_every, COLUMNS=tiles.columns, WARPS=tiles.num_warps, CHUNK=tiles.keys,
        STAGES=tiles.num_stages, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out
