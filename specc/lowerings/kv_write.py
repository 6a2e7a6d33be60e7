"""``specc::kv_write``: put the keys and values of new tokens into the pool."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op

FP8 = torch.float8_e4m3fn
STATES = (torch.float32, torch.float16, torch.bfloat16)


def reference(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Write token t of ``k`` and ``v`` to slot ``slots[t]`` of the pool, in place.

    k: [tokens, Hkv, Dk]; v: [tokens, Hkv, Dv]; k_pages: [num_pages, P, Hkv, Dk];
    v_pages: [num_pages, P, Hkv, Dv], any strides; slots: int64 [tokens], slot = page * P + offset.
    Slots outside the pool are clamped into it; callers send padding to page 0, which no row owns.
    Two live tokens never share a slot. Values are cast to the pool's dtype; k_scale, v_scale: float32 [1]
    or None, divide them first. A pool of float8_e4m3fn saturates at +-448.
    """
    num_pages, page_size = k_pages.shape[:2]
    slots = slots.clamp(0, num_pages * page_size - 1)
    page, offset = slots // page_size, slots % page_size
    for states, pages, scale in ((k, k_pages, k_scale), (v, v_pages, v_scale)):
        stored = to_stored(states, pages.dtype, scale)
        as_bytes(pages).index_put_((page, offset), as_bytes(stored))


def as_bytes(pages: Tensor) -> Tensor:
    """Float8 as its bytes, since not every device indexes it; other numbers as they are."""
    return pages.view(torch.uint8) if pages.dtype == FP8 else pages


def to_stored(states: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """Keys or values as the pool holds them."""
    if scale is not None:
        states = states.float() / scale
    if dtype == FP8:
        limit = torch.finfo(FP8).max
        states = states.float().clamp(-limit, limit)
    return states.to(dtype)


def from_stored(stored: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What ``to_stored`` stored, in ``dtype`` again."""
    return stored.to(dtype) if scale is None else (stored.float() * scale).to(dtype)


def _fake(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    torch._check(k.shape[0] == slots.shape[0], lambda: "kv_write: one slot per token")
    torch._check(v.shape[0] == slots.shape[0], lambda: "kv_write: one slot per token")


def _triton_supports(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Reason:
    if slots.dtype not in triton_kernels.INDICES:
        return f"has no kernel for slots of {slots.dtype}"
    if not slots.shape[0] == k.shape[0] == v.shape[0]:
        return f"needs one slot per token, got {list(slots.shape)} for {list(k.shape)}, {list(v.shape)}"
    if k_pages.shape[:3] != v_pages.shape[:3]:
        return f"needs keys' and values' pages of one shape, got {list(k_pages.shape)}, {list(v_pages.shape)}"
    return (
        _pair_unfit("k", k, k_pages, k_scale)
        or _pair_unfit("v", v, v_pages, v_scale)
        or triton_kernels.unfit(k, v, k_pages, v_pages, slots, k_scale, v_scale)
    )


def _pair_unfit(name: str, states: Tensor, pages: Tensor, scale: Tensor | None) -> Reason:
    if states.dtype not in STATES or pages.dtype not in (*STATES, FP8):
        return f"has no kernel that writes {name} of {states.dtype} to pages of {pages.dtype}"
    if 0 in pages.shape or states.shape[1:] != pages.shape[2:]:
        return f"cannot write {name} of shape {list(states.shape)} to pages of {list(pages.shape)}"
    if states.stride(-1) != 1 or pages.stride(-1) != 1:
        return f"needs {name} and its pages contiguous in the last dimension"
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        return f"needs {name}_scale of float32 [1], got {scale.dtype} {list(scale.shape)}"
    return None


def _triton(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    from specc.lowerings.triton_kernels import kv_write

    with torch.cuda.device_of(k_pages):
        kv_write.kv_write(k, v, k_pages, v_pages, slots, k_scale, v_scale)


def _sample(device: str) -> tuple[Tensor | None, ...]:
    k, v = torch.randn(2, 20, 8, 64, device=device, dtype=usual_dtype(device))
    k_pages, v_pages = torch.zeros(2, 4, 16, 8, 64, device=device, dtype=k.dtype)
    return k, v, k_pages, v_pages, torch.arange(20, 40, device=device), None, None


kv_write = define_op(
    "kv_write",
    "(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots, "
    "Tensor? k_scale, Tensor? v_scale) -> ()",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
