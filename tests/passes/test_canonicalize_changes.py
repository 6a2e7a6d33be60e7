"""Attention is rewritten only where nothing changes in between; and what a static cache appends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.passes.attention_checks import (
    ADDED,
    SOURCES,
    UNIFIED,
    WRITE,
    check_refused,
    check_rewritten,
)
from tests.passes.attention_graphs import (
    KV_HEADS,
    append_to_buffer,
    append_to_pool,
    buffer_args,
    causal,
    compiled_once,
    over_buffer,
    pool_args,
    repeat_kv,
    sdpa,
)

Step = Callable[..., Any]


def between(
    before: Step | None = None, scored: Step | None = None, weighed: Step | None = None
) -> Callable[..., Tensor]:
    """Eager attention over a static cache, interrupted; each step is given all there is by name."""

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        mask = ADDED(lens, q.shape[2], keys.shape[2])
        append_to_buffer(k, v, keys, values, lens)
        all_keys, all_values = repeat_kv(keys), repeat_kv(values)
        if before is not None:
            before(q=q, keys=keys, values=values, mask=mask, lens=lens)
        scores = torch.matmul(q, all_keys.transpose(2, 3))
        if scored is not None:
            scored(q=q, keys=keys, values=values, mask=mask, lens=lens, scores=scores)
        scores = scores * 0.3 + mask
        if weighed is not None:
            weighed(q=q, keys=keys, values=values, mask=mask, lens=lens, scores=scores)
        return torch.softmax(scores, dim=-1) @ all_values

    return function


def test_nothing_between_is_rewritten() -> None:
    check_rewritten(compiled_once(between(), buffer_args()))


COMPUTED = "what it is computed from is changed in place by"
INTERRUPTIONS: dict[str, tuple[dict[str, Step], str]] = {
    "scores": ({"scored": lambda scores, **_: scores.mul_(2)}, COMPUTED),
    "a view of the scores": ({"scored": lambda scores, **_: scores[:, 0].zero_()}, COMPUTED),
    "a detached view": ({"scored": lambda scores, **_: scores.detach().view(-1)[3:9].fill_(1.0)}, COMPUTED),
    "scores by item": ({"scored": lambda scores, **_: scores.__setitem__((0, 0), 1.0)}, COMPUTED),
    "masked scores": ({"weighed": lambda scores, **_: scores.masked_fill_(scores > 1, 0.0)}, COMPUTED),
    "scores through out": ({"weighed": lambda scores, **_: torch.mul(scores, 2, out=scores)}, COMPUTED),
    "scores through inplace": ({"scored": lambda scores, **_: F.relu(scores, inplace=True)}, COMPUTED),
    "scores in a list": ({"scored": lambda scores, **_: torch._foreach_mul_([scores], 2.0)}, COMPUTED),
    "scores by an operator": ({"scored": lambda scores, **_: torch.ops.aten.mul_(scores, 2.0)}, COMPUTED),
    "queries": ({"scored": lambda q, **_: q.mul_(3)}, COMPUTED),
    "keys behind the product": ({"scored": lambda keys, **_: keys.zero_()}, COMPUTED),
    "values before their product": ({"before": lambda values, **_: values[:, :, :2].zero_()}, COMPUTED),
    "keys before the product": ({"before": lambda keys, **_: keys.mul_(0.5)}, COMPUTED),
    "the mask": ({"before": lambda mask, **_: mask[..., 0].fill_(-1.0)}, "is changed in place"),
}


@pytest.mark.parametrize("name", INTERRUPTIONS)
def test_what_is_changed_in_between_is_seen(name: str) -> None:
    steps, reason = INTERRUPTIONS[name]
    check_refused(compiled_once(between(**steps), buffer_args()), reason)


def test_a_cache_may_change_before_and_behind() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        keys.mul_(0.5)
        out = over_buffer(sdpa, causal)(q, k, v, keys, values, lens)
        values.zero_()
        q.zero_()
        return out

    run = compiled_once(function, buffer_args())
    assert (len(run.attention), run.count(UNIFIED), run.refusals) == (1, 1, [])
    # What is written otherwise, too, is written as it was.
    assert (run.count(WRITE), run.count("index_copy_")) == (0, 2)


def before_the_mask(change: Step) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        change(lens)
        return sdpa(q, keys, values, causal(lens - 3, 3, 32))

    return function


@pytest.mark.parametrize(
    "change",
    [
        lambda lens: lens.add_(3),
        lambda lens: lens.view(1).add_(3),
        lambda lens: lens.__iadd__(3),
        lambda lens: lens.detach().add_(3),
        lambda lens: torch.add(lens, 3, out=lens),
    ],
)
def test_lengths_that_move_on_before_the_mask(change: Step) -> None:
    check_refused(compiled_once(before_the_mask(change), buffer_args()), "is changed in place")


def test_lengths_that_move_on_while_the_mask_is_made() -> None:
    """``to`` is a view of what already is as it should be."""

    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        offset = lens.to("cpu")
        append_to_buffer(k, v, keys, values, lens)
        lens.add_(3)
        return sdpa(q, keys, values, causal(offset - 3, 3, 32))

    check_refused(compiled_once(function, buffer_args()), "is changed in place")


def test_a_pool_that_is_written_behind_the_read() -> None:
    def late(q: Tensor, k: Tensor, v: Tensor, k_pages: Any, v_pages: Any, table: Any, lens: Any) -> Tensor:
        keys, values = (torch.ops.specc.read_pages(each, table, None, q.dtype) for each in (k_pages, v_pages))
        append_to_pool(k, v, k_pages, v_pages, table, lens)
        return sdpa(q, keys, values, causal(lens, 3, 32))

    check_refused(compiled_once(late, pool_args()), COMPUTED + " kv_write")


@pytest.mark.parametrize("late", [False, True])
def test_slots_that_change(late: bool) -> None:
    def moved(q: Tensor, k: Tensor, v: Tensor, k_pages: Any, v_pages: Any, table: Any, lens: Any) -> Tensor:
        if not late:
            table.copy_(table.flip(0))
        keys, values = append_to_pool(k, v, k_pages, v_pages, table, lens)
        out = sdpa(q, keys, values, causal(lens, 3, 32))
        if late:
            table.zero_()
        return out

    check_refused(compiled_once(moved, pool_args()), "its slots are changed in place")


def test_a_custom_operator_that_writes() -> None:
    with torch.library._scoped_library("specc_test_writes", "DEF") as library:
        library.define("spoil(Tensor(a!) x) -> ()")
        library.impl("spoil", lambda x: (x.mul_(2), None)[1], "CompositeExplicitAutograd")
        steps = {"scored": lambda scores, **_: torch.ops.specc_test_writes.spoil(scores)}
        check_refused(compiled_once(between(**steps), buffer_args()), COMPUTED + " spoil")


# --- what a static cache appends ---------------------------------------------------------------


def appended(change: Step) -> Callable[..., Any]:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Any:
        positions = torch.arange(q.shape[2]) + lens
        k, v = k + 0, v + 0
        keys.index_copy_(2, positions, k)
        seen = change(keys=keys, values=values, k=k, v=v, positions=positions)
        values.index_copy_(2, positions, v)
        return sdpa(q, keys, values, causal(lens, q.shape[2], keys.shape[2])), seen

    return function


@pytest.mark.parametrize(
    "change",
    [
        lambda keys, **_: keys.sum(),
        lambda keys, **_: keys[0].view(-1)[:100].clone(),
        lambda values, **_: values.amax(),
        lambda positions, **_: positions.add_(1).sum(),
        lambda k, **_: k.mul_(2).sum(),
        lambda k, **_: k[0].zero_().sum(),
    ],
)
def test_keys_are_written_with_values_only_where_that_is_the_same(change: Step) -> None:
    run = compiled_once(appended(change), buffer_args())
    assert (run.count(WRITE), run.count("index_copy_"), run.count(UNIFIED)) == (0, 2, 1)


def test_values_that_are_computed_from_the_keys_written() -> None:
    run = compiled_once(appended(lambda keys, v, **_: v.add_(keys.mean())), buffer_args())
    assert (run.count(WRITE), run.count("index_copy_"), run.count(UNIFIED)) == (0, 2, 1)


def test_attention_between_the_writes() -> None:
    def early(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2]) + lens
        keys.index_copy_(2, positions, k)
        out = sdpa(q, keys, values, causal(lens, q.shape[2], keys.shape[2]))
        values.index_copy_(2, positions, v)
        return out

    run = compiled_once(early, buffer_args())
    assert (run.count(WRITE), run.count("index_copy_"), run.count(UNIFIED)) == (0, 2, 1)


def test_other_writes_stay() -> None:
    def elsewhere(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2]) + lens
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions + 0, v)
        return sdpa(q, keys, values, causal(lens, q.shape[2], keys.shape[2]))

    def by_item(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        positions = torch.arange(q.shape[2]) + lens
        keys[:, :, positions] = k
        values[:, :, positions] = v
        return sdpa(q, keys, values, causal(lens, q.shape[2], keys.shape[2]))

    for function, left in ((elsewhere, 2), (by_item, 0)):
        run = compiled_once(function, buffer_args())
        assert (run.count(WRITE), run.count("index_copy_"), run.count(UNIFIED)) == (0, left, 1)


def test_keys_that_are_values() -> None:
    def one(q: Tensor, k: Tensor, keys: Tensor, lens: Tensor) -> Tensor:
        keys.index_copy_(2, torch.arange(q.shape[2]) + lens, k)
        return sdpa(q, keys, keys, causal(lens, q.shape[2], keys.shape[2]))

    q, k, _, keys, _, lens = buffer_args()
    run = compiled_once(one, (q, k, keys, lens))
    assert (run.count(WRITE), run.count("index_copy_"), run.count(UNIFIED)) == (0, 1, 1)


def test_layers_that_share_a_cache() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        mask = causal(lens, q.shape[2], keys.shape[2])
        append_to_buffer(k, v, keys, values, lens)
        return sdpa(sdpa(q, keys, values, mask), keys, values, mask)

    run = compiled_once(shared, buffer_args())
    assert (run.count(WRITE), run.count(UNIFIED), run.scatters, run.refusals) == (1, 2, 1, [])


def test_counts_of_heads() -> None:
    """The operator is given the model's own KV heads, and no copies of them (speculation.md 2.8, 15)."""
    for over, args in SOURCES:
        run = compiled_once(over(sdpa, causal), args())
        (node,) = run.after.graph.find_nodes(op="call_function", target=UNIFIED)
        assert node.args[1].meta["example_value"].shape[2] == KV_HEADS
