"""``specc::accept_greedy``: how much of each drafted block the target agrees with."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.lowerings.framework import define_op


def reference(candidates: Tensor, target_choice: Tensor) -> tuple[Tensor, Tensor]:
    """Accept the longest prefix of drafts that equals the target's own choices.

    candidates: int64 [B, D], column 0 the bonus token of the step before, then D-1 drafts.
    target_choice: int64 [B, D], the target's choice after each candidate.
    Returns num_correct int64 [B] in 0..D-1 (drafts only, bonus excluded) and the next bonus token
    int64 [B], the target's choice after the last correct draft (Leviathan et al. 2023,
    arXiv 2211.17192, at temperature 0).
    """
    match = candidates[:, 1:] == target_choice[:, :-1]
    num_correct = match.long().cumprod(dim=1).sum(dim=1)
    next_token = target_choice.gather(1, num_correct[:, None]).squeeze(1)
    return num_correct, next_token


def _fake(candidates: Tensor, target_choice: Tensor) -> tuple[Tensor, Tensor]:
    torch._check(
        candidates.shape == target_choice.shape,
        lambda: "accept_greedy: candidates and target_choice must both be [B, D]",
    )
    rows = candidates.shape[0]
    return candidates.new_empty(rows), candidates.new_empty(rows)


def _sample(device: str) -> tuple[Tensor, ...]:
    candidates, choice = torch.randint(0, 3, (2, 4, 5), device=device)
    return candidates, choice


accept_greedy = define_op(
    "accept_greedy",
    "(Tensor candidates, Tensor target_choice) -> (Tensor, Tensor)",
    reference,
    _fake,
    _sample,
)
