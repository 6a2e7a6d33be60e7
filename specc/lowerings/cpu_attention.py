"""The "rows" provider of ``specc::unified_attention``: on a CPU, each row over just the keys it sees."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from specc.lowerings.dense_attention import Scoring
from specc.lowerings.framework import Provider, Reason
from specc.lowerings.kv_write import FP8, as_bytes, from_stored

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Tokens attended at once: later blocks see more keys, and earlier ones need not compute with them.
BLOCK = 128


def _supports(q: Tensor, k_pages: Tensor, v_pages: Tensor, *_: object) -> Reason:
    if q.device.type != "cpu":
        return f"is for CPUs, got {q.device.type}"
    if q.dtype not in DTYPES:
        return f"computes in floating point, got queries of {q.dtype}"
    for pages in (k_pages, v_pages):
        if pages.dtype not in (*DTYPES, FP8):
            return f"reads floats and float8_e4m3fn, got pages of {pages.dtype}"
    return None


def _run(
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
    """See unified_attention.reference. Keys are read in place where their pages follow one another."""
    num_tokens, heads, head_dim = q.shape
    page_size, kv_heads = k_pages.shape[1:3]
    group = heads // kv_heads
    limit = page_table.shape[1] * page_size
    scoring = Scoring(scale, window, softcap, sinks)
    dtype = _compute_dtype(q, k_pages, v_pages, scoring, k_scale, v_scale)
    out = q.new_zeros(num_tokens, heads, v_pages.shape[3])
    queries = q.view(num_tokens, kv_heads, group, head_dim)
    outputs = out.view(num_tokens, kv_heads, group, out.shape[2])
    bounds = cu_seqlens_q.tolist()
    for row, length in enumerate(seqused_k.tolist()):
        begin, end = bounds[row : row + 2]
        shift = length - end
        for tokens in _blocks(begin, min(end, begin + max_seqlen_q, num_tokens), shift, limit, window):
            keys = _seen(tokens, shift, limit, window)
            pages = page_table[row, keys.start // page_size : (keys.stop - 1) // page_size + 1]
            numbers = pages.tolist()
            k = _take(k_pages, pages, numbers, keys, dtype, k_scale)
            v = _take(v_pages, pages, numbers, keys, dtype, v_scale)
            mask = _mask(tokens, shift, keys, group, window, dtype)
            block = queries[tokens.start : tokens.stop].to(dtype)
            outputs[tokens.start : tokens.stop] = _attend(block, k, v, mask, scoring)
    return out


def _compute_dtype(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    scoring: Scoring,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> torch.dtype:
    """q's own where torch's attention can take keys and values as they lie, else float32 or wider."""
    plain = k_scale is None and v_scale is None and not scoring.softcap and scoring.sinks is None
    if plain and k_pages.dtype == v_pages.dtype == q.dtype:
        return q.dtype
    return torch.promote_types(q.dtype, torch.float32)


def _blocks(begin: int, end: int, shift: int, limit: int, window: int) -> list[range]:
    """A row's tokens that see a key, ``BLOCK`` at a time. Token t stands at position ``t + shift``.

    Before position 0 there are none, and a window may begin behind the last key the table can name.
    """
    begin = max(begin, -shift)
    end = min(end, limit + window - 1 - shift) if window else end
    return [range(start, min(start + BLOCK, end)) for start in range(begin, end, BLOCK)]


def _seen(tokens: range, shift: int, limit: int, window: int) -> range:
    """The keys that at least one of the tokens sees."""
    start = max(0, tokens.start + shift - window + 1) if window else 0
    return range(start, min(tokens.stop + shift, limit))


def _take(
    pool: Tensor, pages: Tensor, numbers: list[int], keys: range, dtype: torch.dtype, scale: Tensor | None
) -> Tensor:
    """The keys of a row, [1, Hkv, keys, D]; ``pages`` and ``numbers`` are the pages they lie on."""
    num_pages, page_size, heads, dim = pool.shape
    page, slot, head, element = pool.stride()
    first, count = numbers[0], len(numbers)
    offset = keys.start % page_size
    inside = first >= 0 and first + count <= num_pages
    in_order = count == 1 or (page == slot * page_size and numbers == list(range(first, first + count)))
    if inside and in_order:
        at = pool.storage_offset() + first * page + offset * slot
        stored = pool.as_strided((1, heads, len(keys), dim), (0, head, slot, element), at)
    else:
        stored = _gather(pool, pages).flatten(0, 1)[None, offset : offset + len(keys)].transpose(1, 2)
    return from_stored(stored, dtype, scale)


def _gather(pool: Tensor, pages: Tensor) -> Tensor:
    pages = pages.clamp(0, pool.shape[0] - 1)
    return as_bytes(pool).index_select(0, pages).view(pool.dtype)


def _mask(
    tokens: range, shift: int, keys: range, group: int, window: int, dtype: torch.dtype
) -> Tensor | None:
    """What to add to the scores, [group * tokens, keys]; None where every token sees every key."""
    if len(tokens) == 1:
        return None
    beyond = tokens.stop + shift - keys.stop
    if not window:
        beyond = min(beyond, len(tokens))
    width = 1 << max(9, (len(keys) + beyond - 1).bit_length())
    mask = _mask_by_distance(len(tokens), group, width, window, dtype)
    return mask[:, width - beyond - len(keys) : width - beyond]


# A step asks for the same one in every layer, and the next step for another part of it.
@functools.lru_cache(maxsize=8)
def _mask_by_distance(count: int, group: int, width: int, window: int, dtype: torch.dtype) -> Tensor:
    """The mask of ``count`` tokens over the ``width`` positions that end with the last token's own."""
    distance = torch.arange(width - 1, -1, -1, device="cpu")
    distance = distance - torch.arange(count - 1, -1, -1, device="cpu")[:, None]
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    mask = torch.zeros(count, width, dtype=dtype, device="cpu").masked_fill_(hidden, -torch.inf)
    return mask.repeat(group, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """q: [n, Hkv, group, Dk]; k, v: [1, Hkv, keys, D]. Returns [n, Hkv, group, Dv].

    The queries of a group share their keys: they become rows of one product, so keys are read once.
    """
    count, kv_heads, group, head_dim = q.shape
    rows = q.permute(1, 2, 0, 3).reshape(1, kv_heads, group * count, head_dim)
    if scoring.softcap or scoring.sinks is not None:
        attended = _weighted(rows, k, v, mask, scoring)
    else:
        attended = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scoring.scale)
    return attended.view(kv_heads, group, count, -1).permute(2, 0, 1, 3)


def _weighted(rows: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    scores = (rows @ k.transpose(2, 3)).mul_(scoring.scale)
    if scoring.softcap:
        scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if mask is not None:
        scores += mask
    if scoring.sinks is None:
        return scores.softmax(-1) @ v
    sinks = scoring.sinks.to(scores.dtype).view(1, k.shape[1], -1, 1)
    logits = sinks.repeat_interleave(rows.shape[2] // sinks.shape[2], 2)
    return torch.cat([scores, logits], -1).softmax(-1)[..., :-1] @ v


ROWS = Provider("rows", _run, _supports, priority=5)
