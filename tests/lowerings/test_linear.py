"""specc::linear: providers against float64, and who takes what."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from specc.lowerings import linear, triton_kernels
from specc.lowerings.linear import kernel_unfit

SHAPES = [(1, 8, 16), (4, 33, 7), (8, 576, 1536), (17, 5, 3), (0, 4, 4)]


@pytest.mark.parametrize("provider", ["onednn", "in_slices", "reference"])
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
    assert "float32" in dict(half.refused)["onednn"]
    away = linear.choose(torch.empty(2, 4, device="meta"), torch.empty(3, 4, device="meta"), None)
    assert "for CPUs, got meta" in dict(away.refused)["onednn"]


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "obstacle", lambda: None)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("rows", "outputs", "dtype", "provider"),
    [
        (1, 4096, torch.bfloat16, "triton"),
        (64, 128256, torch.float16, "triton"),
        (65, 128256, torch.bfloat16, "reference"),
        (6, 4095, torch.bfloat16, "reference"),
        (6, 4096, torch.float32, "reference"),
    ],
)
def test_the_kernel_is_taken_where_it_is_faster(
    rows: int, outputs: int, dtype: torch.dtype, provider: str
) -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(n, 4096, device="cuda", dtype=dtype) for n in (rows, outputs))
        assert linear.choose(x, weight, None).provider.name == provider
        assert (kernel_unfit(x, [weight], [None]) is None) == (dtype != torch.float32)


@pytest.mark.usefixtures("with_triton")
def test_what_the_kernel_cannot_take() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def strided(rows: int, columns: int, *strides: int) -> torch.Tensor:
        return torch.empty_strided((rows, columns), strides, dtype=torch.bfloat16, device="cuda")

    with FakeTensorMode():
        x, w, b = empty(3, 8), empty(5, 8), empty(5)
        assert kernel_unfit(x, [w, w], [b, b]) is kernel_unfit(strided(3, 8, 20, 1), [w], [None]) is None
        for reason, call in {
            "for all weights or for none": (x, [w, w], [b, None]),
            "1 to 4 weights, got 5": (x, [w] * 5, [None] * 5),
            "bfloat16 or float16 throughout": (x, [w], [empty(5, dtype=torch.float16)]),
            "contiguous rows": (strided(3, 8, 1, 3), [w], [None]),
            "weights and biases": (x, [strided(5, 8, 1, 5)], [None]),
            "got cpu": (empty(3, 8, device="cpu"), [empty(5, 8, device="cpu")], [None]),
        }.items():
            assert reason in str(kernel_unfit(*call)), reason


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
