"""greedy_select: every spelling of topk(softmax(x), k=1) becomes specc::greedy_select, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.testing import FileCheck

from specc.passes import PASSES, greedy_select
from tests.passes.graphs import Run, apply, compile_with, count, trace_on

aten = torch.ops.aten
OP = torch.ops.specc.greedy_select.default
SOFTMAX = (aten._softmax.default, aten._log_softmax.default)
REDUCTIONS = (aten.topk.default, aten.max.dim, aten.argmax.default, aten.sort.default)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Form = Callable[..., Any]


def spaced(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits whose maxima are so far ahead that no dtype rounds them, or their probabilities, to a tie."""
    x = torch.randn(shape)
    return x.scatter(-1, torch.randint(shape[-1], (*shape[:-1], 1)), 5.0).to(dtype)


INDEX_ONLY: dict[str, Form] = {
    "torch.softmax, topk": lambda x: torch.softmax(x, -1).topk(1).indices,
    "F.softmax, topk": lambda x: F.softmax(x, dim=-1).topk(1)[1],
    "nn.Softmax, topk": lambda x: nn.Softmax(dim=-1)(x).topk(1)[1],
    "method, topk": lambda x: x.softmax(-1).topk(1)[1],
    "torch.special.softmax": lambda x: torch.special.softmax(x, -1).topk(1)[1],
    "positive dims": lambda x: torch.topk(x.softmax(1), 1, 1, True, True)[1],
    "dim from the rank": lambda x: torch.topk(x.softmax(x.dim() - 1), k=1, dim=x.dim() - 1).indices,
    "unsorted": lambda x: torch.topk(F.softmax(x, -1), k=1, dim=-1, largest=True, sorted=False)[1],
    "max": lambda x: x.softmax(-1).max(-1).indices,
    "max, keepdim": lambda x: torch.max(x.softmax(-1), dim=1, keepdim=True)[1],
    "argmax": lambda x: x.softmax(-1).argmax(-1),
    "argmax, keepdim": lambda x: torch.argmax(x.softmax(-1), dim=-1, keepdim=True),
    "log_softmax, topk": lambda x: torch.log_softmax(x, -1).topk(1)[1],
    "log_softmax, argmax": lambda x: F.log_softmax(x, -1).argmax(-1),
    "temperature": lambda x: (x / 0.7).softmax(-1).topk(1)[1],
    "inverse temperature": lambda x: (x * 3).softmax(-1).argmax(-1),
    "temperature, cast, softmax, cast": lambda x: (x.float() / 2).softmax(-1).to(x.dtype).topk(1)[1],
    "float": lambda x: x.float().softmax(-1).topk(1)[1],
    "dtype": lambda x: F.softmax(x, -1, dtype=torch.float32).topk(1)[1],
    "one row of several": lambda x: x.softmax(-1)[-1].topk(1)[1],
    "rows of several": lambda x: x.softmax(-1)[1:].argmax(-1),
}

WITH_VALUE: dict[str, Form] = {
    "topk": lambda x: torch.softmax(x, -1).topk(1),
    "max": lambda x: x.softmax(-1).max(-1),
    "max, keepdim": lambda x: x.softmax(-1).max(-1, keepdim=True),
    "log_softmax, topk": lambda x: torch.log_softmax(x, -1).topk(1),
    "log_softmax, max": lambda x: x.log_softmax(-1).max(-1),
    "temperature": lambda x: (x / 0.7).softmax(-1).topk(1),
    "dtype": lambda x: F.softmax(x, -1, dtype=torch.float32).topk(1),
    "cast there and back": lambda x: F.softmax(x, -1, dtype=torch.float32).to(x.dtype).topk(1),
    "double": lambda x: x.log_softmax(-1, dtype=torch.float64).topk(1),
    "one row of several": lambda x: x.softmax(-1)[-1].topk(1),
    "rows of several": lambda x: x.log_softmax(-1)[1:].max(-1),
}

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.mark.parametrize("functionalize", [False, True])
@pytest.mark.parametrize("form", INDEX_ONLY)
def test_index_only(form: str, functionalize: bool) -> None:
    fn, x = INDEX_ONLY[form], spaced(3, 33, dtype=torch.bfloat16)
    run = compile_with(greedy_select.PASS, fn, x, functionalize=functionalize)
    assert (count(run.before, *SOFTMAX), count(run.before, OP)) == (1, 0)
    assert run.result.matched == count(run.after, OP) == 1
    assert (
        count(run.after, *SOFTMAX, *REDUCTIONS, aten.div.Tensor, aten.mul.Tensor, aten._to_copy.default) == 0
    )
    assert_same(run.output, fn(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", WITH_VALUE)
def test_index_and_value(form: str, dtype: torch.dtype) -> None:
    fn, x = WITH_VALUE[form], spaced(3, 33, dtype=dtype)
    run = compile_with(greedy_select.PASS, fn, x)
    assert run.result.matched == count(run.after, OP) == 1
    assert count(run.after, *SOFTMAX, *REDUCTIONS) == 0
    assert_same(run.output, tuple(fn(x)))
    assert_remark(run, "fired", "index and value")


@pytest.mark.parametrize("form", ["topk", "log_softmax, max", "rows of several"])
def test_dynamic_shapes(form: str) -> None:
    fn, x = WITH_VALUE[form], spaced(3, 33)
    run = compile_with(greedy_select.PASS, fn, x, dynamic=True)
    assert run.result.matched == count(run.after, OP) == 1
    assert_same(run.output, tuple(fn(x)))


def test_value_of_rows_that_have_none() -> None:
    nan, inf = float("nan"), float("inf")
    x = torch.tensor(
        [[1.0, nan, 2.0], [-inf, -inf, -inf], [0.0, inf, 1.0], [-inf, 0.0, -inf], [0.0, 0.0, 0.0]]
    )
    run = compile_with(greedy_select.PASS, lambda x: x.softmax(-1).topk(1), x)
    torch.testing.assert_close(run.output[0], x.softmax(-1).topk(1)[0], equal_nan=True)
    assert run.output[1].flatten().tolist() == [2, 0, 1, 1, 0]


def test_logits_decide_where_probabilities_tie() -> None:
    x = torch.tensor([[0.0, 1e-8, 0.0]])
    assert x.softmax(-1)[0, 1] == x.softmax(-1)[0, 0]
    run = compile_with(greedy_select.PASS, lambda x: x.softmax(-1).topk(1)[1], x)
    assert run.output.item() == 1


def test_tensor_temperature_keeps_the_division() -> None:
    def fn(x: Tensor, t: Tensor) -> Tensor:
        return (x / t).softmax(-1).topk(1)[1]

    x, t = spaced(3, 33), torch.tensor([[1.0], [-1.0], [0.5]])
    run = compile_with(greedy_select.PASS, fn, x, t)
    assert (run.result.matched, count(run.after, aten.div.Tensor), count(run.after, *SOFTMAX)) == (1, 1, 0)
    assert_same(run.output, fn(x, t))


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("inf"), float("nan")])
def test_only_a_positive_scale_is_skipped(scale: float) -> None:
    run = compile_with(greedy_select.PASS, lambda x: (x * scale).softmax(-1).argmax(-1), spaced(3, 33))
    (call,) = run.after.graph.find_nodes(op="call_function", target=OP)
    assert call.args[0].target == aten.mul.Tensor


def test_a_narrowing_cast_is_kept() -> None:
    run = compile_with(greedy_select.PASS, lambda x: x.bfloat16().softmax(-1).argmax(-1), spaced(3, 33))
    (call,) = run.after.graph.find_nodes(op="call_function", target=OP)
    assert call.args[0].target == aten._to_copy.default


def test_several_sites() -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.softmax(-1).topk(1)[1], (x + 1).log_softmax(-1).argmax(-1)

    x = spaced(3, 33)
    run = compile_with(greedy_select.PASS, fn, x)
    assert run.result.matched == count(run.after, OP) == 2
    assert_same(run.output, fn(x))


def test_new_nodes_name_their_source() -> None:
    def drafted(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.softmax(-1).topk(1)

    run = compile_with(greedy_select.PASS, drafted, spaced(3, 33))
    for node in run.after.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert "in drafted" in node.meta["stack_trace"]
    assert "topk(1)" in run.result.remarks[0].source


NEGATIVE: dict[str, tuple[Form, str]] = {
    "k = 2": (lambda x: x.softmax(-1).topk(2)[1], "k is 2"),
    "smallest": (lambda x: x.softmax(-1).topk(1, largest=False)[1], "largest=False"),
    "softmax over rows": (lambda x: x.softmax(0).topk(1)[1], "softmax runs over dim 0"),
    "topk over rows": (lambda x: x.softmax(-1).topk(1, dim=0)[1], "selection runs over dim 0"),
    "argmax over all": (lambda x: x.softmax(-1).argmax(), "selection runs over dim None"),
    "argmax of a vocabulary slice": (lambda x: x.softmax(-1)[:, 1:9].argmax(-1), "vocabulary dim"),
    "one column": (lambda x: x.softmax(-1)[:, 3].argmax(-1), "vocabulary dim"),
    "value only": (lambda x: x.softmax(-1).topk(1)[0], "only the value"),
    "sort": (lambda x: x.softmax(-1).sort(-1, descending=True)[1], "sort orders whole rows"),
    "argsort": (lambda x: x.softmax(-1).argsort(-1, descending=True), "sort orders whole rows"),
    "cast to int": (lambda x: x.softmax(-1).int().argmax(-1), "kind of number"),
    "returned": (lambda x: (lambda p: (p, p.topk(1)[1]))(x.softmax(-1)), "another reader: output"),
    "sampled too": (
        lambda x: (lambda p: (p.argmax(-1), p.sum(-1)))(x.softmax(-1)),
        "another reader: sum",
    ),
    "written to": (lambda x: (lambda p: (p[0].zero_(), p.topk(1)[1])[1])(x.softmax(-1)), "another reader"),
}


@pytest.mark.parametrize("form", NEGATIVE)
def test_refused(form: str) -> None:
    fn, reason = NEGATIVE[form]
    x = spaced(3, 33)
    run = compile_with(greedy_select.PASS, fn, x)
    assert (run.result.matched, count(run.after, OP), run.unchanged) == (0, 0, True)
    assert_remark(run, "refused", reason)
    assert_same(run.output, fn(x))


UNRELATED: dict[str, Form] = {
    "sampling": lambda x: x.softmax(-1).multinomial(1),
    "router without softmax": lambda x: x.sigmoid().topk(1)[1],
    "argmax of logits": lambda x: x.argmax(-1),
    "softmax alone": lambda x: x.softmax(-1),
    "another dead reader": lambda x: (x.softmax(-1).topk(1), x)[1] + 1,
}


@pytest.mark.parametrize("form", UNRELATED)
def test_not_a_site(form: str) -> None:
    run = compile_with(greedy_select.PASS, UNRELATED[form], spaced(3, 33))
    assert (run.reasons, run.unchanged) == ([], True)


def zeroed_logits(x: Tensor) -> Tensor:
    p = x.softmax(-1)
    x.zero_()
    return p.topk(1)[1]


def zeroed_before_softmax(x: Tensor) -> Tensor:
    scaled = x / 0.5
    x.zero_()
    return scaled.softmax(-1).topk(1)[1]


def banned(x: Tensor) -> Tensor:
    scaled = x / 0.5
    scaled[:, :16] = -float("inf")
    return scaled.softmax(-1).topk(1)[1]


@pytest.mark.parametrize("functionalize", [False, True])
@pytest.mark.parametrize("fn", [zeroed_logits, zeroed_before_softmax, banned])
def test_a_mutation_straddles(fn: Form, functionalize: bool) -> None:
    x = spaced(8, 33)
    expected, left = fn(y := x.clone()), y
    run = compile_with(greedy_select.PASS, fn, x, functionalize=functionalize)
    assert run.result.matched == 1
    assert_same((run.output, x), (expected, left))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_fake_cuda(dtype: torch.dtype) -> None:
    gm = trace_on("cuda", lambda x: F.softmax(x, -1, dtype=torch.float32).topk(1), (2, 33), dtype=dtype)
    run = apply(greedy_select.PASS, gm)
    assert_remark(run, "fired", "cuda")
    FileCheck().check("specc.greedy_select.default").check_not("softmax").check_not("topk").run(
        run.after.code
    )
    (call,) = run.after.graph.find_nodes(op="call_function", target=OP)
    assert (call.args[0].op, call.meta["val"].device.type) == ("placeholder", "cuda")
    value, index = run.after.graph.output_node().args[0]
    assert (value.meta["val"].dtype, index.meta["val"].dtype) == (torch.float32, torch.int64)


def test_on_fake_hip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.2")
    gm = trace_on("cuda", lambda x: x.softmax(-1).topk(1)[1], (2, 33), dtype=torch.bfloat16)
    run = apply(greedy_select.PASS, gm)
    assert_remark(run, "fired", "not a vendor's argmax")


def test_the_platform_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(greedy_select.PLATFORMS) == {"cpu", "cuda", "hip", "npu"}
    assert greedy_select.platform(torch.device("cuda")).allowed
    assert not greedy_select.platform(torch.device("xpu")).allowed
    monkeypatch.setitem(greedy_select.PLATFORMS, "cpu", greedy_select.Platform(False, "of a test"))
    run = compile_with(greedy_select.PASS, lambda x: x.softmax(-1).topk(1)[1], spaced(3, 33))
    assert (run.result.matched, run.unchanged) == (0, True)
    assert_remark(run, "refused", "platform: of a test")


ON_OTHER_DEVICES = """
    import types

    import torch
    from specc.passes import greedy_select
    from tests.passes.graphs import apply, trace_on

    torch.utils.rename_privateuse1_backend("npu")
    absent = types.SimpleNamespace(is_available=lambda: False, is_initialized=lambda: False)
    torch._register_device_module("npu", absent)
    gm = trace_on("npu", lambda x: x.softmax(-1).topk(1)[1], (2, 33), dtype=torch.float16)
    print(*apply(greedy_select.PASS, gm).reasons)
    gm = trace_on("meta", lambda x: x.softmax(-1).topk(1)[1], (2, 33), dtype=torch.float16)
    print(*apply(greedy_select.PASS, gm).reasons)
"""


def test_on_fake_npu_and_on_an_unlisted_device() -> None:
    command = [sys.executable, "-c", textwrap.dedent(ON_OTHER_DEVICES)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    npu, unlisted = done.stdout.splitlines()
    FileCheck().check("fired").check("npu").run(npu)
    FileCheck().check("refused").check("platform").check("meta").run(unlisted)


def test_order_of_the_passes() -> None:
    names = [each.name for each in PASSES if each.level == "aten"]
    ours = [name for name in names if name in ("greedy_select", "prune_logits", "choose_providers")]
    assert ours == ["greedy_select", "prune_logits", "choose_providers"]


@pytest.mark.parametrize("inductor", [False, True])
def test_through_the_backend(inductor: bool, tmp_path: Path, fresh_compiler: None) -> None:
    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.softmax(-1).topk(1)

    x = spaced(3, 33)
    options = {"inductor": inductor, "dump": str(tmp_path)}
    with torch.no_grad():
        compiled = torch.compile(fn, backend="specc", options=options)(x)
    assert_same(compiled, tuple(fn(x)))
    (after,) = tmp_path.glob("graph_*/*_aten_greedy_select.after.py")
    FileCheck().check("specc.greedy_select.default").check_not("topk").run(after.read_text())
    (remarks,) = tmp_path.glob("graph_*/remarks.txt")
    FileCheck().check("greedy_select: fired").check("test_greedy_select.py").run(remarks.read_text())


def test_the_pass_can_be_left_out(tmp_path: Path, fresh_compiler: None) -> None:
    options = {"inductor": False, "dump": str(tmp_path), "disable_passes": ["greedy_select"]}
    with torch.no_grad():
        torch.compile(lambda x: x.softmax(-1).topk(1)[1], backend="specc", options=options)(spaced(3, 33))
    assert "greedy_select" not in next(tmp_path.glob("graph_*/remarks.txt")).read_text()


def assert_same(actual: Any, expected: Any) -> None:
    """Indices exactly, values to the rounding of their dtype; the same dtypes and shapes."""
    actual, expected = as_tuple(actual), as_tuple(expected)
    assert len(actual) == len(expected)
    for got, wanted in zip(actual, expected, strict=True):
        tolerance = TOLERANCE.get(wanted.dtype, 0.0)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def assert_remark(run: Run, status: str, reason: str) -> None:
    assert [(found, reason in text) for found, text in run.reasons] == [(status, True)], run.reasons
