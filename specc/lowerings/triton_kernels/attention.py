"""Paged attention whose sums are fixed: a token's bits depend on its own query and keys and on nothing else.

The keys of a row are cut at absolute positions into chunks, and the chunks into sections. Online softmax
inside a chunk gives a state (peak: maximum in log2 units, mass: sum of weights, acc: weighted values);
the states of a section's chunks are folded from the left, and so are the sections. That tree never
changes; which program evaluates which part of it does, with the shape of the call and the lengths:

* many blocks of queries: one program walks a row's sections, the fold so far waiting in the scratch;
* few: a program takes one section, or where that fills no GPU a pair of chunks, or one, and leaves its
  state, a pair's two, in the scratch, which ``_combine`` then folds.

The number of rows of a tile never depends on a block's length either, so that decoding and verification
run the same instructions. Every fused multiply-add is written as such: compile without contraction.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 512
SECTION = 2048

# Blocks of up to this many tokens share one configuration, hence their bits.
SHORT = 16
# Programs per multiprocessor: so many with a section each keep a GPU busy; so many are launched.
BUSY, LAUNCHED = 1.0, 4
SCRATCH_LIMIT = 256 * 2**20
# Farther back than any key: no window.
FAR = 2**30


@triton.jit
def _fold(peak, mass, acc, next_peak, next_mass, next_acc):
    best = tl.maximum(peak, next_peak)
    finite = tl.where(best == float("-inf"), 0.0, best)
    old = tl.exp2(peak - finite)
    new = tl.exp2(next_peak - finite)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), next_acc * new[:, None])
    return best, tl.fma(mass, old, next_mass * new), acc


@triton.jit
def _finish(peak, mass, acc, head, live, sinks, v_scale):
    """Weighted values over the sum of weights, the sink's included; 0 for what has seen nothing."""
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
        best = tl.maximum(peak, sink)
        finite = tl.where(best == float("-inf"), 0.0, best)
        weight = tl.exp2(peak - finite)
        mass = tl.fma(mass, weight, tl.exp2(sink - finite))
        acc = acc * weight[:, None]
    acc = acc / tl.where(mass > 0.0, mass, 1.0)[:, None]
    if v_scale is not None:
        acc = acc * tl.load(v_scale)
    return acc


@triton.jit
def _share(
    row, block, cu_seqlens, lengths, max_q, capacity, window, programs, wanted,
    TOKENS: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """What a block of up to TOKENS queries sees, and how its keys are cut into units of work.

    Returns the row's first token, its tokens, its context, the keys [low, high) that any of the block's
    queries sees, the keys of a unit, the first unit and the number of units.
    """
    start = tl.load(cu_seqlens + row)
    asked = tl.load(cu_seqlens + row + 1) - start
    length = tl.load(lengths + row)
    length = tl.minimum(tl.maximum(length, -1073741824), 1073741824).to(tl.int32)
    context = length - asked
    count = tl.minimum(asked, max_q)
    first = block * TOKENS
    end = context + tl.minimum(first + TOKENS, count)
    high = tl.maximum(tl.minimum(end, capacity), 0)
    low = tl.minimum(tl.maximum(context + first - window + 1, 0), high)
    sections = tl.cdiv(high, SECTION) - low // SECTION
    unit = CHUNK
    if BLOCK_V <= 128:
        # Wider, the second state of a pair would not fit into the registers.
        pairs = tl.cdiv(high, 2 * CHUNK) - low // (2 * CHUNK)
        unit = tl.where(pairs * programs >= wanted, 2 * CHUNK, CHUNK)
    unit = tl.where(sections * programs >= wanted, SECTION, unit)
    first_unit = low // unit
    return start, count, context, low, high, unit, first_unit, tl.cdiv(high, unit) - first_unit


@triton.jit
def _members(
    block, first, start, count, tokens, kv_head, BLOCK_M: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """The lanes of a tile that hold a query, their heads, and their tokens in int64: [BLOCK_M] each."""
    block_tokens: tl.constexpr = BLOCK_M // GROUP
    lane = first + tl.arange(0, BLOCK_M)
    place = block * block_tokens + lane // GROUP
    live = (lane < block_tokens * GROUP) & (place < count) & (start + place < tokens)
    return live, kv_head * GROUP + lane % GROUP, (start + place).to(tl.int64)


@triton.jit
def _clear(out, token, heads, kv_head, lane_v, GROUP: tl.constexpr, DV: tl.constexpr):
    """Zeros for a token that belongs to no row."""
    first = (token.to(tl.int64) * heads + kv_head * GROUP) * DV
    for member in range(GROUP):
        zeros = tl.zeros(lane_v.shape, out.dtype.element_ty)
        tl.store(out + first + member * DV + lane_v, zeros, mask=lane_v < DV)


@triton.jit
def _pages_of(table, tile, width, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page of each key of a tile: one number where a tile lies within a page, else [BLOCK_N]."""
    key = tile * BLOCK_N
    if PAGE < BLOCK_N:
        key += tl.arange(0, BLOCK_N)
    column = key // PAGE
    return tl.load(table + column, mask=column < width, other=0)


@triton.jit
def _tile_pointers(
    pool, page, slot, lane, page_stride, slot_stride, PAGE: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    if PAGE >= BLOCK_N:
        return (pool + page.to(tl.int64) * page_stride) + (slot * slot_stride)[:, None] + lane[None, :]
    return pool + ((page.to(tl.int64) * page_stride + slot * slot_stride)[:, None] + lane[None, :])


@triton.jit(
    do_not_specialize=[
        "tokens", "rows", "kv_heads", "blocks", "max_q", "width", "num_pages", "splits", "slots", "wanted",
        "window", "table_stride",
    ]
)  # fmt: skip
def _attend(
    q, k_pages, v_pages, table, cu_seqlens, lengths, sinks, k_scale, v_scale, out, states, sums,
    tokens, rows, kv_heads, blocks, max_q, width, num_pages, splits, slots, wanted,
    score_scale, cap, window,
    q_token_stride, q_head_stride, table_stride,
    k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride,
    GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    NEAR: tl.constexpr, TWINS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    LINEAR: tl.constexpr, WALK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    block_tokens: tl.constexpr = BLOCK_M // GROUP
    block = tl.program_id(0) % blocks
    kv_head = tl.program_id(0) // blocks % kv_heads
    row = tl.program_id(0) // blocks // kv_heads
    split = tl.program_id(1)
    heads = kv_heads * GROUP

    lane_k = tl.arange(0, BLOCK_K)
    lane_v = tl.arange(0, BLOCK_V)
    leading = tl.minimum(tl.load(cu_seqlens), tokens)
    trailing = tl.load(cu_seqlens + rows)
    start, count, context, low, high, unit, first_unit, units = _share(
        row, block, cu_seqlens, lengths, max_q, width * PAGE, window, tl.num_programs(0), wanted,
        block_tokens, BLOCK_V, CHUNK, SECTION,
    )  # fmt: skip
    if split == 0:
        for stray in range(row * blocks + block, leading + tl.maximum(tokens - trailing, 0), rows * blocks):
            stray = tl.where(stray < leading, stray, trailing + stray - leading)
            _clear(out, stray, heads, kv_head, lane_v, GROUP, DV)
    if (block * block_tokens >= count) | (split >= tl.maximum(units, 1)):
        return

    table_row = table + row.to(tl.int64) * table_stride
    if not WALK:
        # Before the queries: the first keys wait for it.
        begin = tl.maximum(low, (first_unit + split) * unit) // BLOCK_N
        ahead = _pages_of(table_row, begin, width, PAGE, BLOCK_N)

    live, head, token = _members(block, 0, start, count, tokens, kv_head, BLOCK_M, GROUP)
    position = tl.where(live, (token - start).to(tl.int32) + context, -1)
    newest = tl.minimum(position, high - 1)
    # The keys in [all_from, all_to) are seen by each of the block's queries.
    all_from = tl.where(WINDOWED, low + block_tokens - 1, 0)
    all_to = tl.minimum(context + block * block_tokens + 1, high)

    in_k = lane_k < DK
    in_v = lane_v < DV
    queries = tl.load(
        q + (token * q_token_stride + head * q_head_stride)[:, None] + lane_k[None, :],
        mask=live[:, None] & in_k[None, :],
        other=0.0,
    )
    if k_scale is not None:
        score_scale = score_scale * tl.load(k_scale)
    if TWINS:
        v_page_stride = k_page_stride
        v_slot_stride = k_slot_stride
    k_head = k_pages + kv_head.to(tl.int64) * k_head_stride
    v_head = v_pages + kv_head.to(tl.int64) * v_head_stride
    # A state is kept for each section, or else for each chunk.
    kept_keys = tl.where(unit == SECTION, SECTION, CHUNK)

    for index in range(split, tl.maximum(units, 1), splits):
        end = tl.cdiv(tl.minimum(high, (first_unit + index + 1) * unit), BLOCK_N)
        if WALK:
            begin = tl.maximum(low, (first_unit + index) * unit) // BLOCK_N
            ahead = _pages_of(table_row, begin, width, PAGE, BLOCK_N)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        chunk_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        chunk_mass = tl.zeros([BLOCK_M], tl.float32)
        chunk_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        first_chunk = begin // (CHUNK // BLOCK_N)
        # A 0 that no compiler knows of, or every address below the loop would be worked out before it
        # and held in registers through it.
        nothing = units * 0
        again = nothing
        zero = splits >> 30
        for tile in range(begin, end):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            in_use = key < high
            if WINDOWED:
                in_use = in_use & (key >= low)
            page = tl.minimum(tl.maximum(ahead, 0), num_pages - 1)
            slot = key % PAGE if NEAR else (key % PAGE).to(tl.int64)
            k = tl.load(
                _tile_pointers(k_head, page, slot, lane_k, k_page_stride, k_slot_stride, PAGE, BLOCK_N),
                mask=in_use[:, None] & in_k[None, :],
                other=0.0,
            ).to(queries.dtype)
            v = tl.load(
                _tile_pointers(v_head, page, slot, lane_v, v_page_stride, v_slot_stride, PAGE, BLOCK_N),
                mask=in_use[:, None] & in_v[None, :],
                other=0.0,
            ).to(queries.dtype)
            ahead = _pages_of(table_row, tile + 1, width, PAGE, BLOCK_N)

            scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
            # Before the tile's own values: a branch behind the second product would read it without a
            # wait (Triton 3.6), and folding a state without keys, as at the first tile, changes nothing.
            if tile % (CHUNK // BLOCK_N) == 0:
                peak, mass, acc = _fold(peak, mass, acc, chunk_peak, chunk_mass, chunk_acc)
                chunk_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
                chunk_mass = tl.zeros([BLOCK_M], tl.float32)
                chunk_acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            nothing = (nothing + tile) & zero
            if not WALK:
                again = (again ^ tile) & zero
            if not LINEAR:
                scores = scores * score_scale
            if CAPPED:
                scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
            if (tile * BLOCK_N < all_from) | ((tile + 1) * BLOCK_N > all_to):
                visible = key[None, :] <= newest[:, None]
                if WINDOWED:
                    visible = visible & (key[None, :] > (position - window)[:, None])
                scores = tl.where(visible, scores, float("-inf"))
            best = tl.max(scores, 1)
            if LINEAR:
                best = best * score_scale
            best = tl.maximum(chunk_peak, best)
            finite = tl.where(best == float("-inf"), 0.0, best)
            fade = tl.exp2(chunk_peak - finite)
            if LINEAR:
                scores = tl.fma(
                    scores,
                    tl.full(scores.shape, 1.0, tl.float32) * score_scale,
                    -finite[:, None] + tl.zeros_like(scores),
                )
            else:
                scores = scores - finite[:, None]
            weights = tl.exp2(scores)
            chunk_mass = tl.fma(chunk_mass, fade, tl.sum(weights, 1))
            chunk_acc = tl.dot(
                weights.to(queries.dtype), v, chunk_acc * fade[:, None], input_precision="ieee"
            )
            chunk_peak = best

        if not WALK:
            narrow: tl.constexpr = BLOCK_V <= 128
            last_chunk = (end - 1) // (CHUNK // BLOCK_N)
            slot = (end - 1) * BLOCK_N // kept_keys - low // kept_keys
            if narrow and (unit == 2 * CHUNK) & (units > 1):
                # Of the pair's two states neither may be folded here: the section's first ones are not.
                if first_chunk < last_chunk:
                    live, head, token = _members(block, again, start, count, tokens, kv_head, BLOCK_M, GROUP)
                    state = (token * heads + head) * slots + slot - 1
                    tl.store(
                        states + state[:, None] * DV + lane_v[None, :],
                        acc,
                        mask=live[:, None] & in_v[None, :],
                    )
                    tl.store(sums + state * 2, peak, mask=live)
                    tl.store(sums + state * 2 + 1, mass, mask=live)
                peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
                mass = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        peak, mass, acc = _fold(peak, mass, acc, chunk_peak, chunk_mass, chunk_acc)

        live, head, token = _members(block, nothing, start, count, tokens, kv_head, BLOCK_M, GROUP)
        kept = live[:, None] & in_v[None, :]
        answer = token * heads + head
        state = answer if WALK else answer * slots + slot
        states_at = states + state[:, None] * DV + lane_v[None, :]
        if WALK and index > 0:
            # Another thread may have written it.
            tl.debug_barrier()
            peak, mass, acc = _fold(
                tl.load(sums + state * 2, mask=live, other=0.0),
                tl.load(sums + state * 2 + 1, mask=live, other=0.0),
                tl.load(states_at, mask=kept, other=0.0),
                peak,
                mass,
                acc,
            )
            tl.debug_barrier()
        if (index + 1 >= units) if WALK else (units <= 1):
            acc = _finish(peak, mass, acc, head, live, sinks, v_scale)
            tl.store(out + answer[:, None] * DV + lane_v[None, :], acc.to(out.dtype.element_ty), mask=kept)
        else:
            tl.store(states_at, acc, mask=kept)
            tl.store(sums + state * 2, peak, mask=live)
            tl.store(sums + state * 2 + 1, mass, mask=live)
        if not WALK:
            begin = (first_unit + index + splits) * unit // BLOCK_N
            ahead = _pages_of(table_row, begin, width, PAGE, BLOCK_N)


@triton.jit
def _state_at(states, sums, slot, index, units, lane_v, DV: tl.constexpr):
    """The state of unit ``index``; one without keys if there is no such unit."""
    index += tl.arange(0, 1)
    there = (index >= 0) & (index < units)
    slot += index
    peak = tl.load(sums + slot * 2, mask=there, other=float("-inf"))
    mass = tl.load(sums + slot * 2 + 1, mask=there, other=0.0)
    acc = tl.load(
        states + slot[:, None] * DV + lane_v[None, :], mask=there[:, None] & (lane_v < DV)[None, :], other=0.0
    )
    return peak, mass, acc


@triton.jit
def _fold_states(
    peak, mass, acc, states, sums, slot, index, units, lane_v,
    SECTIONS: tl.constexpr, PARTS: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Folds the states of SECTIONS sections of PARTS units each, from unit ``index`` on."""
    for section in tl.static_range(SECTIONS):
        whole_peak, whole_mass, whole_acc = _state_at(
            states, sums, slot, index + section * PARTS, units, lane_v, DV
        )
        for part in tl.static_range(1, PARTS):
            part_peak, part_mass, part_acc = _state_at(
                states, sums, slot, index + section * PARTS + part, units, lane_v, DV
            )
            whole_peak, whole_mass, whole_acc = _fold(
                whole_peak, whole_mass, whole_acc, part_peak, part_mass, part_acc
            )
        peak, mass, acc = _fold(peak, mass, acc, whole_peak, whole_mass, whole_acc)
    return peak, mass, acc


@triton.jit(do_not_specialize=["tokens", "heads", "max_q", "width", "slots", "programs", "wanted", "window"])
def _combine(
    cu_seqlens, lengths, sinks, v_scale, out, states, sums,
    tokens, heads, max_q, width, slots, programs, wanted, window,
    GROUP: tl.constexpr, DV: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, SECTION: tl.constexpr,
):  # fmt: skip
    """Folds the states of one token and head, chunks to sections and sections to the answer."""
    block_tokens: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % heads
    place = tl.program_id(0) // heads % max_q
    row = tl.program_id(0) // heads // max_q
    start, count, _context, low, high, unit, first_unit, units = _share(
        row, place // block_tokens, cu_seqlens, lengths, max_q, width * PAGE, window, programs, wanted,
        block_tokens, BLOCK_V, CHUNK, SECTION,
    )  # fmt: skip
    if (place >= count) | (start + place >= tokens) | (units <= 1):
        return
    if unit == 2 * CHUNK:
        first_unit = low // CHUNK
        units = tl.cdiv(high, CHUNK) - first_unit
    lane_v = tl.arange(0, BLOCK_V)
    answer = (start + place).to(tl.int64) * heads + head
    peak = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_V], tl.float32)
    begin = low // SECTION
    end = tl.cdiv(high, SECTION)
    per_section: tl.constexpr = SECTION // CHUNK
    # Each call has all its loads in flight at once: many where there are many states, else few.
    if unit == SECTION:
        for section in range(begin, end, 16 if units > 8 else 4):
            if units > 8:
                peak, mass, acc = _fold_states(
                    peak, mass, acc, states, sums, answer * slots, section - first_unit, units, lane_v,
                    16, 1, DV,
                )  # fmt: skip
            else:
                peak, mass, acc = _fold_states(
                    peak, mass, acc, states, sums, answer * slots, section - first_unit, units, lane_v,
                    4, 1, DV,
                )  # fmt: skip
    else:
        for section in range(begin, end, 4 if units > 8 else 1):
            index = section * per_section - first_unit
            if units > 8:
                peak, mass, acc = _fold_states(
                    peak, mass, acc, states, sums, answer * slots, index, units, lane_v,
                    4, per_section, DV,
                )  # fmt: skip
            else:
                peak, mass, acc = _fold_states(
                    peak, mass, acc, states, sums, answer * slots, index, units, lane_v,
                    1, per_section, DV,
                )  # fmt: skip
    one = head + tl.arange(0, 1)
    acc = _finish(peak, mass, acc, one, one >= 0, sinks, v_scale)
    tl.store(out + answer * DV + lane_v[None, :], acc.to(out.dtype.element_ty), mask=(lane_v < DV)[None, :])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The shape of a program: at most ``rows`` (query, head) pairs by ``keys`` keys at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def tiles_for(backend: str, dtype: torch.dtype, lanes: int, group: int, *, short: bool) -> Tiles:
    """The configuration of a call. It knows a block's length only as short (up to SHORT) or long.

    backend: "cuda" or "hip"; dtype: the queries'; lanes: the wider head dimension, padded.
    """
    precision = "exact" if dtype == torch.float32 else "half"
    tiles = TILES[backend, precision, max(lanes, 64), short]
    needed = triton.next_power_of_2(SHORT * group) if short else tiles.rows
    rows = max(min(tiles.rows, needed), triton.next_power_of_2(group), 16)
    return dataclasses.replace(tiles, rows=rows)


# (backend, precision, lanes, short). HIP: 64 KB of shared memory on gfx942.
TILES = {
    ("cuda", "half", 64, True): Tiles(64, 64, 4, 4),
    ("cuda", "half", 128, True): Tiles(64, 64, 4, 3),
    ("cuda", "half", 256, True): Tiles(64, 64, 8, 2),
    ("cuda", "half", 64, False): Tiles(128, 64, 8, 3),
    ("cuda", "half", 128, False): Tiles(128, 64, 8, 3),
    ("cuda", "half", 256, False): Tiles(64, 64, 8, 2),
    ("cuda", "exact", 64, True): Tiles(32, 32, 4, 2),
    ("cuda", "exact", 128, True): Tiles(16, 32, 4, 2),
    ("cuda", "exact", 256, True): Tiles(16, 16, 8, 2),
    ("cuda", "exact", 64, False): Tiles(32, 32, 4, 2),
    ("cuda", "exact", 128, False): Tiles(16, 32, 4, 2),
    ("cuda", "exact", 256, False): Tiles(16, 16, 8, 2),
    ("hip", "half", 64, True): Tiles(64, 64, 4, 2),
    ("hip", "half", 128, True): Tiles(64, 32, 4, 2),
    ("hip", "half", 256, True): Tiles(64, 32, 4, 1),
    ("hip", "half", 64, False): Tiles(128, 64, 8, 1),
    ("hip", "half", 128, False): Tiles(64, 64, 4, 1),
    ("hip", "half", 256, False): Tiles(64, 32, 4, 1),
    ("hip", "exact", 64, True): Tiles(32, 32, 4, 1),
    ("hip", "exact", 128, True): Tiles(32, 32, 4, 1),
    ("hip", "exact", 256, True): Tiles(16, 32, 4, 1),
    ("hip", "exact", 64, False): Tiles(32, 32, 4, 1),
    ("hip", "exact", 128, False): Tiles(32, 32, 4, 1),
    ("hip", "exact", 256, False): Tiles(16, 32, 4, 1),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Who computes what; found on the host, so from shapes alone.

    ``programs`` triples of row, KV head and block of queries; ``splits`` programs for each; ``slots``
    states kept for each token and head; rows with fewer than ``wanted / programs`` sections are split
    into chunks.
    """

    blocks: int
    programs: int
    splits: int
    slots: int
    wanted: int


def plan(
    rows: int, kv_heads: int, blocks: int, capacity: int, processors: int, answers: int, value_dim: int
) -> Plan:
    """capacity: keys that a row of the table can hold; answers: tokens times heads.

    The scratch takes ``4 * answers * slots * (value_dim + 2)`` bytes, of SCRATCH_LIMIT at most unless
    one slot alone needs more.
    """
    programs = rows * kv_heads * blocks
    wanted = math.ceil(BUSY * processors)
    chunked = (-(-wanted // programs) - 1) * (SECTION // CHUNK)
    slots = max(min(-(-capacity // CHUNK), chunked), -(-capacity // SECTION))
    splits = min(-(-LAUNCHED * processors // programs), slots)
    if slots == 1:
        return Plan(blocks, programs, 1, 1, wanted)
    if splits == 1 or 4 * answers * slots * (value_dim + 2) > SCRATCH_LIMIT:
        return Plan(blocks, programs, 1, 1, 0)
    return Plan(blocks, programs, splits, slots, wanted)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_q: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """What ``specc::unified_attention`` says, for shapes and dtypes that its provider "triton" supports.

    A token's bits are the same in any batch, at any place of a block of up to SHORT tokens, and for any
    width of the table. Reads nothing from the device, so a graph may capture it; the scratch is taken
    from the caching allocator.
    """
    tokens, heads, key_dim = q.shape
    num_pages, page_size, kv_heads, value_dim = v_pages.shape
    rows, width = page_table.shape
    out = torch.empty(tokens, heads, value_dim, dtype=q.dtype, device=q.device)
    if tokens == 0:
        return out
    if rows == 0 or width == 0 or max_seqlen_q <= 0:
        return out.zero_()
    group = heads // kv_heads
    block_k, block_v = (max(triton.next_power_of_2(dim), 16) for dim in (key_dim, value_dim))
    backend = "cuda" if torch.version.hip is None else "hip"
    tiles = tiles_for(backend, q.dtype, max(block_k, block_v), group, short=max_seqlen_q <= SHORT)
    blocks = -(-min(max_seqlen_q, tokens) // (tiles.rows // group))
    processors = _processors(q.device)
    work = plan(rows, kv_heads, blocks, width * page_size, processors, tokens * heads, value_dim)
    states = torch.empty(tokens * heads * work.slots, value_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(tokens * heads * work.slots, 2, dtype=torch.float32, device=q.device)
    q, page_table = (each if each.stride(-1) == 1 else each.contiguous() for each in (q, page_table))
    cu_seqlens_q, seqused_k = cu_seqlens_q.contiguous(), seqused_k.contiguous()
    window = min(window, FAR) if window else FAR
    # Offsets within a page in 32 bits, and pools of one layout: each spares registers.
    near = page_size * max(k_pages.stride(1), v_pages.stride(1)) < 2**31
    twins = k_pages.stride()[:2] == v_pages.stride()[:2]
    # A positive factor may be applied to the maximum instead of to each score.
    linear = softcap == 0 and scale > 0 and k_scale is None
    per_score, cap = _in_log2_units(scale, softcap)
    shape = {
        "GROUP": group, "DV": value_dim, "PAGE": page_size, "BLOCK_M": tiles.rows, "BLOCK_V": block_v,
        "CHUNK": CHUNK, "SECTION": SECTION, "enable_fp_fusion": False,
    }  # fmt: skip
    _attend[(work.programs, work.splits)](
        q, k_pages, v_pages, page_table, cu_seqlens_q, seqused_k, sinks, k_scale, v_scale, out, states, sums,
        tokens, rows, kv_heads, blocks, max_seqlen_q, width, num_pages, work.splits, work.slots, work.wanted,
        per_score, cap, window,
        *q.stride()[:2], page_table.stride(0), *k_pages.stride()[:3], *v_pages.stride()[:3],
        DK=key_dim, NEAR=near, TWINS=twins, WINDOWED=window != FAR, CAPPED=softcap != 0, LINEAR=linear,
        WALK=work.wanted == 0, BLOCK_N=tiles.keys, BLOCK_K=block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **shape,
    )  # fmt: skip
    if work.splits > 1:
        _combine[(rows * max_seqlen_q * heads,)](
            cu_seqlens_q, seqused_k, sinks, v_scale, out, states, sums,
            tokens, heads, max_seqlen_q, width, work.slots, work.programs, work.wanted, window,
            num_warps=1, **shape,
        )  # fmt: skip
    return out


def _in_log2_units(scale: float, softcap: float) -> tuple[float, float]:
    """What multiplies scores, and the cap: c * tanh(x) is taken as c - 2 c / (exp2(y) + 1)."""
    log2e = 1 / math.log(2)
    if softcap == 0:
        return scale * log2e, 0.0
    return 2 * scale / softcap * log2e, softcap * log2e
