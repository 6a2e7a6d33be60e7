"""``specc::kv_write``: put the keys and values of new tokens into the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import define_op


def reference(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    """Write token t of ``k`` and ``v`` to slot ``slots[t]`` of the pool, in place.

    k: [tokens, Hkv, Dk]; v: [tokens, Hkv, Dv]; k_pages: [num_pages, P, Hkv, Dk];
    v_pages: [num_pages, P, Hkv, Dv], any strides; slots: int64 [tokens], slot = page * P + offset.
    Slots outside the pool are clamped into it; callers send padding to page 0, which no row owns.
    Two live tokens never share a slot. Values are cast to the pool's dtype.
    """
    num_pages, page_size = k_pages.shape[:2]
    slots = slots.clamp(0, num_pages * page_size - 1)
    page, offset = slots // page_size, slots % page_size
    k_pages.index_put_((page, offset), k.to(k_pages.dtype))
    v_pages.index_put_((page, offset), v.to(v_pages.dtype))


def _fake(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor) -> None:
    torch._check(k.shape[0] == slots.shape[0], lambda: "kv_write: one slot per token")
    torch._check(v.shape[0] == slots.shape[0], lambda: "kv_write: one slot per token")


def _sample(device: str) -> tuple[Tensor, ...]:
    k, v = torch.randn(2, 20, 8, 64, device=device, dtype=usual_dtype(device))
    k_pages, v_pages = torch.zeros(2, 4, 16, 8, 64, device=device, dtype=k.dtype)
    return k, v, k_pages, v_pages, torch.arange(20, 40, device=device)


kv_write = define_op(
    "kv_write",
    "(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()",
    reference,
    _fake,
    _sample,
)
