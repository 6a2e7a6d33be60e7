"""``specc::linear``: a few rows times a weight matrix, the bulk of a verify block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specc import compat
from specc.lowerings import triton_kernels
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


# Up to this many rows, and from this many outputs on, cuBLAS was never clearly faster than the kernel
# (benchmarks/NOTES.md): one program sums all of a result, so few outputs are few programs.
ROWS, OUTPUTS = 64, 4096
# Weights in one launch.
MOST = 4
HALVES = (torch.bfloat16, torch.float16)


def kernel_unfit(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Reason:
    """Why the Triton kernel cannot multiply ``x`` by these weights in one launch, or None."""
    given = [each for each in biases if each is not None]
    if len(given) not in (0, len(weights)):
        return "takes biases for all weights or for none"
    if not 1 <= len(weights) <= MOST:
        return f"takes 1 to {MOST} weights, got {len(weights)}"
    dtypes = {each.dtype for each in (x, *weights, *given)}
    if len(dtypes) > 1 or x.dtype not in HALVES:
        return f"needs bfloat16 or float16 throughout, got {', '.join(sorted(map(str, dtypes)))}"
    if x.stride(1) != 1 or not all(each.is_contiguous() for each in (*weights, *given)):
        return "needs contiguous rows, weights and biases"
    return triton_kernels.unfit(x, *weights, *given)


def too_many_rows(x: Tensor, most: int) -> Reason:
    if not isinstance(x.shape[0], int):
        return "is only faster for few rows, and their number is not known"
    return None if x.shape[0] <= most else f"is only faster up to {most} rows, got {x.shape[0]}"


def _triton_supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    return kernel_unfit(x, [weight], [bias])


def _triton_pays(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    if weight.shape[0] < OUTPUTS:
        return f"is only faster from {OUTPUTS} outputs on, got {weight.shape[0]}"
    return too_many_rows(x, ROWS)


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from specc.lowerings.triton_kernels import linear as kernel

    with torch.cuda.device_of(x):
        (product,) = kernel.products(x, [weight], None if bias is None else [bias])
    return product


# For exact graphs where the Triton kernel cannot be taken. Up to this many rows cuBLAS sums a row alike
# in most shapes, beyond it in fewer (an H200, torch 2.11; benchmarks/NOTES.md).
ALIKE = 32


def _in_slices_supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> Reason:
    if not isinstance(x.shape[0], int):
        return "is for a number of rows that is known"
    if x.shape[0] <= ALIKE:
        return f"is for more than {ALIKE} rows, got {x.shape[0]}"
    return None


def _in_slices(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A row's bits depend as little on how many rows there are as cuBLAS' do; the weight is read per slice.

    Slices are of about the same size: one row by itself would be summed differently.
    """
    slices = x.tensor_split(max(1, -(-x.shape[0] // ALIKE)))
    return torch.cat([reference(each, weight, bias) for each in slices])


def _sample(device: str) -> tuple[Tensor, ...]:
    x, weight = (torch.randn(n, 200, device=device, dtype=usual_dtype(device)) for n in (5, 4100))
    return x, weight / 16, torch.randn(4100, device=device, dtype=x.dtype)


linear = define_op(
    "linear",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference,
    _fake,
    _sample,
    (
        Provider("triton", _triton, _triton_supports, priority=20, pays=_triton_pays),
        Provider("onednn", _onednn, _onednn_supports, priority=10),
        # Behind the reference: it is only taken by lower_linear, for exact graphs.
        Provider("in_slices", _in_slices, _in_slices_supports, priority=-10),
    ),
)
