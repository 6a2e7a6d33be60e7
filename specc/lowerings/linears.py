"""``specc::linears``: a few rows times several weights, which a GPU reads in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import Provider, Reason, define_op
from specc.lowerings.linear import ROWS, kernel_unfit, too_many_rows
from specc.lowerings.linear import reference as product

# A launch for each of three or more weights costs cuBLAS so much that it is behind up to here, as long as
# they are small (benchmarks/NOTES.md).
SEVERAL, SMALL, ROWS_OF_SEVERAL = 3, 16384, 128


def reference(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """``x @ weight.T + bias`` of each. x: [M, K]; weights: [N, K], any N; biases: [N] or None, as many."""
    return [product(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    torch._check(len(weights) == len(biases), lambda: "linears: as many biases, or None, as weights")
    for weight in weights:
        torch._check(x.shape[1] == weight.shape[1], lambda: "linears: x is [M, K] and weights [N, K]")
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _triton_pays(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Reason:
    small = len(weights) >= SEVERAL and sum(len(weight) for weight in weights) <= SMALL
    return too_many_rows(x, ROWS_OF_SEVERAL if small else ROWS)


def _triton(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    from specc.lowerings.triton_kernels import linear as kernel

    given = [each for each in biases if each is not None]
    with torch.cuda.device_of(x):
        return kernel.products(x, list(weights), given or None)


def _sample(device: str) -> tuple[object, ...]:
    x = torch.randn(5, 256, device=device, dtype=usual_dtype(device))
    weights, biases = ([x.new_ones(n, *k).normal_() for n in (96, 100, 1)] for k in ((256,), ()))
    return x, weights, biases


linears = define_op(
    "linears",
    "(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, kernel_unfit, priority=10, pays=_triton_pays),),
)
