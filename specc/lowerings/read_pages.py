"""``specc::read_pages``: a pool's keys or values as the dense tensor that stock attention expects."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import define_op
from specc.lowerings.kv_write import as_bytes, from_stored


def reference(pages: Tensor, req_to_token: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Copy each row's slots out of the pool: [B, Hkv, capacity, D] in ``dtype``.

    pages: [num_pages, P, Hkv, D]; req_to_token: int32 [B, capacity], the slot of each position (0 where
    a row has none); scale: float32 [1] or None, multiplies what the pool holds. Slots are clamped.
    """
    num_pages, page_size = pages.shape[:2]
    slots = req_to_token.long().clamp(0, num_pages * page_size - 1)
    rows = as_bytes(pages)[slots // page_size, slots % page_size].view(pages.dtype)
    return from_stored(rows, dtype, scale).transpose(1, 2).contiguous()


def _fake(pages: Tensor, req_to_token: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    rows, capacity = req_to_token.shape
    return pages.new_empty((rows, pages.shape[2], capacity, pages.shape[3]), dtype=dtype)


def _sample(device: str) -> tuple[object, ...]:
    dtype = usual_dtype(device)
    pages = torch.randn(4, 16, 8, 64, device=device, dtype=dtype)
    return pages, torch.arange(64, device=device, dtype=torch.int32).view(2, 32), None, dtype


read_pages = define_op(
    "read_pages",
    "(Tensor pages, Tensor req_to_token, Tensor? scale, ScalarType dtype) -> Tensor",
    reference,
    _fake,
    _sample,
)
