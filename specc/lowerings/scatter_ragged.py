"""``specc::scatter_ragged_to_page_table``: ragged token slots -> the pages of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.framework import Provider, Reason, define_op


def reference(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    """Entry c of row r is ``kv_indices[kv_indptr[r] + c * P] // P``, for every page row r has tokens on.

    kv_indices: int32 or int64 [tokens], token slots, each page's first token on a page-aligned slot;
    kv_indptr: int32 or int64 [rows + 1]. Returns int32 [rows, width]. A row of more than ``width`` pages
    is cut at ``width``; entries behind a row's last page are 0, the page that no row owns, and so are those
    of negative slots. What ``kv_indptr`` has outside of ``kv_indices`` is clamped into it.
    Meaning after SGLang's scatter for aiter (sgl-project/sglang#23146), whose width is not clamped.
    """
    rows, tokens = kv_indptr.shape[0] - 1, kv_indices.shape[0]
    if tokens == 0:
        return kv_indices.new_zeros((rows, width), dtype=torch.int32)
    lens = (kv_indptr[1:] - kv_indptr[:-1]).long()
    column = torch.arange(width, device=kv_indices.device)
    at = kv_indptr[:-1, None].long() + column * page_size
    pages = kv_indices[at.clamp(0, tokens - 1)].clamp(min=0) // page_size
    return torch.where(column * page_size < lens[:, None], pages, 0).to(torch.int32)


def _fake(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    return kv_indices.new_empty((kv_indptr.shape[0] - 1, width), dtype=torch.int32)


def _triton_supports(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Reason:
    indices = {"kv_indices": kv_indices, "kv_indptr": kv_indptr}
    unfit = triton_kernels.not_integers(*triton_kernels.INDICES, **indices)
    return unfit or triton_kernels.unfit(kv_indices, kv_indptr)


def _triton(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    from specc.lowerings.triton_kernels import page_table

    with torch.cuda.device_of(kv_indices):
        return page_table.from_ragged(kv_indices, kv_indptr, page_size, width)


def _sample(device: str) -> tuple[object, ...]:
    kv_indices = torch.arange(16, 16 + 52, device=device, dtype=torch.int32)
    return kv_indices, torch.tensor([0, 32, 52], device=device), 16, 4


scatter_ragged_to_page_table = define_op(
    "scatter_ragged_to_page_table",
    "(Tensor kv_indices, Tensor kv_indptr, int page_size, SymInt width) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
