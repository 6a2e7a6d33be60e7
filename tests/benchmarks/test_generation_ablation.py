"""Forwards as graphs of their own, which a rehearsal on a CPU runs eagerly."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.generation_ablation import _Forward


def test_a_replay_leaves_earlier_results_alone() -> None:
    """A graph writes to the same place each time, and a step keeps the drafts of several replays."""
    place = torch.zeros(1)

    def forward(tokens: Tensor) -> Tensor:
        return place.copy_(tokens)

    replayed = _Forward(torch.zeros(1), forward)
    first, second = (replayed(torch.tensor([value])) for value in (1.0, 2.0))
    assert (first.item(), second.item()) == (1.0, 2.0)
