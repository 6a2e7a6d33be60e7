"""Attention of other kinds, and what only looks like attention, is left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from tests.passes.attention_checks import (
    ADDED,
    SINKS,
    UNIFIED,
    VERIFY,
    WRITE,
    check_refused,
    check_rewritten,
    weights,
)
from tests.passes.attention_graphs import (
    DIM,
    GROUP,
    HEADS,
    append_to_buffer,
    append_to_pool,
    buffer_args,
    causal,
    compiled,
    compiled_once,
    over_buffer,
    pool_args,
    repeat_kv,
    sdpa,
)


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
