"""``specc::linear``: a few rows times a weight matrix, the bulk of a verify block on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from specc import compat
from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``. x: [M, K]; weight: [N, K]; bias: [N] or None; returns [M, N]."""
    if bias is None:
        return torch.ops.aten.mm.default(x, weight.t())
    return torch.ops.aten.addmm.default(bias, x, weight.t())


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(x.shape[1] == weight.shape[1], lambda: "linear: x is [M, K] and weight [N, K]")
    return x.new_empty(x.shape[0], weight.shape[0])


def _onednn_supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    if x.device.type != "cpu":
        return f"is for CPUs, got {x.device.type}"
    if any(each.dtype != torch.float32 for each in (x, weight, bias) if each is not None):
        return f"is only taken for float32, got {x.dtype}: elsewhere aten uses oneDNN by itself"
    if x.shape[1] == 0:
        return "has no kernel for rows of length 0"
    if not torch.backends.mkldnn.is_available():
        return "this torch is built without oneDNN"
    return None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's inner product takes the weight as it lies in memory.

    ``aten::mm`` hands float32 to the BLAS, whose kernels for 2 to 16 rows read the weight at a half to
    a third of the speed (figures in benchmarks/NOTES.md).
    """
    return compat.onednn_linear(x, weight, bias)


# cuBLAS takes the same sums for a row in products of up to this many rows (measured on an H200: eight
# shapes, torch 2.11), and not always beyond.
ALIKE = 32


def _in_slices_supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    if not isinstance(x.shape[0], int):
        return "is for a number of rows that is known"
    if x.shape[0] <= ALIKE:
        return f"is for more than {ALIKE} rows, got {x.shape[0]}"
    return None


def _in_slices(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A row's bits do not depend on how many rows there are; the weight is read once per slice.

    Slices are of about the same size: one row by itself would be summed differently.
    """
    slices = x.tensor_split(max(1, -(-x.shape[0] // ALIKE)))
    return torch.cat([reference(each, weight, bias) for each in slices])


def _sample(device: str) -> tuple[Tensor, ...]:
    x, weight = (torch.randn(n, 64, device=device, dtype=usual_dtype(device)) for n in (4, 96))
    return x, weight, torch.randn(96, device=device, dtype=x.dtype)


linear = define_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference,
    _fake,
    _sample,
    (
        Provider("onednn", _onednn, _onednn_supports, priority=10),
        # Behind the reference: it is only taken by lower_linear, for exact graphs.
        Provider("in_slices", _in_slices, _in_slices_supports, priority=-10),
    ),
)
