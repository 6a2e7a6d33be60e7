"""Paged attention: the references against a loop over tokens, and the CPU's provider against that too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from specc.lowerings import REGISTRY, cpu_attention
from specc.lowerings import unified_attention as unified
from specc.lowerings import verify_attention as verify
from specc.lowerings.dense_attention import Scoring, ragged_attention
from tests.lowerings.attention_calls import (
    LAYOUTS,
    Call,
    Row,
    Shape,
    by_slots,
    calls,
    expected,
    make_call,
)

# Roundings to the queries' dtype; "rows" rounds weights as torch's attention does.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def dense(call: Call) -> Tensor:
    q, k_pages, v_pages, _, bounds, lens, max_q, *scoring, k_scale, v_scale = call.arguments
    longest = max(1, *(len(each) for each in call.keys))
    k, v = (
        torch.full([len(call.rows), longest, *pages.shape[2:]], torch.nan, dtype=torch.float64)
        for pages in (k_pages, v_pages)
    )
    for row in range(len(call.rows)):
        for padded, states, scale in ((k, call.keys, k_scale), (v, call.values, v_scale)):
            padded[row, : len(states[row])] = states[row].double() * (1 if scale is None else scale)
    return ragged_attention(q, k, v, bounds, lens, max_q, Scoring(*scoring))


def rows(call: Call) -> Tensor:
    return unified.forced("rows")(*call.arguments)


IMPLEMENTATIONS: dict[str, Callable[[Call], Tensor]] = {
    "dense": dense,
    "unified": lambda call: unified.reference(*call.arguments),
    "verify": lambda call: verify.reference(*by_slots(call)),
    "rows": rows,
}
BY_TABLE = ["unified", "rows"]
every_implementation = pytest.mark.parametrize("implementation", sorted(IMPLEMENTATIONS))


def check(call: Call, result: Tensor) -> None:
    q, wanted = call.arguments[0], expected(call)
    assert result.dtype == q.dtype
    assert result.shape == wanted.shape
    tolerance = TOLERANCE[q.dtype]
    torch.testing.assert_close(result.double(), wanted, atol=tolerance, rtol=tolerance)
    blind = (wanted == 0).all(-1).all(-1)
    assert not bool(result[blind].any())


@every_implementation
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_against_a_loop_over_tokens(implementation: str, data: st.DataObject) -> None:
    call = data.draw(calls(beyond=implementation != "verify"))
    check(call, IMPLEMENTATIONS[implementation](call))


@settings(max_examples=200, deadline=None)
@given(call=calls(floats=True), block=st.integers(1, 4))
def test_rows_in_blocks_is_the_reference(call: Call, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "BLOCK", block)
        result = rows(call)
    torch.testing.assert_close(result, unified.reference(*call.arguments), atol=2e-5, rtol=2e-5)


def seen_keys(implementation: str, row: Row, window: int, sinks: bool = False) -> list[list[int]]:
    """The keys each token sees, read off equal weights over values that are one-hot in their position."""
    shape = Shape(head_dims=(8, 32), kv_heads=1, group=1, window=window, sinks=sinks)
    call = make_call([row], shape)
    q, _, v_pages, table, *_ = call.arguments
    q.zero_()
    stored = len(call.values[0])
    for t in range(stored):
        v_pages[table[0, t // 16], t % 16] = torch.eye(32)[t]
    call.values[0][:] = torch.eye(32)[:stored, None]
    result = IMPLEMENTATIONS[implementation](call)[:, 0]
    if not sinks:
        for weights in result:
            count = int((weights > 0).sum())
            torch.testing.assert_close(weights[weights > 0], torch.full([count], 1 / max(count, 1)))
    return [weights.nonzero().flatten().tolist() for weights in result]


@every_implementation
def test_a_window_of_four_sees_four_keys(implementation: str) -> None:
    assert seen_keys(implementation, Row(1, 11), 4) == [[7, 8, 9, 10]]
    assert seen_keys(implementation, Row(3, 13), 4) == [list(range(7 + j, 11 + j)) for j in range(3)]
    assert seen_keys(implementation, Row(3, 4), 4) == [[0, 1], [0, 1, 2], [0, 1, 2, 3]]


@every_implementation
@pytest.mark.parametrize("sinks", [False, True])
def test_blocks_end_at_the_last_key_and_may_begin_before_the_first(implementation: str, sinks: bool) -> None:
    assert seen_keys(implementation, Row(3, 3), 0, sinks) == [[0], [0, 1], [0, 1, 2]]
    assert seen_keys(implementation, Row(4, 2), 0, sinks) == [[], [], [0], [0, 1]]
    assert seen_keys(implementation, Row(2, 0), 0, sinks) == [[], []]
    assert seen_keys(implementation, Row(1, 32), 0, sinks) == [list(range(32))]


@pytest.mark.parametrize("implementation", ["dense", *BY_TABLE])
def test_lengths_beyond_the_table_cut_keys_but_keep_positions(implementation: str) -> None:
    assert seen_keys(implementation, Row(2, 40), 0) == [list(range(32))] * 2
    assert seen_keys(implementation, Row(3, 36), 4) == [[30, 31], [31], []]


@pytest.mark.parametrize("implementation", BY_TABLE)
@pytest.mark.parametrize("strays", [(-3, 0), (99, 6)])
def test_page_numbers_are_clamped_into_the_pool(implementation: str, strays: tuple[int, int]) -> None:
    call = make_call([Row(2, 30)], Shape())
    wild, nearest = strays
    q, k_pages, v_pages, table, *rest = call.arguments
    k_pages, v_pages = (torch.randn_like(k_pages[:5]).repeat(2, 1, 1, 1)[:7] for _ in range(2))
    results = []
    for second in (wild, nearest):
        table = torch.tensor([[3, second]], dtype=torch.int32)
        results.append(IMPLEMENTATIONS[implementation](Call((q, k_pages, v_pages, table, *rest), [], [], [])))
    assert torch.equal(*results)
    assert not bool(results[0].isnan().any())


@pytest.mark.parametrize("implementation", BY_TABLE)
def test_a_block_is_cut_at_max_seqlen_q(implementation: str) -> None:
    call = make_call([Row(4, 20), Row(2, 9)], Shape())
    whole = IMPLEMENTATIONS[implementation](call)
    arguments = (*call.arguments[:6], 2, *call.arguments[7:])
    cut = IMPLEMENTATIONS[implementation](Call(arguments, call.rows, call.keys, call.values))
    assert not bool(cut[2:4].any())
    torch.testing.assert_close(cut[[0, 1, 4, 5]], whole[[0, 1, 4, 5]])


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@pytest.mark.parametrize("scattered", [False, True])
def test_rows_copies_no_keys_of_pages_in_order(layout: str, scattered: bool) -> None:
    torch.manual_seed(1)
    shape = Shape(width=6, layout=layout, scattered=scattered)
    _, pool, _, table, *_ = make_call([Row(1, 90)], shape).arguments
    in_place = cpu_attention._take(pool, table[0, 1:], table[0, 1:].tolist(), range(20, 90), pool.dtype, None)
    assert in_place.shape == (1, 2, 70, 8)
    viewed = in_place.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
    assert viewed == (not scattered and layout != "heads before tokens")


def test_lengths_and_tables_of_another_width_are_refused() -> None:
    arguments = unified.sample("cpu")
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, Tensor) else each for each in arguments]
        with pytest.raises(RuntimeError, match="seqused_k must be int64"):
            unified(*fake[:5], fake[5].int(), *fake[6:])
        with pytest.raises(RuntimeError, match="page_table must be int32"):
            unified(*fake[:3], fake[3].long(), *fake[4:])


def test_rows_is_for_floats_on_cpus() -> None:
    (provider,) = (each for each in REGISTRY["unified_attention"].providers if each.name == "rows")
    q, k_pages, v_pages, *rest = unified.sample("cpu")
    assert provider.supports(q, k_pages, v_pages, *rest) is None
    assert unified.choose(q, k_pages, v_pages, *rest).provider.name == "rows"
    assert provider.supports(q.to("meta"), k_pages, v_pages, *rest) == "is for CPUs, got meta"
    assert "got queries of torch.int32" in provider.supports(q.int(), k_pages, v_pages, *rest)
    assert "got pages of torch.int8" in provider.supports(q, k_pages, v_pages.to(torch.int8), *rest)


def test_masks_kept_from_inference_mode_serve_outside_of_it() -> None:
    call = make_call([Row(3, 20)], Shape())
    cpu_attention._mask_by_distance.cache_clear()
    with torch.inference_mode():
        inside = rows(call)
    assert torch.equal(inside, rows(call))
    assert cpu_attention._mask_by_distance.cache_info().hits == 1
