"""``specc::unified_attention``: a block's attention over the pool, by a page table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.cpu_attention import ROWS
from specc.lowerings.dense_attention import Scoring, ragged_attention
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.kv_write import FP8, as_bytes, from_stored


def reference(
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
    """Paged attention for blocks of any length in one operator, causal, aligned to the bottom right.

    q: [T, Hq, Dk], row b's block at ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` (int32 [B + 1]), of at
    most ``max_seqlen_q`` tokens; k_pages: [num_pages, P, Hkv, Dk], v_pages: [num_pages, P, Hkv, Dv], any
    strides with a contiguous last dimension; page_table: int32 [B, width]; seqused_k: int64 [B], keys of
    each row, the block's own included. Token j of row b's n tokens sees keys
    ``t <= seqused_k[b] - n + j``, of these the last ``window`` (itself included) unless 0. scale,
    softcap, sinks ([Hq]): see dense_attention.Scoring. k_scale, v_scale: float32 [1] or None, multiply
    what the pool holds. Hq is a multiple of Hkv. Returns [T, Hq, Dv] in q's dtype; a token that sees
    nothing gets 0.

    Page numbers are clamped into the pool and lengths to the table's width. What lies behind a row's
    length is never used, NaN included. Arguments after aiter's unified_attention (ROCm/aiter).
    """
    rows, width = page_table.shape
    page_size = k_pages.shape[1]
    pages = page_table.long().clamp(0, k_pages.shape[0] - 1)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (
        from_stored(as_bytes(pool)[pages].view(pool.dtype), wide, pool_scale).reshape(
            rows, width * page_size, *pool.shape[2:]
        )
        for pool, pool_scale in ((k_pages, k_scale), (v_pages, v_scale))
    )
    scoring = Scoring(scale, window, softcap, sinks)
    return ragged_attention(q, k, v, cu_seqlens_q, seqused_k, max_seqlen_q, scoring)


def _fake(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    *_: object,
) -> Tensor:
    torch._check(
        seqused_k.dtype == torch.int64,
        lambda: "unified_attention: seqused_k must be int64, or offsets wrap in pools of 2 GiB",
    )
    torch._check(page_table.dtype == torch.int32, lambda: "unified_attention: page_table must be int32")
    return q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])


# What the Triton kernels hold in registers and shared memory, and reach with 32-bit positions.
MAX_HEAD_DIM, MAX_GROUP, MAX_KEYS = 256, 64, 2**30


def _triton_supports(
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
) -> Reason:
    others = (k_pages, v_pages, page_table, cu_seqlens_q, seqused_k, sinks, k_scale, v_scale)
    return (
        triton_kernels.unfit(q, *others)
        or _unheld_dtype(q, k_pages, v_pages)
        or _unheld_shape(q, k_pages, v_pages, page_table)
    )


def _unheld_dtype(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Reason:
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"has no kernel for queries of {q.dtype}"
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in (q.dtype, FP8):
        return f"reads pages of {q.dtype} or {FP8} for these queries, got {k_pages.dtype} and {v_pages.dtype}"
    return None


def _unheld_shape(q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor) -> Reason:
    page_size, kv_heads, key_dim = k_pages.shape[1:]
    value_dim = v_pages.shape[3]
    if page_size & (page_size - 1):
        return f"needs a page size that is a power of two, got {page_size}"
    if k_pages.stride(3) != 1 or v_pages.stride(3) != 1:
        return "needs pages with a contiguous last dimension"
    if any(dim % 8 or not 8 <= dim <= MAX_HEAD_DIM for dim in (key_dim, value_dim)):
        return f"needs head dimensions of multiples of 8 up to {MAX_HEAD_DIM}, got {key_dim} and {value_dim}"
    if q.shape[1] // kv_heads > MAX_GROUP:
        return f"serves up to {MAX_GROUP} query heads of a KV head, got {q.shape[1] // kv_heads}"
    if page_table.shape[1] * page_size > MAX_KEYS:
        return f"reaches {MAX_KEYS} keys, got a table of {page_table.shape[1]} pages of {page_size}"
    return None


def _triton(*args: Any) -> Tensor:
    from specc.lowerings.triton_kernels import attention

    return attention.paged_attention(*args)


def _sample(device: str) -> tuple[object, ...]:
    dtype = usual_dtype(device)
    k_pages, v_pages = torch.randn(2, 5, 16, 2, 64, device=device, dtype=dtype)
    q = torch.randn(8, 8, 64, device=device, dtype=dtype)
    page_table = torch.tensor([[1, 2], [3, 4]], device=device, dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, 4, 8], device=device, dtype=torch.int32)
    seqused_k = torch.tensor([30, 20], device=device)
    return q, k_pages, v_pages, page_table, cu_seqlens_q, seqused_k, 4, 0.125, 0, 0.0, None, None, None


unified_attention = define_op(
    "unified_attention",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor page_table, Tensor cu_seqlens_q, Tensor seqused_k, "
    "SymInt max_seqlen_q, float scale, int window, float softcap, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10), ROWS),
)
