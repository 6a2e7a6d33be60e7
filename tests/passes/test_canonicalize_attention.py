"""Attention of stock models becomes specc::verify_attention, however it is spelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from specc.passes import canonicalize
from tests.passes.attention_checks import (
    ADDED,
    IDS,
    MINUS_INFINITY,
    SINKS,
    SOURCES,
    UNIFIED,
    VERIFY,
    check_refused,
    check_rewritten,
    weights,
)
from tests.passes.attention_graphs import (
    DIM,
    HEADS,
    ROWS,
    added,
    append_to_buffer,
    append_to_pool,
    attentions,
    buffer_args,
    causal,
    compiled_once,
    no_mask,
    over_buffer,
    over_pool,
    pool_args,
    repeat_kv,
    rewritten,
    sdpa,
    sliding,
    spelled_out,
)


def gqa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def fused_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(
        query=q, key=repeat_kv(k), value=repeat_kv(v), attn_mask=mask, dropout_p=0.0, scale=0.11
    )


def divided(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = q @ repeat_kv(k).transpose(-1, -2) / math.sqrt(DIM) + mask
    return F.softmax(scores, dim=-1) @ repeat_kv(v)


def methods(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = q.matmul(repeat_kv(k).transpose(3, 2)).mul(0.3).add(mask)
    return scores.softmax(-1).matmul(repeat_kv(v))


def functions(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = torch.add(torch.div(torch.matmul(q, torch.transpose(repeat_kv(k), -2, -1)), 3.0), mask)
    return torch.matmul(torch.softmax(scores, 3), repeat_kv(v))


def augmented(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = q @ repeat_kv(k).transpose(2, 3)
    scores *= 0.3
    scores += mask
    return scores.softmax(dim=-1) @ repeat_kv(v)


def unscaled(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(q @ repeat_kv(k).transpose(2, 3) + mask, dim=-1) @ repeat_kv(v)


def dropped_out(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    probabilities = F.dropout(torch.softmax(weights(q, k) + mask, dim=-1), p=0.3, training=False)
    return probabilities.to(q.dtype).contiguous() @ repeat_kv(v)


def softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """gemma2's."""
    scores = torch.tanh(weights(q, k) * 4 / 1.5) * 1.5 + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ repeat_kv(v)


def with_sinks(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """gpt_oss's."""
    sinks = SINKS.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    combined = torch.cat([weights(q, k) + mask, sinks], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    scores = F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
    return torch.matmul(F.dropout(scores, p=0.0, training=False).to(v.dtype), repeat_kv(v))


def sinks_unshifted(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    combined = torch.cat(
        (weights(q, k) + mask, SINKS.view(1, HEADS, 1, 1).expand(ROWS, -1, q.shape[2], 1)), 3
    )
    return combined.softmax(-1)[..., :-1] @ repeat_kv(v)


FORMS: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "sdpa": (sdpa, causal),
    "sdpa, added": (sdpa, ADDED),
    "sdpa, added inf": (sdpa, MINUS_INFINITY),
    "sdpa, window": (sdpa, sliding(8)),
    "enable_gqa": (gqa, causal),
    "keywords, scale": (fused_scaled, causal),
    "eager": (spelled_out, ADDED),
    "eager, inf": (spelled_out, MINUS_INFINITY),
    "eager, window": (spelled_out, added(sliding(5))),
    "divided": (divided, ADDED),
    "methods": (methods, ADDED),
    "functions": (functions, MINUS_INFINITY),
    "no scale": (unscaled, ADDED),
    "idle dropout": (dropped_out, ADDED),
    "softcap": (softcapped, ADDED),
    "sinks": (with_sinks, ADDED),
    "sinks, window": (sinks_unshifted, added(sliding(3))),
}


@pytest.mark.parametrize(("over", "args"), SOURCES, ids=IDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_is_rewritten(form: str, over: Any, args: Any) -> None:
    attend, mask = FORMS[form]
    run = compiled_once(over(attend, mask), args())
    check_rewritten(run)
    (reason,) = run.attention
    windows = {"sdpa, window": 8, "eager, window": 5, "sinks, window": 3}
    expected = f", window {windows[form]}" if form in windows else "verify_attention"
    assert reason.endswith(expected)


@pytest.mark.parametrize(("over", "args"), SOURCES, ids=IDS)
def test_augmented_assignments(over: Any, args: Any) -> None:
    """The old scores, changed in place, stay on this graph; functionalized, nothing reads them."""
    run = compiled_once(over(augmented, ADDED), args())
    assert (len(run.attention), run.count(UNIFIED), run.scatters, run.refusals) == (1, 1, 1, [])
    assert attentions(run.after) == 0


@pytest.mark.parametrize(("over", "args"), SOURCES, ids=IDS)
@pytest.mark.parametrize("form", ["sdpa", "eager, window", "softcap", "sinks"])
def test_values_of_another_width_than_keys(form: str, over: Any, args: Any) -> None:
    attend, mask = FORMS[form]
    check_rewritten(compiled_once(over(attend, mask), args(k_dim=8, v_dim=16)))


@pytest.mark.parametrize("attend", [gqa, unscaled])
def test_as_many_kv_heads_as_query_heads(attend: Any) -> None:
    def alone(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        if attend is gqa:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return torch.softmax(q @ k.transpose(2, 3) + mask, dim=-1) @ v

    check_rewritten(compiled_once(over_buffer(alone, ADDED), buffer_args(heads=HEADS)))


def test_one_kv_head_that_all_queries_share() -> None:
    def shared(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return torch.softmax(q @ k.transpose(2, 3) + mask, dim=-1) @ v

    check_rewritten(compiled_once(over_buffer(shared, ADDED), buffer_args(heads=1)))


def test_arguments_reach_the_operator() -> None:
    """Scale, window, softcap and sinks, as numbers of the graph."""
    softcap = compiled_once(over_pool(softcapped, added(sliding(6))), pool_args())
    (node,) = softcap.after.graph.find_nodes(op="call_function", target=UNIFIED)
    assert node.args[7:10] == (pytest.approx(1.2), 6, 1.5)
    assert node.args[10] is None
    sinks = compiled_once(over_pool(with_sinks, ADDED), pool_args())
    (node,) = sinks.after.graph.find_nodes(op="call_function", target=UNIFIED)
    assert node.args[7:10] == (pytest.approx(0.3), 0, 0.0)
    assert node.args[10].meta["example_value"].shape == (HEADS,)
    fused = compiled_once(over_pool(sdpa, causal), pool_args())
    (node,) = fused.after.graph.find_nodes(op="call_function", target=UNIFIED)
    assert node.args[7:10] == (pytest.approx(DIM**-0.5), 0, 0.0)


@pytest.mark.parametrize("window", [1, 2, 4, 31, 32, 33])
@pytest.mark.parametrize(("over", "args"), SOURCES, ids=IDS)
def test_windows_are_exact(window: int, over: Any, args: Any) -> None:
    """W keys with the query's own; one that no row of 32 can fill is none (speculation.md 2.8, 3)."""
    run = compiled_once(
        over(sdpa, sliding(window)), args(lens=29 if args is buffer_args else (29, window // 2))
    )
    check_rewritten(run)
    assert run.attention[0].endswith(f"window {window}" if window < 32 else "verify_attention")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lens", [11, [11]])
def test_lengths_of_a_static_cache(lens: Any, dtype: torch.dtype) -> None:
    check_rewritten(compiled_once(over_buffer(sdpa, causal), buffer_args(lens=lens, dtype=dtype)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("lens", [(0, 29), (7, 8)])
def test_lengths_of_a_pool(lens: Any, dtype: torch.dtype) -> None:
    run = compiled_once(over_pool(sdpa, causal), pool_args(lens=lens, dtype=dtype))
    check_rewritten(run)


def test_lengths_that_move_on_behind_the_mask() -> None:
    """StaticLayer.update does so before the attention: the paged form must read them before."""

    def update(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        mask = causal(lens, q.shape[2], keys.shape[2])
        positions = torch.arange(q.shape[2]) + lens
        lens.add_(q.shape[2])
        keys.index_copy_(2, positions, k)
        values.index_copy_(2, positions, v)
        return sdpa(q, keys, values, mask)

    args = buffer_args()
    check_rewritten(compiled_once(update, args))


def test_many_calls_of_one_graph() -> None:
    """Lengths are data: no recompile, and right at each of them."""
    calls = [pool_args(lens=lens) for lens in ((0, 0), (1, 28), (29, 13))]
    check_rewritten(compiled_once(over_pool(spelled_out, added(sliding(4))), *calls))


def test_is_causal_prefill() -> None:
    def prefill(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)

    check_rewritten(compiled_once(over_buffer(prefill, no_mask), buffer_args(q_len=6, lens=0)))


def test_one_query_without_a_mask_sees_the_whole_static_cache() -> None:
    check_rewritten(compiled_once(over_buffer(sdpa, no_mask), buffer_args(q_len=1, lens=31)))


def test_a_mask_that_is_the_same_for_every_length() -> None:
    def full(lens: Tensor, q_len: int, keys: int) -> Tensor:
        return torch.arange(keys) <= (torch.arange(q_len) + keys - q_len)[None, None, :, None]

    check_rewritten(compiled_once(over_buffer(sdpa, full), buffer_args(lens=29)))


def test_the_result_may_be_viewed() -> None:
    """A product's result is contiguous, and so is what takes its place."""

    def viewed(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return spelled_out(q, k, v, mask).view(ROWS * HEADS, -1)

    check_rewritten(compiled_once(over_buffer(viewed, ADDED), buffer_args()))


def test_scores_may_have_other_readers() -> None:
    def returned(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores = weights(q, k)
        return torch.softmax(scores + mask, -1) @ repeat_kv(v), scores.amax(-1), mask + 1

    check_rewritten(compiled_once(over_buffer(returned, ADDED), buffer_args()))


def test_the_static_cache_may_lie_anywhere_in_its_storage() -> None:
    """No guard keeps it there: a second layer of one big tensor goes through the same graph."""

    def inside(big: Tensor, layer: int) -> Tensor:
        return big[layer]

    q, k, v, keys, values, lens = buffer_args()
    big_keys, big_values = torch.randn(3, *keys.shape), torch.randn(3, *values.shape)
    calls = [(q, k, v, inside(big_keys, i), inside(big_values, i), lens) for i in (0, 2, 1)]
    check_rewritten(compiled_once(over_buffer(sdpa, causal), *calls))


@pytest.mark.parametrize("capacity", [32, 33, 36, 128])
def test_static_caches_of_any_size_are_cut_into_pages(capacity: int) -> None:
    run = compiled_once(over_buffer(sdpa, causal), buffer_args(capacity=capacity))
    check_rewritten(run)
    (node,) = run.after.graph.find_nodes(op="call_function", target=UNIFIED)
    page_size = node.args[1].meta["example_value"].shape[1]
    assert capacity % page_size == 0
    assert page_size == {32: 32, 33: 1, 36: 4, 128: 128}[capacity]


# --- page tables: one for all layers that share their slots ------------------------------------


def pools(layers: int) -> list[tuple[Tensor, ...]]:
    """Keys and values pages of each layer, for pool_args."""
    return [pool_args()[3:5] for _ in range(layers)]


def stack(q: Tensor, k: Tensor, v: Tensor, layers: Any, tables: Any, lens: Tensor, windows: Any) -> Tensor:
    for (k_pages, v_pages), table, window in zip(layers, tables, windows, strict=True):
        mask = sliding(window)(lens, q.shape[2], table.shape[1])
        keys, values = append_to_pool(k, v, k_pages, v_pages, table, lens)
        q = q + sdpa(q, keys, values, mask)
    return q


def test_one_scatter_for_many_layers() -> None:
    q, k, v, _, _, table, lens = pool_args()
    args = (q, k, v, pools(5), [table] * 5, lens, [99, 4, 99, 4, 6])
    check_rewritten(compiled_once(stack, args), layers=5, scatters=1)


def test_a_sliding_twin_has_a_table_of_its_own() -> None:
    q, k, v, _, _, table, lens = pool_args()
    twin = pool_args()[5]
    args = (q, k, v, pools(4), [table, twin, table, twin], lens, [99, 4, 99, 4])
    check_rewritten(compiled_once(stack, args), layers=4, scatters=2)


def test_one_scatter_for_many_static_layers() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, buffers: Any, lens: Tensor) -> Tensor:
        mask = causal(lens, q.shape[2], 32)
        for keys, values in buffers:
            append_to_buffer(k, v, keys, values, lens)
            q = q + sdpa(q, keys, values, mask)
        return q

    q, k, v, _, _, lens = buffer_args()
    buffers = [buffer_args()[3:5] for _ in range(4)]
    check_rewritten(compiled_once(layers, (q, k, v, buffers, lens)), layers=4, scatters=1)


def test_canonicalize_alone_leaves_ragged_slots() -> None:
    for over, args in SOURCES:
        run = compiled_once(over(sdpa, causal), args(), passes=[canonicalize.PASS])
        assert (run.count(VERIFY), run.count(UNIFIED), run.scatters) == (1, 0, 0)
        assert run.count(torch.ops.specc.ragged_kv.default) == 1
        assert rewritten(run.after)


# --- symbolic sizes ----------------------------------------------------------------------------


def marked(args: tuple[Tensor, ...], **dims: int) -> tuple[Tensor, ...]:
    names = ("q", "k", "v", "k_pages", "v_pages", "table", "lens")
    for name, dim in dims.items():
        torch._dynamo.mark_dynamic(args[names.index(name)], dim)
    return args


@pytest.mark.parametrize(
    ("mask", "name"),
    [(causal, "verify_attention"), (sliding(8), "window 8"), (sliding(40), "window 40")],
    ids=["causal", "8", "40"],
)
def test_a_pool_of_symbolic_capacity(mask: Any, name: str) -> None:
    """Window 40 cannot be seen at the traced capacity of 32; the graph serves one of 64, too."""
    calls = [
        marked(pool_args(capacity=32, lens=(3, 20)), table=1, k_pages=0, v_pages=0),
        marked(pool_args(capacity=64, lens=(60, 47)), table=1, k_pages=0, v_pages=0),
    ]
    run = compiled_once(over_pool(sdpa, mask), *calls)
    check_rewritten(run)
    assert run.attention[0].endswith(name)


@pytest.mark.parametrize("scale", [2000.0, 2])
def test_a_window_that_is_computed_is_found_at_a_symbolic_capacity(scale: float) -> None:
    """25 * 8 keys, or 2000.0 / 10: no such number stands in the mask's code."""

    def computed(lens: Tensor, q_len: int, keys: int) -> Tensor:
        query, key = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None], torch.arange(keys)
        near = (query - key) // 25 < 8 if scale == 2 else (query - key) * 10 < scale
        return (key <= query) & near

    calls = [
        marked(pool_args(capacity=capacity, lens=lens), table=1, k_pages=0, v_pages=0)
        for capacity, lens in ((32, (3, 20)), (512, (400, 480)))
    ]
    run = compiled_once(over_pool(sdpa, computed), *calls)
    check_rewritten(run)
    assert run.attention[0].endswith("window 200")


@pytest.mark.parametrize("mask", [causal, sliding(8)])
def test_a_block_of_symbolic_length(mask: Any) -> None:
    def calls(args: Any) -> Any:
        for q_len in (2, 3, 7):
            yield marked(args(q_len), q=2, k=2, v=2)

    for over, args in SOURCES:
        check_rewritten(compiled_once(over(sdpa, mask), *calls(args)))


def test_a_rule_for_blocks_is_tried_beyond_the_traced_block() -> None:
    """Blocks of 8 queries that do not see each other: no block of 5 shows it."""

    def groups(lens: Tensor, q_len: int, keys: int) -> Tensor:
        query, key = torch.arange(q_len)[:, None], torch.arange(keys)
        behind = key - lens.reshape(-1, 1, 1, 1)
        return (behind <= query) & ((behind < 0) | (behind // 8 == query // 8))

    calls = [marked(pool_args(q_len), q=2, k=2, v=2) for q_len in (3, 12)]
    check_refused(compiled_once(over_pool(sdpa, groups), *calls), "not a causal chain's")


def test_what_must_be_known_when_compiling() -> None:
    buffers = marked(buffer_args(), k_pages=2, v_pages=2)
    check_refused(compiled_once(over_buffer(sdpa, causal), buffers), "size of its static cache is not known")
    rows = compiled_once(over_pool(fused_scaled, causal), pool_args(), dynamic=True)
    check_refused(rows, "rows and heads are not all known")
    dims = compiled_once(over_pool(sdpa, causal), pool_args(), dynamic=True)
    check_refused(dims, "its scale is not a constant")
