"""specc::linears: one product for each weight, and where the kernel takes them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from specc import compat
from specc.lowerings import linear, linears, triton_kernels


@pytest.mark.parametrize("sizes", [(5,), (3, 1), (7, 7, 2), (2, 3, 4, 5), ()])
@pytest.mark.parametrize("biased", [(False,), (True,), (True, False)])
def test_each_is_the_product_by_itself(sizes: tuple[int, ...], biased: tuple[bool, ...]) -> None:
    x, weights = torch.randn(4, 8), [torch.randn(size, 8) for size in sizes]
    biases = [
        torch.randn(size) if biased[position % len(biased)] else None for position, size in enumerate(sizes)
    ]
    results = linears(x, weights, biases)
    assert len(results) == len(sizes)
    for result, weight, bias in zip(results, weights, biases, strict=True):
        assert torch.equal(result, linear.reference(x, weight, bias))


def test_shapes_that_do_not_go_together() -> None:
    with FakeTensorMode():
        x, w = torch.empty(2, 4), torch.empty(3, 4)
        with pytest.raises(RuntimeError, match="as many biases"):
            linears(x, [w, w], [None])
        with pytest.raises(RuntimeError, match=r"x is \[M, K\]"):
            linears(x, [w, torch.empty(3, 5)], [None, None])


@pytest.mark.parametrize(
    ("rows", "sizes", "provider"),
    [
        (6, (4096, 1024, 1024), "triton"),
        (6, (32, 32), "triton"),
        (64, (14336, 14336), "triton"),
        (65, (14336, 14336), "reference"),
        (65, (1024, 1024), "reference"),
        (128, (8192, 4096, 32, 32), "triton"),
        (129, (8192, 4096, 32, 32), "reference"),
        (128, (8192, 8192, 1024), "reference"),
        (6, (64,) * 5, "reference"),
    ],
)
def test_one_launch_where_it_is_faster(
    rows: int, sizes: tuple[int, ...], provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernels, "obstacle", lambda: None)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16)

    with FakeTensorMode():
        call = empty(rows, 4096), [empty(size, 4096) for size in sizes], [None for _ in sizes]
        assert linears.choose(*call).provider.name == provider
        assert [tuple(y.shape) for y in linears(*call)] == [(rows, size) for size in sizes]


OBSTACLE = compat.cpp_compiler_obstacle()


@pytest.mark.slow
@pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))
def test_inductor_compiles_around_it(fresh_compiler: None) -> None:
    """By a provider's overload, as graphs call it: nothing of it is fused, what is around it is."""

    def gated(x: Tensor, weights: list[Tensor]) -> Tensor:
        gate, up = torch.ops.specc.linears.reference(x + 1, weights, [None, None])
        return torch.nn.functional.silu(gate) * up

    x, weights = torch.randn(3, 8), [torch.randn(5, 8) for _ in range(2)]
    compiled: Callable[..., Tensor] = torch.compile(gated, fullgraph=True)
    torch.testing.assert_close(compiled(x, weights), gated(x, weights))
