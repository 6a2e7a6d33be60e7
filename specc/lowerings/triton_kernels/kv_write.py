"""Writes the keys and values of new tokens into the pool, both in one launch.

A program takes a stretch of one token's numbers, over all heads. Float8 is encoded here, in integers: so
one rounding holds on every device, those included that Triton has no such type for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.kv_write import as_bytes

BLOCK = 1024


@triton.jit
def _e4m3fn(x):
    """float32 -> float8_e4m3fn's bits: to nearest even, saturated at +-448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    size = tl.minimum(size, 0x43E00000)  # 448.0
    # 20 bits of the fraction go, and the exponent's bias falls from 127 to 7.
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960
    # Subnormal: float32s at 16384 lie 2**-9 apart, as these do, so the addition rounds for us.
    shifted = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True)
    code = tl.where(size < 0x3C800000, shifted - 0x46800000, normal)  # 2**-6 and 16384.0
    return (tl.where(nan, 0x7F, code) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _copy(source, target, mask, scale):
    x = tl.load(source, mask=mask)
    if scale is not None:
        x = tl.div_rn(x.to(tl.float32), tl.load(scale))
    if target.dtype.element_ty == tl.uint8:
        tl.store(target, _e4m3fn(x.to(tl.float32)), mask=mask)
    else:
        tl.store(target, x.to(target.dtype.element_ty), mask=mask)


@triton.jit
def _write(
    k,
    v,
    k_pages,
    v_pages,
    slots,
    k_scale,
    v_scale,
    k_token,
    k_head,
    v_token,
    v_head,
    k_page,
    k_offset,
    k_page_head,
    v_page,
    v_offset,
    v_page_head,
    slot_stride,
    num_slots,
    page_size,
    heads,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token * slot_stride).to(tl.int64)
    slot = tl.minimum(tl.maximum(slot, 0), num_slots - 1)
    page, offset = slot // page_size, slot % page_size

    # Heads may lie further apart than 2**31 numbers, where pages are the inner dimension.
    head, dim = (at // K_DIM).to(tl.int64), at % K_DIM
    source = k + token * k_token + head * k_head + dim
    target = k_pages + page * k_page + offset * k_offset + head * k_page_head + dim
    _copy(source, target, head < heads, k_scale)

    head, dim = (at // V_DIM).to(tl.int64), at % V_DIM
    source = v + token * v_token + head * v_head + dim
    target = v_pages + page * v_page + offset * v_offset + head * v_page_head + dim
    _copy(source, target, head < heads, v_scale)


def kv_write(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """``specc::kv_write``, for shapes and dtypes that its provider has checked."""
    tokens, heads, k_dim = k.shape
    v_dim = v.shape[2]
    if not tokens * heads * max(k_dim, v_dim):
        return
    _write[(tokens, triton.cdiv(heads * max(k_dim, v_dim), BLOCK))](
        k,
        v,
        as_bytes(k_pages),
        as_bytes(v_pages),
        slots,
        k_scale,
        v_scale,
        *k.stride()[:2],
        *v.stride()[:2],
        *k_pages.stride()[:3],
        *v_pages.stride()[:3],
        slots.stride(0),
        k_pages.shape[0] * k_pages.shape[1],
        k_pages.shape[1],
        heads,
        K_DIM=k_dim,
        V_DIM=v_dim,
        BLOCK=BLOCK,
    )
