"""Products with a transposed weight become specc::linear, or several at once specc::linears."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from specc.lowerings import linear, linears, triton_kernels
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
    assert "needs bfloat16 or float16" in reason
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


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernel takes tensors of any device, and wants them for any size."""
    monkeypatch.setattr(triton_kernels, "unfit", lambda *_: None)
    # The package's attribute of that name is the operator.
    monkeypatch.setattr(importlib.import_module("specc.lowerings.linear"), "OUTPUTS", 1)


def by_references(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same graph, runnable without a GPU."""
    for node in gm.graph.nodes:
        op = {"specc.linear": linear, "specc.linears": linears}.get(str(node.target).rpartition(".")[0])
        node.target = node.target if op is None else op.reference
    gm.recompile()
    return gm


def halves(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def attention(x: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
    queries, keys, values = (torch.nn.functional.linear(x, each) for each in (q, k, v))
    return torch.nn.functional.linear(queries * keys.sum() + values.sum(), o)


def gated(x: Any, gate: Any, up: Any, down: Any) -> Any:
    activated = torch.nn.functional.silu(torch.nn.functional.linear(x, gate))
    return torch.nn.functional.linear(activated * torch.nn.functional.linear(x, up), down)


X3 = halves(2, 3, 4)
LAYERS = [
    (attention, (X3, halves(8, 4), halves(2, 4), halves(2, 4), halves(4, 8))),
    (gated, (X3, halves(6, 4), halves(6, 4), halves(4, 6))),
]


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("function", "inputs"), LAYERS)
def test_products_of_the_same_rows_share_a_launch(function: Any, inputs: Any, exact: bool) -> None:
    gm, result = rewritten(function, *inputs, exact=exact)
    shared = len(inputs) - 2
    overload = "triton" if exact else "default"
    called = [str(node.target) for node in gm.graph.nodes if "specc.linear" in str(node.target)]
    assert called == [f"specc.linears.{overload}", f"specc.linear.{overload}"]
    assert count(gm, aten.mm.default) + count(gm, aten.t.default) == 0
    assert result.matched == shared + 1
    assert sum("shares one launch with" in remark.reason for remark in result.remarks) == shared
    gm.graph.lint()
    assert torch.equal(by_references(gm)(*inputs), function(*inputs))


@pytest.mark.usefixtures("anywhere")
def test_launches_take_at_most_four_and_biases_for_all_or_none() -> None:
    weights, biases = [halves(n, 4) for n in range(1, 8)], [halves(n) for n in range(1, 3)]

    def many(x: Any, *parameters: Any) -> Any:
        weights, biases = parameters[:7], parameters[7:]
        with_bias = [torch.nn.functional.linear(x, *each) for each in zip(weights, biases, strict=False)]
        return (*with_bias, *(torch.nn.functional.linear(x, weight) for weight in weights[2:]))

    inputs = (halves(3, 4), *weights, *biases)
    gm, result = rewritten(many, *inputs)
    sizes = [
        [weight.meta["val"].shape[0] for weight in node.args[1]]
        for node in gm.graph.find_nodes(op="call_function", target=linears.overload)
    ]
    assert sorted(sizes) == [[1, 2], [3, 4, 5, 6]]
    assert (count(gm, linear.overload), result.matched) == (1, 7)
    for ours, expected in zip(by_references(gm)(*inputs), many(*inputs), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("anywhere")
def test_products_of_products() -> None:
    """A group's rows may be another group's product, whose node is gone by then."""

    def chain(x: Any, *weights: Any) -> Any:
        a, b = (x @ weight.t() for weight in weights[:2])
        c, d = (a @ weight.t() for weight in weights[2:])
        return a, b, c, d

    inputs = (halves(3, 4), *(halves(4, 4) for _ in range(4)))
    gm, result = rewritten(chain, *inputs)
    assert (count(gm, linears.overload), result.matched) == (2, 4)
    for ours, expected in zip(by_references(gm)(*inputs), chain(*inputs), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.usefixtures("anywhere")
def test_a_weight_that_depends_on_a_product_stays_apart() -> None:
    def tied(x: Any, w: Any) -> Any:
        first = x @ w.t()
        return first @ (x @ (w * first.sum()).t()).t()

    inputs = (halves(4, 4), halves(4, 4))
    gm, _ = rewritten(tied, *inputs)
    assert count(gm, linears.overload) == 0
    assert torch.equal(by_references(gm)(*inputs), tied(*inputs))


@pytest.mark.usefixtures("anywhere")
def test_a_weight_that_comes_later_moves_the_launch() -> None:
    def late(x: Any, v: Any, w: Any) -> Any:
        first = x @ v.t()
        second = x @ (w * 2).t()
        return first + second

    inputs = (halves(3, 4), halves(5, 4), halves(5, 4))
    gm, _ = rewritten(late, *inputs)
    assert count(gm, linears.overload) == 1
    assert torch.equal(by_references(gm)(*inputs), late(*inputs))


@pytest.mark.usefixtures("anywhere")
def test_nothing_moves_across_a_change_in_place() -> None:
    def changing(x: Any, v: Any, w: Any) -> Any:
        first = x @ v.t()
        x.add_(1)
        return first + x @ w.t()

    inputs = (halves(3, 4), halves(5, 4), halves(5, 4))
    gm, _ = rewritten(changing, *inputs)
    assert (count(gm, linears.overload), count(gm, linear.overload)) == (0, 2)
    expected = changing(inputs[0].clone(), *inputs[1:])
    assert torch.equal(by_references(gm)(inputs[0].clone(), *inputs[1:]), expected)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("providers", [{"linear": "reference"}, {"linears": "reference"}])
def test_a_provider_that_is_asked_for_prevents_shared_launches(
    providers: dict[str, str], exact: bool
) -> None:
    gm, _ = rewritten(*(gated, *LAYERS[1][1]), providers=providers, exact=exact)
    called = [str(node.target) for node in gm.graph.nodes if "specc.linear" in str(node.target)]
    overload = "triton" if exact else "default"
    assert called == ([] if "linear" in providers else [f"specc.linear.{overload}"] * 3)


@pytest.mark.usefixtures("anywhere")
def test_many_rows_are_for_exact_graphs_only() -> None:
    inputs = (halves(200, 4), halves(6, 4), halves(6, 4), halves(4, 6))
    gm, result = rewritten(gated, *inputs)
    assert (result.matched, count(gm, aten.mm.default)) == (0, 3)
    assert all("only faster up to 64 rows" in remark.reason for remark in result.remarks)
    gm, result = rewritten(gated, *inputs, exact=True)
    assert (result.matched, count(gm, aten.mm.default)) == (3, 0)
    assert count(gm, torch.ops.specc.linear.in_slices) == 0


@pytest.mark.usefixtures("anywhere")
def test_exact_leaves_prompts_of_any_length_to_the_library() -> None:
    """Their graph is the same with and without drafts."""
    gm = make_fx(gated, tracing_mode="symbolic")(halves(3, 4), halves(6, 4), halves(6, 4), halves(4, 6))
    result = lower_linear.PASS.run(gm, PassContext(Options(exact=True)))
    assert (result.matched, count(gm, aten.mm.default)) == (0, 3)
    assert all("their number is not known" in remark.reason for remark in result.remarks)


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("tracing", ["fake", "symbolic"])
def test_a_kernel_that_is_asked_for_need_not_pay(rows: int, tracing: Any) -> None:
    """For prompts of any length, too: the drop-in's graphs share their options."""
    inputs = (halves(rows, 4), halves(6, 4), halves(6, 4), halves(4, 6))
    gm = make_fx(gated, tracing_mode=tracing)(*inputs)
    providers = {"linear": "triton", "linears": "triton"}
    result = lower_linear.PASS.run(gm, PassContext(Options.parse({"providers": providers})))
    assert (result.matched, count(gm, aten.mm.default)) == (3, 0)
    assert (count(gm, linears.overload), count(gm, linear.overload)) == (1, 1)
