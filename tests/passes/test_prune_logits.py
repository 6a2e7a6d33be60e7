"""prune_logits: rows of a linear product that nobody reads are not computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.testing import FileCheck

from specc.passes import prune_logits
from tests.passes.graphs import Run, apply, compile_with, trace_on

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default)

BATCH, TOKENS, HIDDEN, VOCAB = 3, 5, 8, 48
Form = Callable[..., Any]


def whole(*shape: int) -> Tensor:
    """Small integers: their products are exact, in whichever order a kernel adds them up."""
    return torch.randint(-8, 9, shape).float()


W = (torch.arange(VOCAB * HIDDEN) * 37 % 17 - 8.0).view(VOCAB, HIDDEN)
B = torch.arange(VOCAB) * 5 % 11 - 4.0
LAST = torch.tensor([4, 0, 2])
ROWS = torch.arange(BATCH)
EVERY = torch.arange(BATCH * TOKENS * VOCAB)
MASK = torch.tensor([True, False, True, False, True])


class Head(nn.Module):
    """What a Hugging Face causal LM does around its head: choose tokens first, then the head, in float32."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias)
        self.lm_head.weight.data.copy_(W)
        if bias:
            self.lm_head.bias.data.copy_(B)

    def forward(self, hidden: Tensor, logits_to_keep: int = 0) -> Tensor:
        slice_indices = slice(-logits_to_keep, None) if logits_to_keep else slice(0, None)
        return self.lm_head(hidden[:, slice_indices, :])


def linear(h: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(h, W, bias)


def softcapped(h: Tensor) -> Tensor:
    return torch.tanh(linear(h) / 30.0) * 30.0


# Each form, and how many of the BATCH * TOKENS rows it reads.
POSITIVE: dict[str, tuple[Form, int]] = {
    "last": (lambda h: linear(h)[:, -1], BATCH),
    "last, bias": (lambda h: linear(h, B)[:, -1], BATCH),
    "last, all columns": (lambda h: linear(h)[:, -1, :], BATCH),
    "last, kept dim": (lambda h: linear(h)[:, -1:], BATCH),
    "last three, bias": (lambda h: linear(h, B)[:, -3:], BATCH * 3),
    "all but the last": (lambda h: linear(h)[:, :-1], BATCH * 4),
    "every other": (lambda h: linear(h)[:, ::2], BATCH * 3),
    "narrow": (lambda h: linear(h).narrow(1, 1, 2), BATCH * 2),
    "one request": (lambda h: linear(h)[1], TOKENS),
    "one request, one token": (lambda h: linear(h, B)[0, -1], 1),
    "request, then tokens": (lambda h: linear(h)[1:][:, 2:4], 2 * 2),
    "tokens by index": (lambda h: linear(h)[:, LAST], BATCH * 3),
    "one token each": (lambda h: linear(h)[ROWS, LAST], BATCH),
    "index_select": (lambda h: linear(h, B).index_select(1, LAST[:2]), BATCH * 2),
    "repeated rows": (lambda h: linear(h)[:, [3, 3]], BATCH * 2),
    "float32": (lambda h: linear(h).double()[:, -1], BATCH),
    "temperature": (lambda h: (linear(h) / 4.0)[:, -1], BATCH),
    "soft cap": (lambda h: softcapped(h)[:, -1].double(), BATCH),
    "soft cap, rows kept as a dim": (lambda h: softcapped(h)[:, -2:], BATCH * 2),
    "bias of the vocabulary": (lambda h: (B + linear(h)).masked_fill(B > 0, -9.0)[:, -1], BATCH),
    "scalar tensor": (lambda h: (linear(h) * B[0])[:, -1], BATCH),
    "flattened": (lambda h: linear(h).view(-1, VOCAB)[2:4], 2),
    "sliced, cast, flattened, sliced": (lambda h: linear(h)[:, 1:].double().view(-1, VOCAB)[3:5], 2),
    "sliced, copied, flattened, sliced": (lambda h: linear(h)[:, 1:].reshape(-1, VOCAB)[3:5], 2),
    "indexed, flattened, sliced": (lambda h: linear(h)[:, LAST].view(-1, VOCAB)[3:5], 2),
    "two dims": (lambda h: linear(h[0], B)[-1], 1),
    "two dims, slice": (lambda h: linear(h[0])[-2:], 2),
    "four dims": (lambda h: linear(h[:, None])[:, :, -1], BATCH),
    "matmul": (lambda h: (h @ W.t())[:, -1], BATCH),
    "rows, then columns": (lambda h: linear(h)[:, -1, :5], BATCH),
    "rows, then another reader": (lambda h: (lambda x: (x, x.argmax(-1)))(linear(h)[:, -1]), BATCH),
    "transposed hidden states": (lambda h: linear(h.transpose(0, 1), B)[-1], BATCH),
    "strided hidden states": (
        lambda h: linear(h.transpose(1, 2).contiguous().transpose(1, 2), B)[:, -1],
        BATCH,
    ),
    "square of one matrix": (lambda h: (lambda x: x.mm(x)[-2:])(h[0, :, :TOKENS]), 2),
}


@pytest.mark.parametrize("functionalize", [False, True])
@pytest.mark.parametrize("form", POSITIVE)
def test_fewer_rows(form: str, functionalize: bool) -> None:
    fn, rows = POSITIVE[form]
    h = whole(BATCH, TOKENS, HIDDEN)
    run = compile_with(prune_logits.PASS, fn, h, functionalize=functionalize)
    assert run.result.matched == 1, run.reasons
    assert rows_computed(run.after) == rows < rows_computed(run.before)
    assert_same(run.output, fn(h))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_the_head_of_a_model(bias: bool, dynamic: bool | None) -> None:
    head, h = Head(bias), whole(BATCH, TOKENS, HIDDEN)

    def last(h: Tensor) -> Tensor:
        return head(h).float()[:, -1, :]

    run = compile_with(prune_logits.PASS, last, h, dynamic=dynamic)
    assert run.result.matched == 1
    assert_same(run.output, last(h))


DYNAMIC = [
    "last",
    "last, kept dim",
    "last three, bias",
    "every other",
    "one request, one token",
    "tokens by index",
]


@pytest.mark.parametrize("functionalize", [False, True])
@pytest.mark.parametrize(
    "form", [*DYNAMIC, "narrow", "soft cap", "two dims", "sliced, cast, flattened, sliced"]
)
def test_dynamic_shapes(form: str, functionalize: bool) -> None:
    fn, _ = POSITIVE[form]
    h = whole(BATCH, TOKENS, HIDDEN)
    run = compile_with(prune_logits.PASS, fn, h, functionalize=functionalize, dynamic=True)
    assert run.result.matched == 1, run.reasons
    assert_same(run.output, fn(h))


def test_symbolic_in_every_size() -> None:
    def fn(h: Tensor, w: Tensor, at: Tensor) -> Tensor:
        return F.linear(h, w).float()[:, at]

    args = whole(BATCH, TOKENS, HIDDEN).double(), W.double(), LAST[:2]
    run = compile_with(prune_logits.PASS, fn, *args, dynamic=True)
    assert run.result.matched == 1
    assert_same(run.output, fn(*args))


def test_no_rows_at_all() -> None:
    h = whole(BATCH, TOKENS, HIDDEN)
    run = compile_with(prune_logits.PASS, lambda h: linear(h)[:, 5:], h)
    assert (run.result.matched, run.output.shape) == (1, (BATCH, 0, VOCAB))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    def fn(h: Tensor) -> Tensor:
        return F.linear(h.to(dtype), W.to(dtype))[:, -1].float()

    h = torch.randn(BATCH, TOKENS, HIDDEN)
    run = compile_with(prune_logits.PASS, fn, h)
    assert run.result.matched == 1
    torch.testing.assert_close(run.output, fn(h), rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


NEGATIVE: dict[str, tuple[Form, str]] = {
    "also returned": (lambda h: (lambda x: (x[:, -1], x))(linear(h)), "another reader: output"),
    "two selections": (lambda h: (lambda x: (x[:, -1], x[:, 0]))(linear(h)), "another reader: select"),
    "another reader after the cap": (
        lambda h: (lambda x: (x[:, -1], x.sum()))(softcapped(h)),
        "another reader: sum",
    ),
    "columns": (lambda h: linear(h)[..., :5], "last dim"),
    "one column": (lambda h: linear(h)[..., 5], "last dim"),
    "columns by index": (lambda h: linear(h)[:, :, LAST], "last dim"),
    "rows and columns by index": (lambda h: linear(h)[ROWS, LAST, LAST], "last dim"),
    "every row by index": (lambda h: linear(h)[:, [4, 3, 2, 1, 0]], "every row is kept"),
    "the only token": (lambda h: linear(h[:, :1])[:, -1], "every row is kept"),
    "every row": (lambda h: linear(h).narrow(1, 0, TOKENS), "every row is kept"),
    "gather": (
        lambda h: linear(h).gather(1, LAST[:, None, None].expand(-1, -1, VOCAB)),
        "gather.default is not handled",
    ),
    "split": (lambda h: linear(h).split([4, 1], 1)[1], "split_with_sizes.default is not handled"),
    "unbind": (lambda h: linear(h).unbind(1)[-1], "unbind.int is not handled"),
    "softmax": (lambda h: linear(h).softmax(-1)[:, -1], "_softmax.default is not moved past"),
    "in-place scale": (lambda h: linear(h).div_(4.0)[:, -1], "div_.Tensor is not moved past"),
    "added states": (lambda h: (linear(h) + h[..., :1])[:, -1], "add.Tensor is not moved past"),
    "batched product": (lambda h: (h @ h.mT)[:, -1], "a matrix for each batch entry"),
    "a mask": (lambda h: linear(h)[:, MASK], "selects by a mask"),
    "added matrix": (lambda h: torch.addmm(h[0] @ W.t(), h[1], W.t())[-1], "addmm adds a matrix"),
}


@pytest.mark.parametrize("form", NEGATIVE)
def test_refused(form: str) -> None:
    fn, reason = NEGATIVE[form]
    h = whole(BATCH, TOKENS, HIDDEN)
    run = compile_with(prune_logits.PASS, fn, h)
    assert (run.result.matched, run.unchanged) == (0, True)
    assert_refused(run, reason)
    assert_same(run.output, fn(h))


UNRELATED: dict[str, Form] = {
    "all rows read": lambda h: linear(h),
    "mlp": lambda h: F.silu(linear(h)) * linear(h, B),
    "attention heads": lambda h: linear(h).view(BATCH, TOKENS, 6, 8).transpose(1, 2),
    "fused projections": lambda h: linear(h).chunk(3, -1),
    "an index, not a source": lambda h: EVERY.index_select(0, linear(h).argmax()),
    "selected first": lambda h: linear(h[:, -1]),
}


@pytest.mark.parametrize("form", UNRELATED)
def test_not_a_site(form: str) -> None:
    run = compile_with(prune_logits.PASS, UNRELATED[form], whole(BATCH, TOKENS, HIDDEN))
    assert (run.reasons, run.unchanged) == ([], True)


def straddled(h: Tensor) -> Tensor:
    logits = linear(h)
    h.zero_()
    return logits[:, -1]


def test_a_mutation_straddles() -> None:
    h = whole(BATCH, TOKENS, HIDDEN)
    expected = straddled(h.clone())
    run = compile_with(prune_logits.PASS, straddled, h.clone())
    assert run.unchanged
    assert_refused(run, "zero_ writes in place")
    assert_same(run.output, expected)
    functional = compile_with(prune_logits.PASS, straddled, h, functionalize=True)
    assert functional.result.matched == 1
    assert_same((functional.output, h), (expected, torch.zeros_like(h)))


def test_a_custom_op_that_mutates_straddles() -> None:
    def fn(h: Tensor, pages: Tensor, slots: Tensor) -> Tensor:
        logits = linear(h)
        torch.ops.specc.kv_write(h[0, :, None], h[0, :, None], pages[0], pages[1], slots, None, None)
        return logits[:, -1]

    args = whole(BATCH, TOKENS, HIDDEN), torch.zeros(2, 2, 4, 1, HIDDEN), torch.arange(TOKENS)
    run = compile_with(prune_logits.PASS, fn, *args)
    assert_refused(run, "kv_write writes in place")


def test_new_nodes_name_their_source() -> None:
    def headed(h: Tensor) -> Tensor:
        return linear(h, B).double()[:, -2:]

    run = compile_with(prune_logits.PASS, headed, whole(BATCH, TOKENS, HIDDEN))
    for node in run.after.graph.nodes:
        if node.op == "call_function":
            assert "val" in node.meta
            assert "in headed" in node.meta["stack_trace"]


def test_on_fake_cuda() -> None:
    def fn(h: Tensor, w: Tensor) -> Tensor:
        return F.linear(h, w).float().select(1, -1)

    gm = trace_on("cuda", fn, (2, 4, 8), (32, 8), dtype=torch.bfloat16)
    run = apply(prune_logits.PASS, gm)
    assert run.result.matched == 1
    FileCheck().check("select.int").check("mm.default").check("_to_copy").check_not("select").run(
        run.after.code
    )


@pytest.mark.parametrize("inductor", [False, True])
def test_through_the_backend(inductor: bool, tmp_path: Path, fresh_compiler: None) -> None:
    head, h = Head(bias=False), whole(BATCH, TOKENS, HIDDEN)

    def draft(h: Tensor) -> Tensor:
        return head(h).float()[:, -1].softmax(-1).topk(1)[1]

    options = {"inductor": inductor, "dump": str(tmp_path)}
    with torch.no_grad():
        drafted = torch.compile(draft, backend="specc", options=options)(h)
    assert_same(drafted, head(h)[:, -1].argmax(-1, keepdim=True))  # Whole numbers tie: the first wins.
    (after,) = tmp_path.glob("graph_*/*_aten_prune_logits.after.py")
    FileCheck().check("select.int").check("mm.default").check("greedy_select.default").run(after.read_text())
    (remarks,) = tmp_path.glob("graph_*/remarks.txt")
    FileCheck().check("greedy_select: fired").check("prune_logits: fired").run(remarks.read_text())


def rows_computed(gm: GraphModule) -> int:
    """The rows of the graph's products, all together."""
    nodes = [node for target in PRODUCTS for node in gm.graph.find_nodes(op="call_function", target=target)]
    return sum(math.prod(node.meta["val"].shape[:-1]) for node in nodes)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0)


def assert_refused(run: Run, reason: str) -> None:
    assert run.result.matched == 0
    assert any(reason in text for _, text in run.reasons), run.reasons
