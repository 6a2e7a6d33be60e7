"""Products with a transposed weight become specc::linear on CPUs, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from specc.options import Options
from specc.passes import PassContext, PassResult, lower_linear

aten = torch.ops.aten


def rewritten(
    function: Callable[..., Any], *inputs: torch.Tensor, **options: Any
) -> tuple[torch.fx.GraphModule, PassResult]:
    gm = make_fx(function, tracing_mode="fake")(*inputs)
    result = lower_linear.PASS.run(gm, PassContext(Options.parse(options)))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm, result


def count(gm: torch.fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


X, W, B = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, w: torch.nn.functional.linear(x, w), (X, W)),
        (lambda x, w, b: torch.nn.functional.linear(x, w, b), (X, W, B)),
        (lambda x, w: x @ w.t(), (X, W)),
        (lambda x, w: torch.nn.functional.linear(x, w), (torch.randn(2, 3, 4), W)),
    ],
)
def test_fires(function: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    gm, result = rewritten(function, *inputs)
    assert result.matched == 1
    assert count(gm, torch.ops.specc.linear.default) == 1
    assert count(gm, aten.mm.default) + count(gm, aten.addmm.default) + count(gm, aten.t.default) == 0
    torch.testing.assert_close(gm(*inputs), function(*inputs))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, w: x @ w, (X, W.t().contiguous())),  # no transpose: the weight lies the other way
        (lambda x, w: x @ w.t(), (X, torch.randn(4, 5).t())),  # a transposed view of one
        (lambda x, w: torch.bmm(x, w), (torch.randn(2, 3, 4), torch.randn(2, 4, 5))),
    ],
)
def test_leaves_other_products_alone(function: Any, inputs: tuple[torch.Tensor, ...]) -> None:
    gm, result = rewritten(function, *inputs)
    assert (result.matched, result.remarks) == (0, [])
    assert count(gm, torch.ops.specc.linear.default) == 0


def refusal(result: PassResult) -> str:
    (remark,) = result.remarks
    assert (result.matched, remark.status) == (0, "refused")
    return remark.reason


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (1,), (3, 1)])
def test_refuses_what_is_no_bias(shape: tuple[int, ...]) -> None:
    added = torch.randn(shape)
    gm, result = rewritten(lambda b, x, w: torch.addmm(b, x, w.t()), added, X, W)
    assert "no bias of one entry per output" in refusal(result)
    torch.testing.assert_close(gm(added, X, W), torch.addmm(added, X, W.t()))


def test_refuses_rows_of_length_zero() -> None:
    _, result = rewritten(lambda x, w: x @ w.t(), torch.randn(3, 0), torch.randn(5, 0))
    assert "rows of length 0" in refusal(result)


def test_refuses_where_nothing_beats_aten() -> None:
    with FakeTensorMode():
        x, w = (torch.empty(shape, device="cuda") for shape in ((3, 4), (5, 4)))
        gm = make_fx(torch.nn.functional.linear)(x, w)
        reason = refusal(lower_linear.PASS.run(gm, PassContext(Options())))
    assert "for CPUs, got cuda" in reason
    _, result = rewritten(torch.nn.functional.linear, X.bfloat16(), W.bfloat16())
    assert "float32" in refusal(result)
    _, result = rewritten(torch.nn.functional.linear, X, W, providers={"linear": "reference"})
    assert "reference" in refusal(result)


@pytest.mark.parametrize(("rows", "slices"), [(32, False), (33, True), (100, True)])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_products_of_many_rows_take_them_in_slices(rows: int, slices: bool, bias: bool) -> None:
    inputs = (torch.randn(rows, 4), W, *([B] if bias else []))
    gm, result = rewritten(torch.nn.functional.linear, *inputs, exact=True)
    assert result.matched == 1
    assert count(gm, torch.ops.specc.linear.in_slices) == slices
    torch.testing.assert_close(gm(*inputs), torch.nn.functional.linear(*inputs))


def test_a_provider_that_is_asked_for_comes_before_exactness() -> None:
    gm, _ = rewritten(
        torch.nn.functional.linear, torch.randn(40, 4), W, exact=True, providers={"linear": "onednn"}
    )
    assert count(gm, torch.ops.specc.linear.default) == 1
