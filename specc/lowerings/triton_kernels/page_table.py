"""Page tables from token slots: each page's number is its first token's slot, divided by the page size.

Every entry of the table is written, 0 behind a row's last page: in a reused buffer nothing stale is left.
Whatever the lengths say, no program writes outside of its row or reads outside of the inputs. Lengths are
read from the device and nothing about them is a compile-time constant, so that a captured graph holds for
any batch and a changed number of draft tokens compiles nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


@triton.jit
def _store_pages(out_row, column, slots, page_size, width):
    # An unused slot may hold -1, which must not become a page before the pool.
    pages = tl.maximum(slots, 0) // page_size
    tl.store(out_row + column, pages.to(tl.int32), mask=column < width)


@triton.jit
def _from_ragged(out, kv_indices, kv_indptr, row_stride, tokens, page_size, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(kv_indptr + row).to(tl.int64)
    length = tl.load(kv_indptr + row + 1).to(tl.int64) - start
    token = column.to(tl.int64) * page_size
    live = (column < width) & (token < length)
    at = tl.minimum(tl.maximum(start + token, 0), tokens - 1)
    slots = tl.load(kv_indices + at, mask=live, other=0)
    _store_pages(out + row * row_stride, column, slots, page_size, width)


@triton.jit
def _from_requests(
    out,
    req_to_token,
    req_pool_indices,
    kv_lens,
    row_stride,
    request_stride,
    token_stride,
    requests,
    capacity,
    page_size,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    request = row
    if req_pool_indices is not None:
        request = tl.load(req_pool_indices + row).to(tl.int64)
    request = tl.minimum(tl.maximum(request, 0), requests - 1)
    length = tl.minimum(tl.load(kv_lens + row).to(tl.int64), capacity)
    token = column.to(tl.int64) * page_size
    live = (column < width) & (token < length)
    slots = tl.load(req_to_token + request * request_stride + token * token_stride, mask=live, other=0)
    _store_pages(out + row * row_stride, column, slots, page_size, width)


def fill_from_ragged(out: Tensor, kv_indices: Tensor, kv_indptr: Tensor, page_size: int) -> None:
    """Fill ``out``, int32 [rows, width] with contiguous rows; the rest as the operator's reference has it."""
    if not out.numel() or not kv_indices.numel():
        out.zero_()
        return
    rows, width = out.shape
    _from_ragged[(rows, triton.cdiv(width, BLOCK))](
        out,
        kv_indices.contiguous(),
        kv_indptr.contiguous(),
        out.stride(0),
        kv_indices.shape[0],
        page_size,
        width,
        BLOCK=BLOCK,
    )


def fill_from_requests(
    out: Tensor, req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int
) -> None:
    """Fill ``out``, int32 [rows, width] with contiguous rows; the rest as the operator's reference has it."""
    if not out.numel() or not req_to_token.numel():
        out.zero_()
        return
    rows, width = out.shape
    _from_requests[(rows, triton.cdiv(width, BLOCK))](
        out,
        req_to_token,
        None if req_pool_indices is None else req_pool_indices.contiguous(),
        kv_lens.contiguous(),
        out.stride(0),
        *req_to_token.stride(),
        *req_to_token.shape,
        page_size,
        width,
        BLOCK=BLOCK,
    )


def from_ragged(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    """``specc::scatter_ragged_to_page_table``."""
    out = torch.empty(kv_indptr.shape[0] - 1, width, dtype=torch.int32, device=kv_indices.device)
    fill_from_ragged(out, kv_indices, kv_indptr, page_size)
    return out


def from_requests(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    """``specc::scatter_req_to_token_to_page_table``."""
    out = torch.empty(kv_lens.shape[0], width, dtype=torch.int32, device=req_to_token.device)
    fill_from_requests(out, req_to_token, req_pool_indices, kv_lens, page_size)
    return out
