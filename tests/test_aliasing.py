"""A copy that a graph takes of a state, before an operator changes it, stays a copy.

Inductor takes ``saved = state.clone(); op(saved, state)`` for ``op(state, state)`` where ``op`` writes
``state`` (pytorch/pytorch#198031), behind specc's passes as well. specc's operators never read a copy of what
they write: a commit reads what a verify graph returned, and verify graphs write no state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import commit_conv, commit_snapshots

ROWS, TOKENS = 2, 3


@pytest.fixture(scope="module", autouse=True)
def _operator() -> Iterator[None]:
    """``specc_test::shift_from(saved, state)``: state[i] = saved[i - 1], one after the other."""
    library = torch.library.Library("specc_test", "FRAGMENT")

    def shift_from(saved: Tensor, state: Tensor) -> None:
        for index in range(1, len(state)):
            state[index] = saved[index - 1]
        state[0] = 0

    library.define("shift_from(Tensor saved, Tensor(a!) state) -> ()")
    library.impl("shift_from", shift_from, "CompositeExplicitAutograd")
    library.impl("shift_from", lambda saved, state: None, "Meta")
    yield
    library._destroy()


def copied(state: Tensor, buffer: Tensor) -> Tensor:
    saved = state.clone()
    torch.ops.specc_test.shift_from(saved, state)
    return state.sum()


def copied_to_an_input(state: Tensor, buffer: Tensor) -> Tensor:
    buffer.copy_(state)
    torch.ops.specc_test.shift_from(buffer, state)
    return state.sum()


def check(function: Callable[..., Any], args: tuple[Any, ...], backend: str, **settings: Any) -> None:
    """Compiled and eager return the same and leave the same in their arguments."""
    expected_args = torch.utils._pytree.tree_map(torch.clone, args)
    expected = function(*expected_args)
    torch.compiler.reset()
    with torch.no_grad():
        result = torch.compile(function, backend=backend, fullgraph=True, **settings)(*args)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(args, expected_args)


def state_and_buffer() -> tuple[Tensor, Tensor]:
    return torch.arange(1.0, 7.0), torch.zeros(6)


@pytest.mark.xfail(strict=True, reason="pytorch/pytorch#198031")
@pytest.mark.parametrize("backend", ["inductor", "specc"])
def test_inductor_takes_a_copy_for_the_original(backend: str) -> None:
    check(copied, state_and_buffer(), backend, options={"inductor": True} if backend == "specc" else {})


def test_as_captured_a_copy_is_a_copy() -> None:
    check(copied, state_and_buffer(), "specc", options={"inductor": False})


@pytest.mark.parametrize("inductor", [False, True])
def test_a_copy_in_an_input_is_a_copy(inductor: bool) -> None:
    check(copied_to_an_input, state_and_buffer(), "specc", options={"inductor": inductor})


def verify_and_commit(window: Tensor, state: Tensor, x: Tensor, snapshots: Tensor, last: Tensor) -> Any:
    """Commits within a graph, which returns what was there before."""
    before = window.clone(), state.clone()
    commit_conv(window, x, last, None, None, None)
    commit_snapshots([state], [snapshots], last, None, None, None)
    return before


@pytest.mark.parametrize("inductor", [False, True])
def test_commits_beside_copies_of_what_they_write(inductor: bool) -> None:
    window, x = torch.randn(ROWS, 5, 4), torch.randn(ROWS, 5, TOKENS)
    state, snapshots = torch.randn(ROWS, 2, 3), torch.randn(ROWS, TOKENS, 2, 3)
    args = (window, state, x, snapshots, torch.tensor([1, -1]))
    check(verify_and_commit, args, "specc", options={"inductor": inductor})
