"""Attention of stock models becomes specc::verify_attention, however it is spelled, and only where it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from specc.lowerings import kv_write, unified_attention, verify_attention
from specc.passes import canonicalize
from tests.passes.attention_graphs import (
    DIM,
    GROUP,
    HEADS,
    KV_HEADS,
    ROWS,
    added,
    append_to_buffer,
    append_to_pool,
    attentions,
    buffer_args,
    causal,
    compiled,
    compiled_once,
    count,
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

WRITE, VERIFY, UNIFIED = kv_write.overload, verify_attention.overload, unified_attention.overload
MINUS_INFINITY = added(causal, -torch.inf)
ADDED = added(causal)
SOURCES = [(over_pool, pool_args), (over_buffer, buffer_args)]
IDS = ["pool", "static"]


def check_rewritten(run: Any, layers: int = 1, scatters: int = 1) -> None:
    """Counts on the graph before and after both passes; results were compared when it ran."""
    assert attentions(run.before) == layers
    assert rewritten(run.after), run.refusals
    assert len(run.attention) == layers
    assert (run.count(UNIFIED), run.count(VERIFY), run.scatters) == (layers, 0, scatters)
    assert run.count(WRITE) == layers
    assert run.refusals == []


def check_refused(run: Any, reason: str) -> None:
    """The attention is as it was, with one remark that says why."""
    (given,) = run.refusals
    assert reason in given
    assert attentions(run.after) == attentions(run.before) == 1
    assert run.count(UNIFIED, VERIFY) == run.scatters == 0
    assert count(run.before, "index_copy_") == run.count("index_copy_")


# --- spellings that are known ------------------------------------------------------------------


def gqa(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)


def fused_scaled(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(
        query=q, key=repeat_kv(k), value=repeat_kv(v), attn_mask=mask, dropout_p=0.0, scale=0.11
    )


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.3


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


SINKS = torch.linspace(-1, 2, HEADS)


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


# --- masks that are no chain's -----------------------------------------------------------------


def tree(lens: Tensor, q_len: int, keys: int) -> Tensor:
    """topk 2 (speculation.md 2.8, 2): the third token is the second's sister, and does not see it."""
    ancestors = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    behind = torch.arange(keys) - lens.reshape(-1, 1, 1, 1)
    inside = (behind >= 0) & (behind < q_len)
    return (behind < 0) | (inside & ancestors[torch.arange(q_len)[:, None], behind.clamp(0, q_len - 1)])


def chunked(lens: Tensor, q_len: int, keys: int) -> Tensor:
    query, key = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None], torch.arange(keys)
    return (key <= query) & (key // 8 == query // 8)


def biased(lens: Tensor, q_len: int, keys: int) -> Tensor:
    query, key = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None], torch.arange(keys)
    return ADDED(lens, q_len, keys) + 0.1 * (key - query)


def mildly_hidden(lens: Tensor, q_len: int, keys: int) -> Tensor:
    return added(causal, -10000.0)(lens, q_len, keys)


def scaled_away(lens: Tensor, q_len: int, keys: int) -> Tensor:
    return ADDED(lens, q_len, keys) * 1e-38


def until(lens: Tensor, q_len: int, keys: int) -> Tensor:
    """Causal for the lengths traced; from 24 on, the first key is hidden."""
    query = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None]
    return causal(lens, q_len, keys) & ((torch.arange(keys) > 0) | (query < 24))


def at_one_length(lens: Tensor, q_len: int, keys: int) -> Tensor:
    odd = lens.reshape(-1, 1, 1, 1) == 13
    return causal(lens, q_len, keys) & ((torch.arange(keys) != 2) | ~odd)


def looking_ahead(lens: Tensor, q_len: int, keys: int) -> Tensor:
    return causal(lens + 2, 1, keys).expand(-1, -1, q_len, -1)


def sees_nothing(lens: Tensor, q_len: int, keys: int) -> Tensor:
    return causal(lens - 1, q_len, keys)


def random(lens: Tensor, q_len: int, keys: int) -> Tensor:
    return causal(lens, q_len, keys) & (torch.rand(1, 1, q_len, keys) > 1e-9)


NO_CHAINS: dict[str, tuple[Any, str]] = {
    "tree": (tree, "a tree of drafts"),
    "chunked": (chunked, "not a causal chain's"),
    "bias": (biased, "adds a bias"),
    "mildly hidden": (mildly_hidden, "adds a bias"),
    "scaled away": (scaled_away, "adds a bias"),
    "until": (until, "not a causal chain's"),
    "at one length": (at_one_length, "not a causal chain's"),
    "looking ahead": (looking_ahead, "not a causal chain's"),
    "sees nothing": (sees_nothing, "sees no key at all"),
    "random": (random, "drawn at random"),
}


@pytest.mark.parametrize(("over", "args"), SOURCES, ids=IDS)
@pytest.mark.parametrize("name", NO_CHAINS)
def test_masks_that_are_no_chains_are_kept(name: str, over: Any, args: Any) -> None:
    mask, reason = NO_CHAINS[name]
    run = compiled_once(over(sdpa, mask), args(lens=9 if args is buffer_args else (9, 3)))
    check_refused(run, reason)


def test_a_random_mask_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    run = compiled_once(over_buffer(sdpa, random), buffer_args())
    check_refused(run, "drawn at random")
    assert not torch.equal(before, torch.get_rng_state()), "eager drew from it"


def given_mask(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor, mask: Any
) -> Tensor:
    append_to_buffer(k, v, keys, values, lens)
    return sdpa(q, keys, values, mask)


def test_a_mask_from_outside() -> None:
    args = buffer_args()
    mask = causal(args[5], 3, 32)
    check_refused(compiled_once(given_mask, (*args, mask)), "it depends on l_mask_")


def padded(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor, mask: Any) -> Tensor:
    append_to_buffer(k, v, keys, values, lens)
    return sdpa(q, keys, values, causal(lens, 3, 32) & mask[:, None, None, :].bool())


def test_padding() -> None:
    mask = torch.ones(ROWS, 32, dtype=torch.int64)
    mask[0, :2] = 0
    check_refused(compiled_once(padded, (*buffer_args(), mask)), "it depends on l_mask_")


def test_a_mask_that_depends_on_data() -> None:
    def by_data(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        return sdpa(q, keys, values, causal(lens, 3, 32) & (q.sum() < 1e9))

    check_refused(compiled_once(by_data, buffer_args()), "it depends on l_q_")


def test_a_mask_for_all_queries_at_once() -> None:
    """[B, 1, 1, S] is no chain's for a block: its first query sees the last one's key."""

    def row(lens: Tensor, q_len: int, keys: int) -> Tensor:
        return (torch.arange(keys) <= lens + q_len - 1).view(1, 1, 1, keys)

    check_refused(compiled_once(over_buffer(sdpa, row), buffer_args()), "its shape is [1, 1, 1, 32]")
    check_refused(compiled_once(over_buffer(spelled_out, added(row)), buffer_args()), "its shape is")
    check_rewritten(compiled_once(over_buffer(sdpa, row), buffer_args(q_len=1, lens=29)))


def test_one_row_of_a_mask_for_rows_of_other_lengths() -> None:
    def first(lens: Tensor, q_len: int, keys: int) -> Tensor:
        return causal(lens[:1], q_len, keys)

    check_refused(compiled_once(over_pool(sdpa, first), pool_args()), "not a causal chain's")


def test_two_inputs_that_could_be_lengths() -> None:
    def shifted(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any, by: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        return sdpa(q, keys, values, causal(lens + by, 3, 32))

    run = compiled_once(shifted, (*buffer_args(), torch.tensor(0)))
    check_refused(run, "more than one input that could be a length (l_lens_, l_by_)")


@pytest.mark.parametrize("q_len", [2, 3])
def test_no_mask_for_a_block(q_len: int) -> None:
    check_refused(compiled_once(over_buffer(sdpa, no_mask), buffer_args(q_len)), "it has no mask")


def test_no_mask_over_a_pool() -> None:
    run = compiled_once(over_pool(sdpa, no_mask), pool_args(q_len=1))
    check_refused(run, "would see slots that hold no token")


# --- other attention ---------------------------------------------------------------------------


def head_bias(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """ALiBi: a slope per head beside the mask."""
    slopes = torch.linspace(0.1, 0.4, HEADS).view(1, HEADS, 1, 1) * torch.arange(k.shape[2])
    return torch.softmax(weights(q, k) + slopes + mask, -1) @ repeat_kv(v)


def masked_per_head(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    slopes = torch.linspace(0.1, 0.4, HEADS).view(1, HEADS, 1, 1) * torch.arange(k.shape[2])
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask + slopes)


def boolean_added(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """True adds one to what should be seen."""
    return torch.softmax(weights(q, k) + (mask == 0), -1) @ repeat_kv(v)


def with_alpha(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(torch.add(weights(q, k), mask, alpha=1e-38), -1) @ repeat_kv(v)


def rounded(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(torch.div(weights(q, k), 0.5, rounding_mode="floor") + mask, -1) @ repeat_kv(v)


def by_zero(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return (torch.softmax(weights(q, k) / 0.0 + mask, -1) @ repeat_kv(v)).nan_to_num()


def over_queries(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(weights(q, k) + mask, dim=1) @ repeat_kv(v)


def mask_inside_the_cap(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(torch.tanh((weights(q, k) + mask) / 5) * 5, -1) @ repeat_kv(v)


def capped_by_two_numbers(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(torch.tanh(weights(q, k) / 5) * 4 + mask, -1) @ repeat_kv(v)


def column(values: Tensor, shift: Any = None) -> Callable[..., Tensor]:
    """gpt_oss's form with ``values`` as the extra column."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        combined = torch.cat([weights(q, k) + mask, values.expand(q.shape[0], HEADS, q.shape[2], 1)], -1)
        combined = combined if shift is None else combined - shift(combined)
        return torch.softmax(combined, -1)[..., :-1] @ repeat_kv(v)

    return attend


HEADWISE = SINKS.view(1, HEADS, 1, 1)
NO_SINKS = "no sinks are seen"
PRODUCT = "which is no product of queries and keys"


def no_transpose(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    scores = torch.matmul(q, repeat_kv(k).transpose(2, 3).tanh()) + mask
    return torch.softmax(scores, -1) @ repeat_kv(v)


def interleaved(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """Head h reads KV head h % Hkv."""
    keys, values = (each.repeat(1, GROUP, 1, 1) for each in (k, v))
    return torch.softmax(q @ keys.transpose(2, 3) + mask, -1) @ values


def mixed(states: Tensor) -> Tensor:
    """Looks like repeat_kv, and then takes its tokens in another order."""
    rows, heads, length, dim = states.shape
    expanded = states[:, :, None, :, :].expand(rows, heads, GROUP, length, dim)
    return expanded.reshape(rows, HEADS, dim, length).reshape(rows, HEADS, length, dim)


def folded(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return torch.softmax(q @ mixed(k).transpose(2, 3) + mask, -1) @ mixed(v)


def wide_mask(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(
        q, repeat_kv(k), repeat_kv(v), attn_mask=mask.expand(-1, HEADS, -1, -1)
    )


def active_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.dropout(torch.softmax(weights(q, k) + mask, -1), p=0.5, training=True) @ repeat_kv(v)


def fused_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask, dropout_p=0.5)


def flat(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    heads = (each.flatten(0, 1) for each in (q, repeat_kv(k), repeat_kv(v)))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask[0])


OTHERS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "slopes": (head_bias, PRODUCT),
    "slopes in the mask": (masked_per_head, "and not [B or 1, 1, q, S]"),
    "boolean added": (boolean_added, PRODUCT),
    "alpha": (with_alpha, PRODUCT),
    "rounded": (rounded, PRODUCT),
    "over nothing": (by_zero, PRODUCT),
    "another dimension": (over_queries, "not over the last dimension"),
    "mask inside the cap": (mask_inside_the_cap, PRODUCT),
    "two caps": (capped_by_two_numbers, PRODUCT),
    "a constant column": (column(torch.zeros(1, 1, 1, 1)), NO_SINKS),
    "a column per query": (column(SINKS.view(1, 1, HEADS, 1)), NO_SINKS),
    "no row maximum": (column(HEADWISE, lambda scores: scores.amax(1, keepdim=True)), NO_SINKS),
    "an elementwise maximum": (column(HEADWISE, lambda s: torch.max(s, s.flip(-1))), NO_SINKS),
    "tanh of keys": (no_transpose, PRODUCT),
    "repeated in another order": (interleaved, "computed from what is cached"),
    "reshaped otherwise": (folded, "computed from what is cached"),
    "a mask for each head": (wide_mask, "and not [B or 1, 1, q, S]"),
    "active dropout": (active_dropout, "drops out weights"),
    "fused dropout": (fused_dropout, "drops out weights"),
    "three dimensions": (flat, "its query has 3 dimensions"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_attention_is_kept(name: str) -> None:
    attend, reason = OTHERS[name]
    check_refused(compiled_once(over_buffer(attend, ADDED), buffer_args(q_len=HEADS)), reason)


def test_scales_that_are_no_constants() -> None:
    def by(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any, scale: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        scores = (q @ repeat_kv(keys).transpose(2, 3)) * scale + ADDED(lens, 3, 32)
        return torch.softmax(scores, -1) @ repeat_kv(values)

    check_refused(compiled_once(by, (*buffer_args(), torch.tensor(0.3))), PRODUCT)

    def fused(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any, scale: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        mask = causal(lens, 3, 32)
        return F.scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values), mask, scale=scale)

    runs = compiled(fused, *((*buffer_args(), scale) for scale in (0.3, 0.7, 0.9)))
    check_rewritten(runs[0])
    # Another scale made it a variable of the graph.
    check_refused(runs[-1], "its scale is not a constant of the graph")


def test_latent_attention() -> None:
    def latent(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any, up: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        return sdpa(q, F.linear(keys, up), values, causal(lens, 3, 32))

    run = compiled_once(latent, (*buffer_args(), torch.randn(DIM, DIM)))
    check_refused(run, "computed from what is cached, as in latent attention (MLA)")


def test_a_dynamic_cache() -> None:
    def grown(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any) -> Tensor:
        keys, values = torch.cat([keys, k], -2), torch.cat([values, v], -2)
        return sdpa(q, keys, values, torch.ones(3, 35, dtype=torch.bool).tril(32)[None, None])

    check_refused(compiled_once(grown, buffer_args()), "no cache of fixed size")


def test_attention_over_itself() -> None:
    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), is_causal=True)

    check_refused(compiled_once(own, buffer_args()[:3]), "no cache of fixed size")


def test_a_router_is_no_attention() -> None:
    def route(hidden: Tensor, experts: Tensor) -> Any:
        return torch.softmax(hidden @ experts.t(), dim=-1, dtype=torch.float32).topk(2)

    run = compiled_once(route, (torch.randn(5, 8), torch.randn(4, 8)))
    assert run.remarks == []
    assert run.before.code == run.after.code


def test_weights_that_are_returned_are_left_alone() -> None:
    def returned(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        probabilities = torch.softmax(weights(q, k) + mask, -1)
        return probabilities @ repeat_kv(v), probabilities

    run = compiled_once(over_buffer(returned, ADDED), buffer_args())
    assert (run.remarks, run.count(UNIFIED, VERIFY, WRITE)) == ([], 0)


def test_shapes_that_are_broadcast() -> None:
    def plain(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        return torch.softmax(q @ keys.transpose(2, 3) + ADDED(lens, 3, 32), -1) @ values

    args = buffer_args(heads=HEADS)
    one_row = tuple(each[:1].contiguous() for each in args[1:5])
    check_refused(compiled_once(plain, (args[0], *one_row, args[5])), "do not have the same rows")
    q, k, v, keys, values, lens = args
    one_value_head = (q, k, v[:, :1].contiguous(), keys, values[:, :1].contiguous(), lens)
    check_refused(compiled_once(plain, one_value_head), "do not have the same rows")
    one_query_head = (q[:, :1].contiguous(), k, v, keys, values, lens)
    check_refused(compiled_once(plain, one_query_head), "do not have the same rows")


def test_more_queries_than_keys() -> None:
    def copied(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys.copy_(k[:, :, :4])
        values.copy_(v[:, :, :4])
        return F.scaled_dot_product_attention(q, repeat_kv(keys), repeat_kv(values), is_causal=True)

    args = buffer_args(q_len=6, capacity=4)
    check_refused(compiled_once(copied, args[:5]), "6 queries and only 4 keys")


def test_a_mask_and_is_causal_at_once() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), mask, is_causal=True)

    check_refused(compiled_once(over_buffer(both, causal), buffer_args()), "a mask and is_causal")


def test_a_result_of_another_dtype() -> None:
    def lower(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Any) -> Tensor:
        append_to_buffer(k, v, keys, values, lens)
        probabilities = torch.softmax(weights(q, keys) + ADDED(lens, 3, 32), -1)
        return (probabilities.to(torch.bfloat16) @ repeat_kv(values)).float()

    q, k, v, keys, values, lens = buffer_args()
    args = (q, k, v.bfloat16(), keys, values.bfloat16(), lens)
    check_refused(compiled_once(lower, args), "turns queries of torch.float32 into torch.bfloat16")


def test_keys_and_values_of_other_slots() -> None:
    def crossed(q: Tensor, k: Tensor, v: Tensor, k_pages: Any, v_pages: Any, table: Any, lens: Any) -> Tensor:
        keys, _ = append_to_pool(k, v, k_pages, v_pages, table, lens)
        values = torch.ops.specc.read_pages(v_pages, table.flip(0), None, v.dtype)
        return sdpa(q, keys, values, causal(lens, 3, 32))

    check_refused(compiled_once(crossed, pool_args()), "its keys and values lie in different slots")


# --- what is changed in between ----------------------------------------------------------------

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
