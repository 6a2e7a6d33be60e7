"""What a batch has generated so far, as device tensors that every part of the step reads and writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

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
    stopped: bool [B], rows that the host wants no more of. report: int64 [B, 2 + D], what the last step did,
    see ``specc.runtime.reports``.
    """

    text: Tensor
    text_lens: Tensor
    prompt_lens: Tensor
    limits: Tensor
    done: Tensor
    eos: Tensor
    stopped: Tensor
    report: Tensor
    held_ids: Tensor
    held_until: Tensor

    @classmethod
    def start(
        cls,
        prompts: Tensor,
        prompt_lens: Tensor,
        *,
        live: int,
        max_new_tokens: int,
        eos: Tensor,
        held_ids: Tensor,
        held_until: Tensor,
        num_draft_tokens: int,
        capacity: int,
    ) -> DecodeState:
        """Rows that hold their prompts. prompts: int64 [B, q], right-padded; prompt_lens: int64 [B].

        All rows but the first ``live`` are done from the start.
        """
        rows = prompts.shape[0]
        text = prompts.new_zeros(rows, capacity)
        state = cls(
            text=text,
            text_lens=torch.empty_like(prompt_lens),
            prompt_lens=torch.empty_like(prompt_lens),
            limits=torch.empty_like(prompt_lens),
            done=torch.zeros(rows, dtype=torch.bool, device=text.device),
            eos=torch.empty_like(eos),
            stopped=torch.zeros(rows, dtype=torch.bool, device=text.device),
            report=text.new_zeros(rows, 2 + num_draft_tokens),
            held_ids=torch.empty_like(held_ids),
            held_until=torch.empty_like(held_until),
        )
        state.restart(
            prompts,
            prompt_lens,
            live=live,
            max_new_tokens=max_new_tokens,
            eos=eos,
            held_ids=held_ids,
            held_until=held_until,
        )
        return state

    def restart(
        self,
        prompts: Tensor,
        prompt_lens: Tensor,
        *,
        live: int,
        max_new_tokens: int,
        eos: Tensor,
        held_ids: Tensor,
        held_until: Tensor,
    ) -> None:
        """Hold other prompts, of as many rows. Every tensor stays where it is."""
        self.text[:, : prompts.shape[1]] = prompts
        self.done.copy_(torch.arange(len(self.done), device=self.done.device) >= live)
        # As if an idle row had its first token: its lengths then stand to each other as any row's do.
        self.text_lens.copy_(prompt_lens + self.done)
        self.prompt_lens.copy_(prompt_lens)
        self.limits.copy_(prompt_lens + max_new_tokens)
        self.stopped.fill_(False)
        self.eos.copy_(eos)
        self.held_ids.copy_(held_ids)
        self.held_until.copy_(held_until)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What a captured step reads and writes here, by name."""
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    def last_tokens(self, count: int) -> Tensor:
        """The last ``count`` tokens of each row, int64 [B, count]; rows must be that long."""
        back = torch.arange(count, 0, -1, device=self.text.device)
        return self.text.gather(1, self.text_lens[:, None] - back)
