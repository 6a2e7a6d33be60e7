"""specc::linear: providers against float64, and who takes what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specc.lowerings import linear

SHAPES = [(1, 8, 16), (4, 33, 7), (8, 576, 1536), (17, 5, 3), (0, 4, 4)]


@pytest.mark.parametrize("provider", [each.name for each in linear.providers])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
def test_against_float64(provider: str, biased: bool, rows: int, inner: int, outer: int) -> None:
    x, weight = torch.randn(rows, inner), torch.randn(outer, inner)
    bias = torch.randn(outer) if biased else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    result = getattr(torch.ops.specc.linear, provider)(x, weight, bias)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5 * inner**0.5)


def test_onednn_is_for_float32_on_cpus() -> None:
    taken = linear.choose(torch.randn(2, 4), torch.randn(3, 4), None)
    assert taken.provider.name == "onednn"
    half = linear.choose(torch.randn(2, 4).bfloat16(), torch.randn(3, 4).bfloat16(), None)
    assert half.provider.name == "reference"
    assert "float32" in half.refused[0][1]
    away = linear.choose(torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta"), None)
    assert "for CPUs, got meta" in away.refused[0][1]


class _Products(TorchDispatchMode):
    """Takes down how many rows each product has."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [33, 64, 65, 97, 200])
def test_slices_are_neither_long_nor_single_rows(rows: int) -> None:
    """One row by itself would be summed by another kernel than rows of the same block before it."""
    x, weight = torch.randn(rows, 8), torch.randn(5, 8)
    (provider,) = (each for each in linear.providers if each.name == "in_slices")
    with _Products() as products:
        sliced = provider.run(x, weight, None)
    assert sum(products.rows) == rows
    assert 16 <= min(products.rows) <= max(products.rows) <= 32
    torch.testing.assert_close(sliced, x @ weight.t())
