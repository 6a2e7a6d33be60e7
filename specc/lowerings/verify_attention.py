"""``specc::verify_attention``: a block's attention over the pool, by ragged token slots."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.dense_attention import Scoring, ragged_attention
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import define_op
from specc.lowerings.read_pages import read_pages


def reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    """The captured attention of a stock model, in the one form that passes know.

    q: [T, Hq, Dk], row b's block at ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` (int32 [B + 1]), of at
    most ``max_seqlen_q`` tokens; k_pages, v_pages: [num_pages, P, Hkv, D]; row b's keys lie in slots
    ``kv_indices[kv_indptr[b] : kv_indptr[b + 1]]``, at most ``max_seqlen_k`` of them, the block's own
    included. scale, window, softcap, sinks: see dense_attention.Scoring. k_scale, v_scale: float32 [1] or
    None, multiply what the pool holds. Returns [T, Hq, Dv] in q's dtype.
    """
    column = torch.arange(max_seqlen_k, device=q.device)
    lens = (kv_indptr[1:] - kv_indptr[:-1]).long()
    at = (kv_indptr[:-1, None].long() + column).clamp(0, kv_indices.shape[0] - 1)
    slots = torch.where(column < lens[:, None], kv_indices[at], 0).to(torch.int32)
    wide = torch.promote_types(q.dtype, torch.float32)
    k = read_pages.reference(k_pages, slots, k_scale, wide).transpose(1, 2)
    v = read_pages.reference(v_pages, slots, v_scale, wide).transpose(1, 2)
    scoring = Scoring(scale, window, softcap, sinks)
    return ragged_attention(q, k, v, cu_seqlens_q, lens, max_seqlen_q, scoring)


def _fake(q: Tensor, k_pages: Tensor, v_pages: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_pages.shape[3])


def _sample(device: str) -> tuple[object, ...]:
    dtype = usual_dtype(device)
    k_pages, v_pages = torch.randn(2, 5, 16, 2, 64, device=device, dtype=dtype)
    q = torch.randn(8, 8, 64, device=device, dtype=dtype)
    kv_indptr = torch.tensor([0, 30, 54], device=device)
    kv_indices = torch.arange(16, 80, device=device, dtype=torch.int32)
    cu_seqlens_q = torch.tensor([0, 4, 8], device=device, dtype=torch.int32)
    return q, k_pages, v_pages, kv_indptr, kv_indices, cu_seqlens_q, 4, 32, 0.125, 0, 0.0, None, None, None


verify_attention = define_op(
    "verify_attention",
    "(Tensor q, Tensor k_pages, Tensor v_pages, Tensor kv_indptr, Tensor kv_indices, Tensor cu_seqlens_q, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int window, float softcap, Tensor? sinks, "
    "Tensor? k_scale, Tensor? v_scale) -> Tensor",
    reference,
    _fake,
    _sample,
)
