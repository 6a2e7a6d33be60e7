"""The verify_attention pass alone: over slots of a request table, and over ragged slots as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import (
    ragged_kv,
    scatter_ragged_to_page_table,
    scatter_req_to_token_to_page_table,
    unified_attention,
    verify_attention,
)
from specc.options import Options
from specc.passes import canonicalize
from specc.passes import verify_attention as verify_pass
from specc.passes.framework import PassContext, run_passes
from tests.passes.attention_graphs import (
    CAPACITY,
    DIM,
    HEADS,
    PAGE,
    ROWS,
    Run,
    causal,
    compiled_once,
    over_pool,
    pool_args,
    sdpa,
)

VERIFY, UNIFIED = verify_attention.overload, unified_attention.overload
FROM_TABLE = scatter_req_to_token_to_page_table.overload
FROM_RAGGED = scatter_ragged_to_page_table.overload
Q_LEN = 3
# canonicalize settles the overloads; there is no attention of a stock model in these graphs.
PASSES = (canonicalize.PASS, verify_pass.PASS)


def attend(q: Tensor, pools: Any, slots: Any, max_seqlen_k: Any, window: int = 0) -> Tensor:
    """q: [B * q, Hq, D]; each row's block is as long as the others'."""
    starts = torch.arange(0, q.shape[0] + 1, Q_LEN, dtype=torch.int32)
    options = (0.3, window, 0.0, None, None, None)
    return torch.ops.specc.verify_attention(q, *pools, *slots, starts, Q_LEN, max_seqlen_k, *options)


def inputs(capacity: int = CAPACITY, lens: tuple[int, int] = (8, 20)) -> tuple[Any, Tensor, Tensor]:
    """Pages, their table and the lengths with the block, as the runtime's pools have them."""
    _, _, _, k_pages, v_pages, table, given = pool_args(capacity=capacity, lens=lens)
    return (k_pages, v_pages), table, given


def queries() -> Tensor:
    return torch.randn(ROWS * Q_LEN, HEADS, DIM)


def ragged(table: Tensor, lens: Tensor) -> tuple[Tensor, Tensor]:
    return ragged_kv.reference(table, lens)


def reasons(run: Run) -> list[tuple[str, str]]:
    return [(remark.status, remark.reason) for remark in run.results[-1].remarks]


def check(run: Run, layers: int, scatter: Any, scatters: int = 1) -> None:
    assert run.count(VERIFY) == 0
    assert run.count(UNIFIED) == layers
    assert run.count(scatter) == scatters == run.scatters
    assert run.results[-1].matched == layers


def over_table(layers: int, windows: Any = 0) -> Callable[..., Tensor]:
    def function(q: Tensor, pools: Any, table: Tensor, lens: Tensor) -> Tensor:
        slots = torch.ops.specc.ragged_kv(table, lens)
        for _ in range(layers):
            q = q + attend(q, pools, slots, table.shape[1], windows)
        return q

    return function


def over_slots(layers: int) -> Callable[..., Tensor]:
    def function(q: Tensor, pools: Any, kv_indptr: Tensor, kv_indices: Tensor) -> Tensor:
        for _ in range(layers):
            q = q + attend(q, pools, (kv_indptr, kv_indices), CAPACITY)
        return q

    return function


@pytest.mark.parametrize("window", [0, 4])
def test_slots_of_a_request_table(window: int) -> None:
    run = compiled_once(over_table(3, window), (queries(), *inputs()), passes=PASSES)
    check(run, 3, FROM_TABLE)
    assert run.count(ragged_kv.overload) == 0, "what only the ragged form needs goes"
    assert reasons(run) == [
        ("fired", "unified attention by a page table of 8s"),
        ("fired", "unified attention by the same page table of 8s"),
        ("fired", "unified attention by the same page table of 8s"),
    ]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ragged_slots_as_they_come(dtype: torch.dtype) -> None:
    pools, table, lens = inputs()
    kv_indptr, kv_indices = ragged(table, lens)
    args = (queries(), pools, kv_indptr.to(dtype), kv_indices)
    run = compiled_once(over_slots(2), args, passes=PASSES)
    check(run, 2, FROM_RAGGED)
    (node,) = run.after.graph.find_nodes(op="call_function", target=FROM_RAGGED)
    assert node.meta["example_value"].shape == (ROWS, CAPACITY // PAGE)
    (first, _) = run.after.graph.find_nodes(op="call_function", target=UNIFIED)
    assert first.args[5].meta["example_value"].dtype == torch.int64


@pytest.mark.parametrize("lens", [(0, 0), (3, 32), (8, 9), (1, 24)])
def test_edges_of_pages(lens: tuple[int, int]) -> None:
    pools, table, lengths = inputs(lens=lens)
    check(compiled_once(over_table(1), (queries(), pools, table, lengths), passes=PASSES), 1, FROM_TABLE)
    args = (queries(), pools, *ragged(table, lengths))
    check(compiled_once(over_slots(1), args, passes=PASSES), 1, FROM_RAGGED)


def place(run: Run, target: Any) -> int:
    return next(i for i, node in enumerate(run.after.graph.nodes) if node.target is target)


def test_the_table_is_made_before_the_first_layer() -> None:
    for function, args in (
        (over_table(2), (queries(), *inputs())),
        (over_slots(2), (queries(), inputs()[0], *ragged(*inputs()[1:]))),
    ):
        run = compiled_once(function, args, passes=PASSES)
        scatter = min(
            i for i, node in enumerate(run.after.graph.nodes) if node.target in (FROM_TABLE, FROM_RAGGED)
        )
        assert scatter < place(run, UNIFIED)
    whole = compiled_once(over_pool(sdpa, causal), pool_args())
    assert place(whole, FROM_TABLE) < place(whole, torch.ops.specc.kv_write.default) < place(whole, UNIFIED)
    own = {node.name for node in whole.before.graph.nodes if node.op.startswith("call")}
    ahead = list(whole.after.graph.nodes)[: place(whole, FROM_TABLE)]
    assert not any(node.name in own for node in ahead), "it waits for nothing of the model"


def test_other_slots_have_another_table() -> None:
    def function(q: Tensor, pools: Any, table: Tensor, twin: Tensor, lens: Tensor) -> Tensor:
        slots, others = torch.ops.specc.ragged_kv(table, lens), torch.ops.specc.ragged_kv(twin, lens)
        for each in (slots, others, slots, others):
            q = q + attend(q, pools, each, table.shape[1])
        return q

    pools, table, lens = inputs()
    run = compiled_once(function, (queries(), pools, table, table.flip(0), lens), passes=PASSES)
    check(run, 4, FROM_TABLE, scatters=2)


def test_a_shorter_bound_does_not_cut_the_others_table() -> None:
    """The first layer promises at most 8 keys; the second one reads them all."""

    def function(q: Tensor, pools: Any, few: Any, all_of_them: Any) -> Tensor:
        kv_indptr, kv_indices = few
        q = q + attend(q, pools, (kv_indptr, kv_indices), 8)
        return q + attend(q, pools, (kv_indptr, kv_indices), all_of_them)

    pools, table, _ = inputs()
    slots = ragged(table, torch.tensor([7, 8]))
    run = compiled_once(function, (queries(), pools, slots, CAPACITY), passes=PASSES)
    check(run, 2, FROM_RAGGED, scatters=2)
    widths = [
        node.meta["example_value"].shape[1]
        for node in run.after.graph.find_nodes(op="call_function", target=FROM_RAGGED)
    ]
    assert sorted(widths) == [1, CAPACITY // PAGE]


def test_other_page_sizes_have_tables_of_their_own() -> None:
    def function(q: Tensor, pools: Any, halved: Any, table: Tensor, lens: Tensor) -> Tensor:
        slots = torch.ops.specc.ragged_kv(table, lens)
        q = q + attend(q, pools, slots, table.shape[1])
        return q + attend(q, halved, slots, table.shape[1])

    pools, table, lens = inputs()
    halved = [pages.reshape(-1, PAGE // 2, *pages.shape[2:]) for pages in pools]
    run = compiled_once(function, (queries(), pools, halved, table, lens), passes=PASSES)
    check(run, 2, FROM_TABLE, scatters=2)
    assert [reason for _, reason in reasons(run)] == [
        "unified attention by a page table of 8s",
        "unified attention by a page table of 4s",
    ]


def test_symbolic_capacity_and_pool() -> None:
    def calls() -> Any:
        for capacity, lens in ((32, (8, 20)), (48, (41, 48)), (64, (3, 64))):
            pools, table, given = inputs(capacity, lens)
            torch._dynamo.mark_dynamic(table, 1)
            for pages in pools:
                torch._dynamo.mark_dynamic(pages, 0)
            yield queries(), pools, table, given

    check(compiled_once(over_table(2), *calls(), passes=PASSES), 2, FROM_TABLE)


def test_symbolic_bound_of_ragged_slots() -> None:
    """The bound is an input that stands behind the slots: the table waits for it."""

    def function(q: Tensor, pools: Any, kv_indptr: Tensor, kv_indices: Tensor, longest: Tensor) -> Tensor:
        return attend(q, pools, (kv_indptr, kv_indices), longest.shape[0])

    def calls() -> Any:
        for capacity, lens in ((32, (8, 20)), (48, (41, 48))):
            pools, table, given = inputs(capacity, lens)
            slots = ragged(table, given)
            longest = torch.zeros(capacity)
            for tensor, dim in ((slots[1], 0), (longest, 0), (pools[0], 0), (pools[1], 0)):
                torch._dynamo.mark_dynamic(tensor, dim)
            yield queries(), pools, *slots, longest

    check(compiled_once(function, *calls(), passes=PASSES), 1, FROM_RAGGED)


def test_a_symbolic_page_size_is_refused() -> None:
    pools, table, lens = inputs()
    for pages in pools:
        torch._dynamo.mark_dynamic(pages, 1)
    run = compiled_once(over_table(2), (queries(), pools, table, lens), passes=PASSES)
    assert reasons(run) == [("refused", "its page size is not known when compiling")] * 2
    assert (run.count(VERIFY), run.count(UNIFIED), run.scatters) == (2, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda table, lens, slots: table.copy_(table.flip(0)),
        lambda table, lens, slots: lens.sub_(1),
        lambda table, lens, slots: lens[:1].zero_(),
        lambda table, lens, slots: slots[1].zero_(),
        lambda table, lens, slots: slots[0].view(-1)[1:].fill_(2),
    ],
)
def test_slots_that_change_before_they_are_read_are_refused(change: Any) -> None:
    def function(q: Tensor, pools: Any, table: Tensor, lens: Tensor) -> Tensor:
        slots = torch.ops.specc.ragged_kv(table, lens)
        q = q + attend(q, pools, slots, table.shape[1])
        change(table, lens, slots)
        return q + attend(q, pools, slots, table.shape[1])

    run = compiled_once(function, (queries(), *inputs()), passes=PASSES)
    fired, refused = reasons(run)
    assert fired == ("fired", "unified attention by a page table of 8s")
    assert refused[0] == "refused"
    assert "its slots are changed in place by" in refused[1]
    assert (run.count(VERIFY), run.count(UNIFIED), run.scatters) == (1, 1, 1)


def test_ragged_slots_that_change_before_they_are_read_are_refused() -> None:
    def function(q: Tensor, pools: Any, kv_indptr: Tensor, kv_indices: Tensor) -> Tensor:
        kv_indptr[1:].sub_(1)
        return attend(q, pools, (kv_indptr, kv_indices), CAPACITY)

    pools, table, lens = inputs()
    run = compiled_once(function, (queries(), pools, *ragged(table, lens)), passes=PASSES)
    assert reasons(run) == [("refused", "its slots are changed in place by sub_")]


def test_slots_that_change_behind() -> None:
    def function(q: Tensor, pools: Any, table: Tensor, lens: Tensor) -> Tensor:
        out = over_table(2)(q, pools, table, lens)
        lens.add_(Q_LEN)
        table.zero_()
        return out

    check(compiled_once(function, (queries(), *inputs()), passes=PASSES), 2, FROM_TABLE)


def test_disabled_by_name_gives_the_same_results() -> None:
    args = pool_args()
    results = []
    for disabled in ((), ("verify_attention",), ("verify_attention", "canonicalize")):
        counts: list[tuple[int, int]] = []

        def backend(gm: Any, example: Any, disabled: Any = disabled, counts: Any = counts) -> Any:
            run_passes(gm, PASSES, PassContext(Options(disable_passes=disabled)))
            nodes = [node.target for node in gm.graph.nodes]
            counts.append((nodes.count(VERIFY), nodes.count(UNIFIED)))
            return gm.forward

        torch.compiler.reset()
        with torch.no_grad():
            fn = torch.compile(over_pool(sdpa, causal), backend=backend, fullgraph=True)
            results.append(fn(*(each.clone() for each in args)))
        assert counts == [{0: (0, 1), 1: (1, 0), 2: (0, 0)}[len(disabled)]]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("disabled", [[], ["verify_attention"], ["canonicalize"]])
def test_disabled_through_options(disabled: list[str], fresh_compiler: None) -> None:
    args = pool_args()
    function = over_pool(sdpa, causal)
    with torch.no_grad():
        expected = function(*(each.clone() for each in args))
        options = {"inductor": False, "disable_passes": disabled}
        result = torch.compile(function, backend="specc", fullgraph=True, options=options)(*args)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_remarks_name_the_line() -> None:
    run = compiled_once(over_table(1), (queries(), *inputs()), passes=PASSES)
    (remark,) = run.results[-1].remarks
    assert remark.pass_name == "verify_attention"
    assert "test_verify_attention.py" in remark.source
    assert "torch.ops.specc.verify_attention" in remark.source


def test_a_graph_without_attention_is_left_alone() -> None:
    run = compiled_once(lambda x: torch.softmax(x, -1) * 2, (torch.randn(3, 4),), passes=PASSES)
    assert run.remarks == []
    assert run.before.code == run.after.code
