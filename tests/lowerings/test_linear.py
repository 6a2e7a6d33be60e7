"""specc::linear: providers against float64, and who takes what."""

from __future__ import annotations

import pytest
import torch

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
