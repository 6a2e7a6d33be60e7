"""What every operator has to pass, and the two that have no kernel of their own yet."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specc.errors import ProviderError
from specc.lowerings import REGISTRY, accept_greedy, kv_write
from specc.lowerings.framework import Op, Provider

PROVIDERS = [
    (name, provider.name)
    for name, op in REGISTRY.items()
    for provider in op.providers
    if provider.supports(*op.sample("cpu")) is None
]


@pytest.mark.parametrize(("name", "provider"), [*PROVIDERS, *((name, "default") for name in REGISTRY)])
def test_opcheck(name: str, provider: str) -> None:
    torch.manual_seed(0)
    overload = getattr(getattr(torch.ops.specc, name), provider)
    torch.library.opcheck(overload, REGISTRY[name].sample("cpu"))


@pytest.mark.parametrize(("name", "provider"), PROVIDERS)
def test_providers_agree_with_the_reference(name: str, provider: str) -> None:
    op = REGISTRY[name]
    torch.manual_seed(0)
    ours = op.sample("cpu")
    theirs = tuple(each.clone() if isinstance(each, torch.Tensor) else each for each in ours)
    result = getattr(getattr(torch.ops.specc, name), provider)(*ours)
    torch.testing.assert_close(result, op.reference(*theirs))
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(mine, torch.Tensor):
            torch.testing.assert_close(mine, other)


def test_the_chooser_takes_the_best_that_supports_the_call_and_keeps_the_reasons() -> None:
    op = Op(
        name="toy",
        schema="",
        reference=lambda x: x,
        sample=lambda device: (),
        providers=(
            Provider("plain", lambda x: x, lambda x: None, priority=-1),
            Provider("quick", lambda x: x, lambda x: None if x > 1 else "x is too small", priority=5),
            Provider("broken", lambda x: x, lambda x: "never works", priority=9),
        ),
    )
    assert op.choose(2).provider.name == "quick"
    decision = op.choose(1)
    assert decision.describe() == "plain (not broken: never works; not quick: x is too small)"
    assert op.choose(2, forced="plain").provider.name == "plain"
    with pytest.raises(ProviderError, match="no provider of specc::toy .*quick: x is too small"):
        op.choose(1, forced="quick")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_kv_write_changes_the_named_slots_and_nothing_else(data: st.DataObject) -> None:
    num_pages, page, tokens = 5, data.draw(st.sampled_from([1, 4, 16])), 4
    slots = data.draw(
        st.lists(st.integers(0, num_pages * page - 1), min_size=tokens, max_size=tokens, unique=True)
    )
    k, v = torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 6)
    k_pages, v_pages = torch.randn(num_pages, page, 2, 8), torch.randn(num_pages, page, 2, 6)
    expected = [each.clone().reshape(num_pages * page, 2, -1) for each in (k_pages, v_pages)]
    for token, slot in enumerate(slots):
        expected[0][slot], expected[1][slot] = k[token], v[token]
    kv_write(k, v, k_pages, v_pages, torch.tensor(slots), None, None)
    assert torch.equal(k_pages.reshape(num_pages * page, 2, -1), expected[0])
    assert torch.equal(v_pages.reshape(num_pages * page, 2, -1), expected[1])


def test_kv_write_clamps_strays_casts_and_follows_strides() -> None:
    pool = torch.zeros(2, 3, 4, 1, 2, dtype=torch.bfloat16)
    k_pages, v_pages = pool.unbind(0)
    wide = torch.zeros(3, 4, 1, 4)[..., ::2]
    k = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    kv_write(k, k, k_pages, wide, torch.tensor([-7, 99]), None, None)
    assert k_pages.float()[0, 0, 0].tolist() == wide[0, 0, 0].tolist() == [1, 2]
    assert k_pages.float()[2, 3, 0].tolist() == wide[2, 3, 0].tolist() == [3, 4]
    assert int((k_pages != 0).sum()) == int((wide != 0).sum()) == 4
    assert not bool(v_pages.any())


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_accept_greedy_takes_the_longest_right_prefix(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 6))
    row = st.lists(st.integers(0, 2), min_size=width, max_size=width)
    rows = data.draw(st.lists(st.tuples(row, row), min_size=1, max_size=4))
    candidates, choice = (torch.tensor([pair[i] for pair in rows]) for i in (0, 1))
    num_correct, next_token = accept_greedy(candidates, choice)
    for i, (block, wanted) in enumerate(rows):
        correct = 0
        while correct < width - 1 and block[correct + 1] == wanted[correct]:
            correct += 1
        assert (int(num_correct[i]), int(next_token[i])) == (correct, wanted[correct])


@pytest.mark.parametrize(
    ("predict", "correct", "bonus"), [([7, 9, 4, 8], 2, 4), ([7, 9, 2, 8], 3, 8), ([1, 9, 2, 8], 0, 1)]
)
def test_accept_greedy_vectors(predict: list[int], correct: int, bonus: int) -> None:
    """Later matches behind a wrong draft count for nothing."""
    num_correct, next_token = accept_greedy(torch.tensor([[5, 7, 9, 2]]), torch.tensor([predict]))
    assert (num_correct.tolist(), next_token.tolist()) == ([correct], [bonus])
