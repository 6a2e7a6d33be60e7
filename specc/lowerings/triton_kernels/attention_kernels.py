"""Kernels of paged attention whose sums are fixed: a state for each part of a row's keys, then their fold.

The keys of a row are cut at absolute positions into chunks, and the chunks into sections. Online softmax
inside a chunk gives a state (peak: what its weights are relative to, about their maximum, in log2 units;
mass: sum of weights; acc: weighted values). The states of a section's chunks are folded from the left, and
so are the sections. That tree never changes; which program evaluates which part of it does, with the shape
of the call and the lengths:

* many blocks of queries: one program walks a row's sections, the fold so far waiting in the scratch;
* few: a program takes one section, or where that fills no GPU a pair of chunks, or one, and leaves its
  state, a pair's two, in the scratch, which ``combine`` then folds.

Every fused multiply-add is written as such: compile without contraction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _fold(peak, mass, acc, next_peak, next_mass, next_acc):
    best = tl.maximum(peak, next_peak)
    finite = tl.where(best == float("-inf"), 0.0, best)
    old = tl.exp2(peak - finite)
    new = tl.exp2(next_peak - finite)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), next_acc * new[:, None])
    return best, tl.fma(mass, old, next_mass * new), acc


@triton.jit
def _level(best, before):
    """What a tile's weights are relative to: its maximum, or what lies a whole number above it.

    Of these the one nearest to what the tile before took, so that the sum so far grows by 2**0.5 at most
    when it is rescaled. The largest weight is then a power of two, which rounding to the values' dtype
    keeps: it weighs most, and relative to a running maximum it would err like any other.
    """
    gap = before - best
    # Not so where no key is in sight, nor where all weights are 0 anyway.
    return tl.where(gap < 1024.0, best + tl.floor(tl.maximum(gap, 0.0) + 0.5), before)


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
def attend(
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
            best = _level(best, chunk_peak)
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
def combine(
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
