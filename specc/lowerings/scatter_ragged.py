"""``specc::scatter_ragged_to_page_table``: ragged token slots -> the pages of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.framework import define_op


def reference(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    """Entry c of row r is ``kv_indices[kv_indptr[r] + c * P] // P``, for every page row r has tokens on.

    kv_indices: int32 or int64 [tokens], token slots, each page's first token on a page-aligned slot;
    kv_indptr: int32 or int64 [rows + 1]. Returns int32 [rows, width]. A row of more than ``width`` pages
    is cut at ``width``; entries behind a row's last page are 0, the page that no row owns.
    Meaning after SGLang's scatter for aiter (sgl-project/sglang#23146), whose width is not clamped.
    """
    lens = (kv_indptr[1:] - kv_indptr[:-1]).long()
    column = torch.arange(width, device=kv_indices.device)
    at = kv_indptr[:-1, None].long() + column * page_size
    slots = kv_indices[at.clamp(0, kv_indices.shape[0] - 1)]
    pages = torch.div(slots, page_size, rounding_mode="floor")
    return torch.where(column * page_size < lens[:, None], pages, 0).to(torch.int32)


def _fake(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    return kv_indices.new_empty((kv_indptr.shape[0] - 1, width), dtype=torch.int32)


def _sample(device: str) -> tuple[object, ...]:
    kv_indices = torch.arange(16, 16 + 52, device=device, dtype=torch.int32)
    return kv_indices, torch.tensor([0, 32, 52], device=device), 16, 4


scatter_ragged_to_page_table = define_op(
    "scatter_ragged_to_page_table",
    "(Tensor kv_indices, Tensor kv_indptr, int page_size, SymInt width) -> Tensor",
    reference,
    _fake,
    _sample,
)
