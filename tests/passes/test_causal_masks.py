"""prove_chain: masks of causal chains are proved in every spelling, and near misses are not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import GraphModule

from specc.passes.causal_masks import Chain, NotAChainError, prove_chain

Positions = Callable[[Tensor, Tensor, int], Tensor]
MIN = torch.finfo(torch.float32).min
ROWS = 2


def captured(fn: Callable[..., Tensor], *args: Any, dynamic: bool | None = None) -> tuple[str, Any]:
    """What prove_chain says of the mask that ``fn`` returns: ("chain", Chain) or ("refused", reason)."""
    found: list[tuple[str, Any]] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        (output,) = gm.graph.find_nodes(op="output")
        (mask,) = output.args[0]
        before = gm.code
        try:
            found.append(("chain", prove_chain(mask, ROWS)))
        except NotAChainError as error:
            found.append(("refused", str(error)))
        assert gm.code == before
        return gm.forward

    torch.compiler.reset()
    torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (result,) = found
    return result


def proved(fn: Callable[..., Tensor], *args: Any, **settings: Any) -> Chain:
    verdict, chain = captured(fn, *args, **settings)
    assert verdict == "chain", chain
    return chain


def refused(fn: Callable[..., Tensor], *args: Any, **settings: Any) -> str:
    verdict, reason = captured(fn, *args, **settings)
    assert verdict == "refused", reason
    return reason


# --- spellings: (query positions [.., q, 1], keys [S], window or 0) -> [.., q, S] -----------------


def compared(query: Tensor, key: Tensor, window: int) -> Tensor:
    visible = key <= query
    return visible & (key > query - window) if window else visible


def subtracted(query: Tensor, key: Tensor, window: int) -> Tensor:
    distance = query - key
    visible = torch.ge(distance, 0)
    return torch.logical_and(visible, distance.lt(window)) if window else visible


def hidden(query: Tensor, key: Tensor, window: int) -> Tensor:
    beyond = (query < key) | (key + window <= query) if window else query < key
    return ~beyond


def chosen(query: Tensor, key: Tensor, window: int) -> Tensor:
    return torch.where(compared(query, key, window), torch.zeros(()), MIN)


def filled(query: Tensor, key: Tensor, window: int) -> Tensor:
    visible = subtracted(query, key, window)
    return torch.zeros(visible.shape).masked_fill(visible.logical_not(), -torch.inf)


def multiplied(query: Tensor, key: Tensor, window: int) -> Tensor:
    return (1.0 - compared(query, key, window).float()) * MIN


SPELLINGS = {each.__name__: each for each in (compared, subtracted, hidden, chosen, filled, multiplied)}
KINDS = {"zero": (), "one": (1,), "rows": (ROWS,)}


@dataclasses.dataclass(frozen=True)
class Case:
    spelling: str
    kind: str
    dtype: torch.dtype
    q_len: int
    keys: int
    window: int

    def lens(self) -> Tensor:
        return torch.zeros(KINDS[self.kind], dtype=self.dtype)

    def mask(self, lens: Tensor, offset: int = 0) -> Tensor:
        query = lens.reshape(-1, 1, 1, 1) + torch.arange(self.q_len)[:, None] + offset
        return SPELLINGS[self.spelling](query, torch.arange(self.keys), self.window)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    q_len = draw(st.integers(1, 6))
    keys = q_len + draw(st.integers(2, 24))
    window = draw(st.one_of(st.just(0), st.integers(1, keys + 3)))
    spelling = draw(st.sampled_from(sorted(SPELLINGS)))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return Case(spelling, draw(st.sampled_from(sorted(KINDS))), dtype, q_len, keys, window)


def drawn(count: int) -> Callable[..., Any]:
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@drawn(60)
@given(case=cases())
def test_chains_are_proved(case: Case) -> None:
    chain = proved(case.mask, case.lens())
    assert chain.lengths is not None
    # A window that no row can fill is none.
    assert (chain.offset, chain.window) == (0, case.window if case.window < case.keys else 0)


@drawn(60)
@given(case=cases(), data=st.data())
def test_one_entry_at_one_length_is_a_miss(case: Case, data: st.DataObject) -> None:
    longest = case.keys - case.q_len
    at = data.draw(st.integers(0, longest), "length")
    query, key = (
        data.draw(st.integers(0, case.q_len - 1), "query"),
        data.draw(st.integers(0, case.keys - 1), "key"),
    )
    # The one entry in which windows of S - 1 and more keys differ.
    assume((at, query, key) != (longest, case.q_len - 1, 0))

    def flipped(lens: Tensor) -> Tensor:
        mask = case.mask(lens)
        here = lens.reshape(-1, 1, 1, 1) == at
        here = here & (torch.arange(case.q_len)[:, None] == query) & (torch.arange(case.keys) == key)
        if mask.dtype == torch.bool:
            return mask ^ here
        return torch.where(here, torch.where(mask == 0, MIN, 0.0), mask)

    reason = refused(flipped, case.lens())
    assert "not a causal chain's" in reason or "sees no key" in reason


@drawn(25)
@given(case=cases(), data=st.data())
def test_one_row_at_one_length_is_a_miss(case: Case, data: st.DataObject) -> None:
    case = dataclasses.replace(case, kind="rows", spelling="compared")
    row, at = data.draw(st.integers(0, ROWS - 1)), data.draw(st.integers(0, case.keys - case.q_len - 1))

    def flipped(lens: Tensor) -> Tensor:
        here = ((lens == at) & (torch.arange(ROWS) == row)).reshape(-1, 1, 1, 1)
        return case.mask(lens) ^ (here & (torch.arange(case.keys) == 0))

    refused(flipped, case.lens())


@drawn(25)
@given(case=cases(), offset=st.integers(-3, 3).filter(bool))
def test_positions_that_are_off(case: Case, offset: int) -> None:
    """Ahead of the row's end, a query would see slots that hold nothing; behind it, an empty row nothing."""
    # So far ahead, one query sees all keys at any length: that is another rule.
    assume(offset < case.keys - case.q_len)
    refused(lambda lens: case.mask(lens, offset), case.lens())


@drawn(40)
@given(case=cases(), data=st.data())
def test_masks_that_depend_on_no_length(case: Case, data: st.DataObject) -> None:
    offset = data.draw(st.integers(0, case.keys - case.q_len))
    chain = proved(lambda: case.mask(torch.zeros(1, dtype=torch.int64), offset))
    assert chain == Chain(None, offset, case.window if case.window < offset + case.q_len else 0)


@drawn(30)
@given(case=cases(), wider=st.integers(0, 200))
def test_windows_at_symbolic_sizes(case: Case, wider: int) -> None:
    """The graph will be used with more keys than it was traced with: every window has to be found."""
    window = max(1, case.window) + wider

    def mask(lens: Tensor, cached: Tensor) -> Tensor:
        query = lens.reshape(-1, 1, 1, 1) + torch.arange(case.q_len)[:, None]
        return SPELLINGS[case.spelling](query, torch.arange(cached.shape[0]), window)

    cached = torch.zeros(case.keys)
    torch._dynamo.mark_dynamic(cached, 0)
    assert proved(mask, case.lens(), cached).window == window


@pytest.mark.parametrize("window", [1000, 4096])
def test_windows_that_are_written_otherwise(window: int) -> None:
    cached = torch.zeros(16)
    torch._dynamo.mark_dynamic(cached, 0)

    def positions(lens: Tensor, cached: Tensor) -> tuple[Tensor, Tensor]:
        return lens.reshape(-1, 1, 1, 1) + torch.arange(3)[:, None], torch.arange(cached.shape[0])

    def as_float(lens: Tensor, cached: Tensor) -> Tensor:
        query, key = positions(lens, cached)
        return (key <= query) & (query - key < float(window))

    def as_tensor(lens: Tensor, cached: Tensor) -> Tensor:
        query, key = positions(lens, cached)
        return (key <= query) & (query - key < torch.tensor(window))

    def as_product(lens: Tensor, cached: Tensor) -> Tensor:
        query, key = positions(lens, cached)
        return (key <= query) & (query - key < torch.tensor(window // 8) * 8)

    def as_quotient(lens: Tensor, cached: Tensor) -> Tensor:
        query, key = positions(lens, cached)
        return (key <= query) & ((query - key) // 8 < window // 8)

    for spelling in (as_float, as_tensor, as_product, as_quotient):
        assert proved(spelling, torch.tensor([0, 0]), cached).window == window, spelling


def test_a_symbolic_number_of_queries() -> None:
    def mask(lens: Tensor, tokens: Tensor) -> Tensor:
        return compared(
            lens.reshape(-1, 1, 1, 1) + torch.arange(tokens.shape[0])[:, None], torch.arange(64), 0
        )

    def in_groups(lens: Tensor, tokens: Tensor) -> Tensor:
        query = torch.arange(tokens.shape[0])[:, None]
        behind = torch.arange(64) - lens.reshape(-1, 1, 1, 1)
        return (behind <= query) & ((behind < 0) | (behind // 7 == query // 7))

    tokens = torch.zeros(3)
    torch._dynamo.mark_dynamic(tokens, 0)
    assert proved(mask, torch.tensor(0), tokens).offset == 0
    assert "not a causal chain's" in refused(in_groups, torch.tensor(0), tokens)


def length_as_a_number(length: int) -> Tensor:
    return torch.arange(24) <= (length + torch.arange(2))[None, None, :, None]


def after_twelve(length: int) -> Tensor:
    return torch.arange(64) <= (min(length, 12) + torch.arange(2))[None, None, :, None]


def test_a_length_that_is_a_symbolic_number() -> None:
    """The graph is kept for all numbers that its guards let through: the rule must hold for them."""

    def guarded(length: int) -> Tensor:
        torch._check(length <= 22)
        return length_as_a_number(length)

    chain = proved(guarded, 5, dynamic=True)
    assert chain.lengths is not None
    assert (chain.offset, chain.window) == (0, 0)
    refused(length_as_a_number, 5, dynamic=True)


def test_a_full_window_stays_as_it_is() -> None:
    """transformers, past a full window: positions relative to the window, whatever the length."""

    def full(lens: Tensor) -> Tensor:
        query, key = (lens + torch.arange(3))[None, None, :, None], torch.arange(10) + lens - 7
        return (key <= query) & (key > query - 8)

    assert proved(full, torch.tensor(9)) == Chain(None, 7, 8)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (
            lambda lens, data: compared(lens + torch.zeros(1, 1, 2, 1), torch.arange(8), 0) & (data > 0),
            "depends on",
        ),
        (lambda lens, data: torch.arange(8) <= data.view(1, 1, 1, 8), "it depends on l_data_"),
        (lambda lens, data: torch.arange(8)[None] <= lens.reshape(1, 1), "its shape is [1, 8]"),
        (lambda lens, data: (torch.arange(8) <= lens.reshape(1, 1, 1, 1)).expand(1, 4, 2, 8), "its shape is"),
        (lambda lens, data: (torch.arange(8) <= lens.reshape(1, 1, 1, 1)).int(), "it holds torch.int32"),
        (lambda lens, data: (torch.arange(8) <= lens.reshape(1, 1, 1, 1)).float(), "adds a bias"),
        (lambda lens, data: torch.arange(8) < lens.reshape(1, 1, 1, 1), "sees no key at all"),
        (
            lambda lens, data: torch.ones(1, 1, 4, 2, dtype=torch.bool) & (lens >= 0),
            "2 keys for a block of 4",
        ),
        (lambda lens, data: torch.ones(5, 8).tril()[lens][None, None, None] > 0, "it depends on"),
        (lambda lens, data: compared(lens + torch.rand(1, 1, 1, 1) * 0.01, torch.arange(8), 0), "at random"),
    ],
)
def test_reasons(mask: Callable[..., Tensor], reason: str) -> None:
    assert reason in refused(mask, torch.tensor(3), torch.arange(1, 9))


def test_nothing_of_the_generator_is_used_up() -> None:
    state = torch.get_rng_state()
    with torch.no_grad():
        proved(Case("compared", "rows", torch.int64, 3, 12, 4).mask, torch.zeros(ROWS, dtype=torch.int64))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("when", ["before", "between", "behind"])
def test_lengths_that_are_changed(when: str) -> None:
    def mask(lens: Tensor) -> Tensor:
        alias = lens.view(-1)
        if when == "before":
            alias.add_(2)
        offset = lens.to(torch.int64)
        if when == "between":
            alias.add_(2)
        visible = compared(offset.reshape(-1, 1, 1, 1) + torch.arange(3)[:, None], torch.arange(20), 0)
        if when == "behind":
            alias.add_(2)
        return visible

    verdict, found = captured(mask, torch.zeros(ROWS, dtype=torch.int64))
    assert verdict == ("chain" if when == "behind" else "refused")
    assert when == "behind" or "is changed in place" in found


def test_a_mask_that_is_changed_after_all() -> None:
    def mask(lens: Tensor) -> Tensor:
        visible = compared(lens.reshape(-1, 1, 1, 1) + torch.arange(3)[:, None], torch.arange(20), 0)
        visible[:, :, 0].logical_not_()
        return visible

    assert "is changed in place" in refused(mask, torch.zeros(ROWS, dtype=torch.int64))


def test_masks_by_vmap_are_kept() -> None:
    """Their values within vmap cannot be told apart; transformers makes such masks for packed sequences."""

    def mask(lens: Tensor) -> Tensor:
        query = lens.reshape(-1, 1, 1) + torch.arange(3)
        return torch.vmap(torch.vmap(torch.vmap(lambda position: torch.arange(9) <= position)))(query)

    assert "it depends on" in refused(mask, torch.tensor(0))
