"""``specc::ragged_kv``: the token slots of a batch's keys, row after row without gaps."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.framework import define_op


def reference(req_to_token: Tensor, kv_lens: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of row r's first ``kv_lens[r]`` tokens are ``kv_indices[kv_indptr[r] : kv_indptr[r + 1]]``.

    req_to_token: int32 [B, capacity]; kv_lens: int64 [B], clamped to 0 .. capacity.
    Returns kv_indptr int64 [B + 1] and kv_indices int32 [B * capacity], 0 behind the last row's end.
    """
    rows, capacity = req_to_token.shape
    lens = kv_lens.clamp(0, capacity)
    kv_indptr = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    at = torch.arange(rows * capacity, device=lens.device)
    row = torch.searchsorted(kv_indptr[1:].contiguous(), at, right=True)
    inside = row < rows
    row = row.clamp(max=rows - 1)
    slots = req_to_token[row, (at - kv_indptr[row]).clamp(0, capacity - 1)]
    return kv_indptr, torch.where(inside, slots, 0)


def _fake(req_to_token: Tensor, kv_lens: Tensor) -> tuple[Tensor, Tensor]:
    rows, capacity = req_to_token.shape
    kv_indptr = kv_lens.new_empty(rows + 1)
    return kv_indptr, req_to_token.new_empty(rows * capacity)


def _sample(device: str) -> tuple[Tensor, ...]:
    req_to_token = torch.arange(64, device=device, dtype=torch.int32).view(2, 32)
    return req_to_token, torch.tensor([20, 32], device=device)


ragged_kv = define_op(
    "ragged_kv", "(Tensor req_to_token, Tensor kv_lens) -> (Tensor, Tensor)", reference, _fake, _sample
)
