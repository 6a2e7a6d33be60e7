"""``specc::greedy_select``: the most likely token of each row, by a rule that holds on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op


def reference(logits: Tensor) -> Tensor:
    """Index of the first maximum along the last dimension.

    logits: floating [..., V], V >= 1. Returns int64 [...], always in [0, V).
    The rule: the lowest index among equal maxima; NaN is below every number, -inf included; a row
    without a number above -inf gives 0. ``torch.argmax`` agrees except that it lets NaN win.
    """
    numbers = torch.where(torch.isnan(logits), -torch.inf, logits)
    return numbers.argmax(dim=-1)


def _fake(logits: Tensor) -> Tensor:
    torch._check(logits.dim() >= 1, lambda: "greedy_select: logits must be [..., V]")
    torch._check(logits.shape[-1] >= 1, lambda: "greedy_select: V must be at least 1")
    return logits.new_empty(logits.shape[:-1], dtype=torch.int64)


def _triton_supports(logits: Tensor) -> Reason:
    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"has no kernel for {logits.dtype}"
    return triton_kernels.unfit(logits)


def _triton(logits: Tensor) -> Tensor:
    from specc.lowerings.triton_kernels import argmax

    with torch.cuda.device_of(logits):
        return argmax.split_argmax(logits)


def _sample(device: str) -> tuple[Tensor, ...]:
    return (torch.randn(4, 1000, device=device, dtype=usual_dtype(device)),)


greedy_select = define_op(
    "greedy_select",
    "(Tensor logits) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
