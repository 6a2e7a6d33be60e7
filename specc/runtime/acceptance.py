"""From the target's logits to committed tokens, without leaving the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specc.runtime.state import DecodeState

Select = Callable[[Tensor], Tensor]


def target_choice(state: DecodeState, logits: Tensor, select: Select) -> Tensor:
    """What the target would say after each token of the block. logits: [B, D, V]; int64 [B, D]."""
    if state.held_ids.numel():
        logits = _without_held_back(state, logits)
    return select(logits)


def _without_held_back(state: DecodeState, logits: Tensor) -> Tensor:
    """Tokens that a row may not choose yet get -inf."""
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    held = torch.where(vocabulary[:, None] == state.held_ids, state.held_until, 0).amax(dim=1)
    block = torch.arange(logits.shape[1], device=logits.device)
    new_tokens = (state.text_lens - state.prompt_lens)[:, None] + block
    return logits.masked_fill(new_tokens[:, :, None] < held, -torch.inf)


def commit(state: DecodeState, choice: Tensor, num_correct: Tensor) -> Tensor:
    """Append each row's accepted run to its text; return how many tokens that was, int64 [B].

    choice: int64 [B, D], the target's choice after each candidate; num_correct: int64 [B].
    The run is choice[0 .. num_correct], cut after its first EOS and at the row's limit. Rows that are
    done append nothing. The whole block is stored: what lies behind the new length is scratch.
    """
    length = choice.shape[1]
    block = torch.arange(length, device=choice.device)
    # Not torch.isin, which looks for many ids by a way that stops the device.
    is_eos = (choice[:, :, None] == state.eos).any(dim=2)
    until_eos = torch.where(is_eos, block, length).amin(dim=1) + 1
    run = torch.minimum(num_correct + 1, until_eos)
    run = torch.minimum(run, state.limits - state.text_lens)
    run = torch.where(state.done, 0, run)

    # A done row's block lands behind its end, where nothing is read any more.
    state.text.scatter_(1, state.text_lens[:, None] + block, choice)
    state.text_lens += run
    state.done |= (run == until_eos) | (state.text_lens >= state.limits)
    return run
