"""``specc::scatter_req_to_token_to_page_table``: a pool's slot table -> the pages of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.framework import define_op


def reference(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    """Entry c of row r is ``req_to_token[req_pool_indices[r], c * P] // P``, for each page with tokens.

    req_to_token: int32 [requests, capacity]; req_pool_indices: int64 [rows], or None for 0, 1, 2, ...;
    kv_lens: int64 [rows], tokens of each row, the block's own included. Returns int32 [rows, width].
    A row of more than ``width`` pages is cut at ``width``; entries behind a row's last page are 0.
    Meaning after SGLang's verify table (sgl-project/sglang#23146), whose width is not clamped.
    """
    column = torch.arange(width, device=req_to_token.device)
    at = (column * page_size).clamp(max=req_to_token.shape[1] - 1)
    table = req_to_token if req_pool_indices is None else req_to_token[req_pool_indices]
    pages = torch.div(table[: kv_lens.shape[0]][:, at], page_size, rounding_mode="floor")
    return torch.where(column * page_size < kv_lens[:, None], pages, 0).to(torch.int32)


def _fake(
    req_to_token: Tensor, req_pool_indices: Tensor | None, kv_lens: Tensor, page_size: int, width: int
) -> Tensor:
    return req_to_token.new_empty((kv_lens.shape[0], width), dtype=torch.int32)


def _sample(device: str) -> tuple[object, ...]:
    req_to_token = torch.arange(128, device=device, dtype=torch.int32).view(2, 64)
    return req_to_token, None, torch.tensor([20, 64], device=device), 16, 4


scatter_req_to_token_to_page_table = define_op(
    "scatter_req_to_token_to_page_table",
    "(Tensor req_to_token, Tensor? req_pool_indices, Tensor kv_lens, int page_size, SymInt width) -> Tensor",
    reference,
    _fake,
    _sample,
)
