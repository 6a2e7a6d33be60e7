"""Attention whose mask is no causal chain's keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.attention_checks import (
    ADDED,
    IDS,
    SOURCES,
    check_refused,
    check_rewritten,
)
from tests.passes.attention_graphs import (
    ROWS,
    added,
    append_to_buffer,
    buffer_args,
    causal,
    compiled_once,
    no_mask,
    over_buffer,
    over_pool,
    pool_args,
    sdpa,
    spelled_out,
)


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
