"""``commit_snapshots`` against plain indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specc.lowerings import REGISTRY, commit_snapshots

LIMITS = settings(max_examples=60, deadline=None)


def layers(kind: str, shape: tuple[int, ...]) -> list[Tensor]:
    """Three layers' tensors: views of one buffer, at odd distances, or each of its own shape."""
    if kind == "one buffer":
        return list(torch.randn(3, *shape))
    if kind == "apart":
        return [torch.randn(1 + layer, *shape)[layer] for layer in range(3)]
    return [torch.randn(*shape[:-1], shape[-1] + layer) for layer in range(3)]


KINDS = ("one buffer", "apart", "shapes")


def expected_states(
    states: list[Tensor],
    snapshots: list[Tensor],
    last: list[int],
    slots: list[int],
    tracks: list[int],
    steps: list[int],
) -> list[Tensor]:
    results = [state.clone() for state in states]
    for result, snapshot in zip(results, snapshots, strict=True):
        for row, slot in enumerate(slots):
            for to, step in ((slot, last[row]), (tracks[row], steps[row])):
                if slot >= 0 and to >= 0 and step >= 0:
                    result[to] = snapshot[row, step]
    return results


@LIMITS
@given(data=st.data(), kind=st.sampled_from(KINDS), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_each_row_gets_its_step(data: st.DataObject, kind: str, dtype: torch.dtype) -> None:
    tokens = data.draw(st.integers(1, 5))
    states = [each.to(dtype) for each in layers(kind, (6, 2, 3))]
    snapshots = [each.to(dtype) for each in layers(kind, (3, tokens, 2, 3))]
    step = st.lists(st.integers(-1, tokens - 1), min_size=3, max_size=3)
    last, steps = data.draw(step), data.draw(step)
    slots, tracks = [5, data.draw(st.sampled_from([-1, 2])), 0], [-1, 3, 4]
    expected = expected_states(states, snapshots, last, slots, tracks, steps)
    commit_snapshots(states, snapshots, *map(torch.tensor, (last, slots, tracks, steps)))
    for state, other in zip(states, expected, strict=True):
        assert torch.equal(state, other)


def test_no_slots_no_tracks_no_layers() -> None:
    states, snapshots = layers("apart", (2, 4)), layers("apart", (2, 3, 4))
    commit_snapshots(states, snapshots, torch.tensor([2, 0]), None, None, None)
    for state, snapshot in zip(states, snapshots, strict=True):
        assert torch.equal(state, torch.stack([snapshot[0, 2], snapshot[1, 0]]))
    commit_snapshots([], [], torch.tensor([2, 0]), None, None, None)


def test_one_snapshot_for_each_state() -> None:
    meta = torch.zeros(2, 3, device="meta")
    with pytest.raises(RuntimeError, match="one snapshot for each state"):
        commit_snapshots([meta], [], torch.zeros(2, device="meta").long(), None, None, None)


def test_opcheck_of_the_edges() -> None:
    states, snapshots = layers("shapes", (3, 4)), layers("shapes", (2, 3, 4))
    call = states, snapshots, torch.tensor([2, -1]), torch.tensor([-1, 2]).int(), None, None
    torch.library.opcheck(REGISTRY["commit_snapshots"].overload, call)
