"""Gated DeltaNet over short blocks: the recurrence as such, and what its kernels share.

A program owns one value head of one row and some columns of its state, which no other program needs: the
recurrence mixes keys' dimensions only. Offsets into pools are of 64 bits and strides come from the buffers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.triton_kernels import gluon_obstacle

# Records of a ring that a fold takes at a time.
RECORDS = 32


@triton.jit
def place(tiles, heads):
    """The row, the value head and the tile of columns of this program."""
    program = tl.program_id(0)
    return (program // tiles // heads).to(tl.int64), program // tiles % heads, program % tiles


@triton.jit
def slot_of(slots, row):
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    return slot


@triton.jit
def inverse_norm(squares, L2NORM: tl.constexpr):
    return tl.rsqrt(squares + 1e-6) if L2NORM else tl.zeros_like(squares) + 1.0


@triton.jit
def counts(base, seq_lens, final_lens, slot, row, RING: tl.constexpr, FLUSH_EVERY: tl.constexpr):
    """The ring entry of base, the records since, those to flush; and the row's length, negative if dead."""
    length = tl.load(seq_lens + row).to(tl.int64)
    first = tl.load(base + tl.maximum(slot, 0)).to(tl.int64)
    final = tl.load(final_lens + row).to(tl.int64)
    pending = tl.minimum(tl.maximum(length - first, 0), RING).to(tl.int32)
    flushed = tl.minimum(tl.maximum(final - first, 0), pending).to(tl.int32) // FLUSH_EVERY * FLUSH_EVERY
    length = tl.where(slot < 0, -1, length)
    return (first % RING).to(tl.int32), pending, flushed, length


@triton.jit
def _high(y, half):
    """The bits of a float32 that tf32 holds: rounded where ``half`` is 4096, cut off where it is 0."""
    return ((y.to(tl.int32, bitcast=True) + half) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _upper(y):
    """What bfloat16 holds of a float32, cut off; and the rest."""
    bits = y.to(tl.int32, bitcast=True)
    rest = y - (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), rest


@triton.jit
def product(x, y, acc, PARTS: tl.constexpr):
    """``acc + x @ y`` to float32's accuracy, y being float32.

    PARTS 0: as IEEE has it. PARTS 1 and 2: by tf32 products, which hold an x of 16 bits exactly, and so a y
    of 16 bits; a wider y is cut into two parts, of which the lower one loses a bit or two of 2^-23. PARTS 3:
    the same with an instruction less and a bit more lost. PARTS 4: x is of bfloat16, and y is cut into three
    parts of that, which lose nothing.
    """
    wide = x.to(tl.float32)
    if PARTS == 0:
        acc = tl.dot(wide, y, acc, input_precision="ieee")
    if PARTS == 1:
        acc = tl.dot(wide, y, acc, input_precision="tf32")
    if PARTS == 4:
        first, rest = _upper(y)
        second, rest = _upper(rest)
        third, _ = _upper(rest)
        acc = tl.dot(x, third, acc)
        acc = tl.dot(x, second, acc)
        acc = tl.dot(x, first, acc)
    elif PARTS >= 2:
        high = _high(y, 4096 if PARTS == 2 else 0)
        acc = tl.dot(wide, y - high, acc, input_precision="tf32")
        acc = tl.dot(wide, high, acc, input_precision="tf32")
    return acc


@triton.jit
def wide_product(x, y, acc, PARTS: tl.constexpr):
    """``product`` of an x of float32 too; PARTS 0: as IEEE has it."""
    if PARTS == 0:
        acc = tl.dot(x, y, acc, input_precision="ieee")
    else:
        x_high, y_high = _high(x, 0), _high(y, 0)
        acc = tl.dot(x - x_high, y_high, acc, input_precision="tf32")
        acc = tl.dot(x_high, y - y_high, acc, input_precision="tf32")
        acc = tl.dot(x_high, y_high, acc, input_precision="tf32")
    return acc


@triton.jit(do_not_specialize=["tokens"])
def _recurrent(
    q, k, v, g, beta, state, slots, out, states, scale, tokens, heads, tiles,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    g_row, g_token, g_head, beta_row, beta_token, beta_head, state_row, state_head, state_key,
    K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr, EACH: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``states``: [B, T, HV, K, V] if EACH, the states behind all tokens, else [B, HV, K, V], the last."""
    row, head, tile = place(tiles, heads)
    key_head = head // GROUP
    lane_k, lane_v = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = lane_k < K, lane_v < V
    inside = in_k[:, None] & in_v[None, :]
    cell = lane_k[:, None] * V + lane_v[None, :]
    slot = slot_of(slots, row)
    s = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if state is not None:
        at = slot * state_row + head * state_head + lane_k[:, None] * state_key + lane_v[None, :]
        if slot >= 0:
            s = tl.load(state + at, mask=inside, other=0.0).to(tl.float32)
    for token in range(tokens):
        query = tl.load(q + row * q_row + token * q_token + key_head * q_head + lane_k, mask=in_k, other=0.0)
        key = tl.load(k + row * k_row + token * k_token + key_head * k_head + lane_k, mask=in_k, other=0.0)
        value = tl.load(v + row * v_row + token * v_token + head * v_head + lane_v, mask=in_v, other=0.0)
        decay = tl.load(g + row * g_row + token * g_token + head * g_head).to(tl.float32)
        rate = tl.load(beta + row * beta_row + token * beta_token + head * beta_head).to(tl.float32)
        query, key = query.to(tl.float32), key.to(tl.float32)
        query = query * (inverse_norm(tl.sum(query * query, 0), L2NORM) * scale)
        key = key * inverse_norm(tl.sum(key * key, 0), L2NORM)
        s = s * tl.exp(decay)
        u = (value.to(tl.float32) - tl.sum(s * key[:, None], 0)) * rate
        s = s + key[:, None] * u[None, :]
        o = tl.sum(s * query[:, None], 0)
        if slot < 0:
            s = tl.zeros_like(s)
            o = tl.zeros_like(o)
        place_of_head = (row * tokens + token) * heads + head
        tl.store(out + place_of_head * V + lane_v, o.to(out.dtype.element_ty), mask=in_v)
        if EACH:
            kept = s.to(states.dtype.element_ty)
            tl.store(states + place_of_head * K * V + cell, kept, mask=inside)
            s = kept.to(tl.float32)
    if not EACH:
        tl.store(states + (row * heads + head) * K * V + cell, s, mask=inside)


@triton.jit
def _fold(
    state, ring_k, ring_u, ring_g, base, upto, slots, track_slots, track_upto, ring_size, heads, tiles,
    state_row, state_head, state_key, ring_k_row, ring_k_entry, ring_k_head,
    ring_u_row, ring_u_entry, ring_u_head, ring_g_row, ring_g_entry, ring_g_head,
    K: tl.constexpr, V: tl.constexpr, GROUP: tl.constexpr, L2NORM: tl.constexpr, PARTS: tl.constexpr,
    RECORDS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, head, tile = place(tiles, heads)
    slot = slot_of(slots, row)
    end = tl.load(upto + row).to(tl.int64)
    if slot < 0:
        return
    first = tl.load(base + slot).to(tl.int64)
    target = slot
    lane_k, lane_v = tl.arange(0, BLOCK_K), tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_k, in_v = lane_k < K, lane_v < V
    inside = in_k[:, None] & in_v[None, :]
    cell = head * state_head + lane_k[:, None] * state_key + lane_v[None, :]
    old = tl.load(state + slot * state_row + cell, mask=inside, other=0.0).to(tl.float32)
    ring_k += slot * ring_k_row + head // GROUP * ring_k_head
    ring_u += slot * ring_u_row + head * ring_u_head
    ring_g += slot * ring_g_row + head * ring_g_head
    for target_number in tl.static_range(1 if track_slots is None else 2):
        if target_number == 1:
            target = tl.load(track_slots + row).to(tl.int64)
            end = tl.load(track_upto + row).to(tl.int64)
        count = tl.minimum(end - first, ring_size).to(tl.int32)
        if (target >= 0) & (count > 0):
            s = old
            for start in range(0, count, RECORDS):
                age = start + tl.arange(0, RECORDS)
                there = age < count
                entry = (first + age) % ring_size
                keys = tl.load(
                    ring_k + entry[:, None] * ring_k_entry + lane_k[None, :],
                    mask=there[:, None] & in_k[None, :],
                    other=0.0,
                )
                u = tl.load(
                    ring_u + entry[:, None] * ring_u_entry + lane_v[None, :],
                    mask=there[:, None] & in_v[None, :],
                    other=0.0,
                )
                decay = tl.load(ring_g + entry * ring_g_entry, mask=there, other=0.0)
                wide = keys.to(tl.float32)
                weight = tl.exp(tl.sum(decay, 0) - tl.cumsum(decay, 0))
                weight = weight * inverse_norm(tl.sum(wide * wide, 1), L2NORM)
                s = product(tl.trans(keys), u * weight[:, None], s * tl.exp(tl.sum(decay, 0)), PARTS)
            tl.store(state + target * state_row + cell, s.to(state.dtype.element_ty), mask=inside)


def parts(x: Tensor, y: Tensor) -> int:
    """PARTS of ``product`` for an x and a y: AMD's units multiply float32, Nvidia's do not."""
    if torch.version.hip is not None or x.dtype == torch.float32 or x.device.type == "cpu":
        return 0
    return 2 if y.dtype == torch.float32 else 1


def cut(x: Tensor, y: Tensor) -> int:
    """``parts`` where a bit matters less than an instruction."""
    found = parts(x, y)
    return 3 if found == 2 else found


def lossless_parts(x: Tensor, y: Tensor) -> int:
    """``parts`` where steps of bfloat16, which are the shorter ones, can do."""
    found = parts(x, y)
    return 4 if found == 2 and x.dtype == torch.bfloat16 else found


@functools.cache
def columns(dim: int, most: int) -> int:
    """Columns of a tile: a power of two, and no more than needed."""
    return min(most, max(16, triton.next_power_of_2(dim)))


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, scale: float, l2norm: bool
) -> tuple[Tensor, Tensor]:
    """``specc::gated_delta_rule`` for a block of a few tokens."""
    last = v.new_empty((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype=torch.float32)
    return _run_recurrent((q, k, v, g, beta), state, None, last, scale, l2norm, each=False), last


def snapshots(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor | None,
    scale: float, l2norm: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``specc::gated_delta_rule_snapshot``."""
    states = state.new_empty((*v.shape[:2], *state.shape[1:]))
    slots = None if slots is None else slots.contiguous()
    return _run_recurrent((q, k, v, g, beta), state, slots, states, scale, l2norm, each=True), states


def _run_recurrent(
    block: tuple[Tensor, ...], state: Tensor | None, slots: Tensor | None, states: Tensor, scale: float,
    l2norm: bool, *, each: bool,
) -> Tensor:  # fmt: skip
    k, v = block[1:3]
    rows, tokens, heads, dim = v.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    block_v = columns(dim, 32)
    tiles = triton.cdiv(dim, block_v)
    _recurrent[(rows * heads * tiles,)](
        *block, state, slots, out, states, scale, tokens, heads, tiles,
        *(stride for x in block for stride in x.stride()[:3]),
        *((0, 0, 0) if state is None else state.stride()[:3]),
        K=k.shape[3], V=dim, GROUP=heads // k.shape[2], L2NORM=l2norm, EACH=each,
        BLOCK_K=columns(k.shape[3], 256), BLOCK_V=block_v, num_warps=2 if k.shape[3] <= 128 else 4,
    )  # fmt: skip
    return out


def fold(
    state: Tensor, ring_k: Tensor, ring_u: Tensor, ring_g: Tensor, base: Tensor, upto: Tensor,
    slots: Tensor | None, track_slots: Tensor | None, track_upto: Tensor | None, l2norm: bool,
) -> None:  # fmt: skip
    """``specc::fold_gated_delta_rule``."""
    _, heads, key_dim, dim = state.shape
    rows = upto.shape[0]
    if not rows:
        return
    block_v = columns(dim, 32)
    tiles = triton.cdiv(dim, block_v)
    lens = (None if x is None else x.contiguous() for x in (base, upto, slots, track_slots, track_upto))
    _fold[(rows * heads * tiles,)](
        state, ring_k, ring_u, ring_g, *lens, ring_k.shape[1], heads, tiles,
        *(stride for x in (state, ring_k, ring_u, ring_g) for stride in x.stride()[:3]),
        K=key_dim, V=dim, GROUP=heads // ring_k.shape[2], L2NORM=l2norm, PARTS=parts(ring_k, ring_u),
        RECORDS=RECORDS, BLOCK_K=columns(key_dim, 256), BLOCK_V=block_v,
        num_warps=4 if key_dim <= 128 else 8,
    )  # fmt: skip


def replay(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], lens: tuple[Tensor | None, ...],
    scale: float, l2norm: bool, flush_every: int, exact: bool,
) -> Tensor:  # fmt: skip
    """``specc::gated_delta_rule_replay``. lens: base, seq_lens, final_lens, slots."""
    form = replay_form(block, state, rings, flush_every, exact)
    return form.replay(block, state, rings, lens, scale, l2norm, flush_every)


def replay_form(
    block: tuple[Tensor, ...], state: Tensor, rings: tuple[Tensor, ...], flush_every: int, exact: bool
) -> Any:
    """The module that has the kernels for these."""
    from specc.lowerings.triton_kernels import gated_delta_exact, gated_delta_fast, gated_delta_one

    k, ring_size = block[1], rings[0].shape[1]
    if exact or not gated_delta_fast.fits(ring_size):
        return gated_delta_exact
    if k.shape[1] == 1 and gated_delta_one.fits(k, ring_size):
        return gated_delta_one
    if gluon_obstacle() is None:
        from specc.lowerings.triton_kernels import gated_delta_gluon

        if gated_delta_gluon.fits(block, state, rings, flush_every):
            return gated_delta_gluon
    return gated_delta_fast
