"""One speculative step, top to bottom."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from specc.lowerings import accept_greedy, greedy_select
from specc.options import Options
from specc.runtime.acceptance import commit, target_choice
from specc.runtime.drafters import Drafter
from specc.runtime.model import BoundModel
from specc.runtime.reports import write_report
from specc.runtime.state import DecodeState


@dataclasses.dataclass(frozen=True)
class StepOps:
    """The operators a step calls outside of compiled forwards, by the providers the options ask for."""

    select: Callable[..., Any]
    accept: Callable[..., Any]

    @classmethod
    def of(cls, options: Options) -> StepOps:
        forced = dict(options.providers)
        select, accept = (op.forced(forced.get(op.name)) for op in (greedy_select, accept_greedy))
        return cls(select, accept)


def speculative_step(state: DecodeState, target: BoundModel, drafter: Drafter, ops: StepOps) -> None:
    """Advance every row of ``state`` that is not done by 1 to D tokens.

    Device tensors of fixed shapes throughout, nothing is read back: the whole function can be captured
    as one graph and replayed. On entry and exit the pool holds all of a row's text but its last token,
    the bonus token of the step before, which is token 0 of the block.
    """
    drafts = drafter.propose(state)
    candidates = torch.cat([state.last_tokens(1), drafts], dim=1)
    logits = target(candidates)
    choice = target_choice(state, logits, ops.select)
    num_correct, _ = ops.accept(candidates, choice)
    committed = commit(state, choice, num_correct)
    write_report(state, choice, num_correct, committed)
    target.cache.rows.seq_lens.copy_(state.text_lens - 1)
    drafter.observe(state, committed)
