"""What a batch has generated so far, as device tensors that every part of the step reads and writes."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass
class DecodeState:
    """B rows of text and their limits. Lengths count prompt and committed tokens, the bonus included.

    text: int64 [B, T], each row from its first prompt token on, without padding. What lies behind a
    row's length is scratch. text_lens, prompt_lens, limits: int64 [B]; a row is done at ``limits``
    tokens. done: bool [B]; a done row's text no longer changes. eos: int64 [number of EOS ids].
    held_ids, held_until: int64 [n]; a row may not choose ``held_ids[i]`` before it has
    ``held_until[i]`` new tokens. Ids outside the vocabulary stand for nothing.
    steps: int64 [], steps taken by rows that were not done; accepted: int64 [D - 1], in how many of
    these draft j of the block was accepted.
    """

    text: Tensor
    text_lens: Tensor
    prompt_lens: Tensor
    limits: Tensor
    done: Tensor
    eos: Tensor
    steps: Tensor
    accepted: Tensor
    held_ids: Tensor
    held_until: Tensor

    @classmethod
    def start(
        cls,
        prompts: Tensor,
        prompt_lens: Tensor,
        *,
        max_new_tokens: int,
        eos: Tensor,
        held_ids: Tensor,
        held_until: Tensor,
        num_draft_tokens: int,
        capacity: int,
    ) -> DecodeState:
        """Rows that hold their prompts. prompts: int64 [B, q], right-padded; prompt_lens: int64 [B]."""
        rows = prompts.shape[0]
        text = prompts.new_zeros(rows, capacity)
        text[:, : prompts.shape[1]] = prompts
        return cls(
            text=text,
            text_lens=prompt_lens.clone(),
            prompt_lens=prompt_lens,
            limits=prompt_lens + max_new_tokens,
            done=torch.zeros(rows, dtype=torch.bool, device=text.device),
            eos=eos,
            steps=text.new_zeros(()),
            accepted=text.new_zeros(num_draft_tokens - 1),
            held_ids=held_ids,
            held_until=held_until,
        )

    def last_tokens(self, count: int) -> Tensor:
        """The last ``count`` tokens of each row, int64 [B, count]; rows must be that long."""
        back = torch.arange(count, 0, -1, device=self.text.device)
        return self.text.gather(1, self.text_lens[:, None] - back)
