"""``specc::scatter_req_to_token_to_page_table``: a pool's slot table -> the pages of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.framework import Provider, Reason, define_op


def reference(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    """Entry c of row r is ``req_to_token[req_pool_indices[r], c * P] // P``, for each page with tokens.

    req_to_token: int32 or int64 [requests, capacity]; req_pool_indices: int32 or int64 [rows], or None for
    0, 1, 2, ..., clamped to the requests there are; kv_lens: int32 or int64 [rows], tokens of each row, the
    block's own included, clamped to the capacity. Returns int32 [rows, width]. A row of more than ``width``
    pages is cut at ``width``; entries behind a row's last page are 0, and so are those of negative slots.
    Meaning after SGLang's verify table (sgl-project/sglang#23146), whose width is not clamped.
    """
    requests, capacity = req_to_token.shape
    rows, device = kv_lens.shape[0], req_to_token.device
    if requests == 0 or capacity == 0:
        return req_to_token.new_zeros((rows, width), dtype=torch.int32)
    request = torch.arange(rows, device=device) if req_pool_indices is None else req_pool_indices
    token = torch.arange(width, device=device) * page_size
    slots = req_to_token[request.clamp(0, requests - 1)[:, None], token.clamp(max=capacity - 1)]
    live = token < kv_lens.clamp(max=capacity)[:, None]
    return torch.where(live, slots.clamp(min=0) // page_size, 0).to(torch.int32)


def _fake(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    if req_pool_indices is not None:
        torch._check(
            req_pool_indices.shape[0] == kv_lens.shape[0],
            lambda: "scatter_req_to_token_to_page_table: one request per row",
        )
    return req_to_token.new_empty((kv_lens.shape[0], width), dtype=torch.int32)


def _triton_supports(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Reason:
    tensors = {"req_to_token": req_to_token, "req_pool_indices": req_pool_indices, "kv_lens": kv_lens}
    unfit = triton_kernels.not_integers(*triton_kernels.INDICES, **tensors)
    if unfit is not None:
        return unfit
    if req_pool_indices is not None and req_pool_indices.shape != kv_lens.shape:
        return f"needs one request per row, got {req_pool_indices.shape[0]} for {kv_lens.shape[0]} rows"
    return triton_kernels.unfit(req_to_token, req_pool_indices, kv_lens)


def _triton(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    from specc.lowerings.triton_kernels import page_table

    with torch.cuda.device_of(req_to_token):
        return page_table.from_requests(req_to_token, req_pool_indices, kv_lens, page_size, width)


def _sample(device: str) -> tuple[object, ...]:
    req_to_token = torch.arange(128, device=device, dtype=torch.int32).view(2, 64)
    return req_to_token, None, torch.tensor([20, 64], device=device), 16, 4


scatter_req_to_token_to_page_table = define_op(
    "scatter_req_to_token_to_page_table",
    "(Tensor req_to_token, Tensor? req_pool_indices, Tensor kv_lens, int page_size, SymInt width) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
