"""Attention of ragged blocks over dense keys, in plain PyTorch: what the paged operators mean."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores become weights. ``scale`` multiplies q k^T; then ``softcap * tanh(. / softcap)`` unless 0.

    ``window``: how many keys a query sees at most, itself included; 0 for all. ``sinks``: [Hq] or None,
    a logit per head that takes part in the softmax and weighs no value.
    """

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, kv_lens: Tensor, q_len: int, scoring: Scoring
) -> Tensor:
    """Causal attention, aligned to the bottom right, of blocks of up to ``q_len`` tokens per row.

    q: [T, Hq, Dk]; k: [B, S, Hkv, Dk]; v: [B, S, Hkv, Dv]; cu_seqlens_q: int [B + 1]; kv_lens: int [B].
    Token j of row b's n tokens stands at position p = kv_lens[b] - n + j and sees keys 0 .. p, or the
    last ``window`` of these. A token that sees nothing, or belongs to no row, gets 0. What lies behind
    kv_lens is never used, NaN included. Returns [T, Hq, Dv] in q's dtype; sums in float32 or wider.
    """
    starts, counts = cu_seqlens_q[:-1].long(), (cu_seqlens_q[1:] - cu_seqlens_q[:-1]).long()
    block = torch.arange(q_len, device=q.device)
    token = starts[:, None] + block
    live = (block < counts[:, None]) & (token < q.shape[0])
    blocks = q[token.clamp(0, q.shape[0] - 1)]
    # Dead lanes see nothing, lest what lies behind a short row's length count as seen.
    positions = torch.where(live, (kv_lens.long() - counts)[:, None] + block, -1)
    attended = dense_attention(blocks, k, v, positions, scoring)
    # Dead lanes of the padded blocks go to a row of their own behind the last token.
    out = attended.new_zeros(q.shape[0] + 1, *attended.shape[2:])
    target = torch.where(live, token, q.shape[0])
    return out.index_copy(0, target.flatten(), attended.flatten(0, 1))[:-1].to(q.dtype)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
    """q: [B, n, Hq, Dk]; k, v: [B, S, Hkv, D]; positions: int64 [B, n]. Returns float [B, n, Hq, Dv]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    rows, count, heads, head_dim = q.shape
    group = heads // k.shape[2]
    key = torch.arange(k.shape[1], device=q.device)
    visible = key <= positions[:, :, None]
    if scoring.window:
        visible = visible & (key > positions[:, :, None] - scoring.window)
    queries = q.to(wide).view(rows, count, k.shape[2], group, head_dim)
    scores = torch.einsum("bnhgd,bshd->bhgns", queries, k.to(wide)) * scoring.scale
    if scoring.softcap:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    best = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(wide).min)
    sink: Tensor | float = 0.0
    if scoring.sinks is not None:
        logit = scoring.sinks.to(wide).view(1, k.shape[2], group, 1, 1)
        best = torch.maximum(best, logit)
        sink = torch.exp(logit - best)
    weights = torch.exp(scores - best)
    total = weights.sum(-1, keepdim=True) + sink
    weights = weights / torch.where(total > 0, total, 1)
    seen = visible.any(1)[:, :, None, None]
    values = torch.where(seen, v.to(wide), 0)
    return torch.einsum("bhgns,bshd->bnhgd", weights, values).flatten(2, 3)
