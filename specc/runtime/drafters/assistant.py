"""A smaller causal LM of the same vocabulary drafts token by token (Leviathan et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specc.runtime.model import BoundModel
from specc.runtime.pages import Rows
from specc.runtime.state import DecodeState

FED = 2


class AssistantDrafter:
    """The assistant keeps its own pool. Every forward feeds the last two tokens of the text so far.

    Feeding two makes the catch-up part of the first draft: after a block that was accepted whole, the
    assistant has not seen the last draft yet; otherwise that slot is written again with what it held.
    """

    def __init__(self, assistant: BoundModel, num_drafts: int) -> None:
        self._assistant = assistant
        self._num_drafts = num_drafts

    def fits(self, rows: Rows) -> bool:
        return self._assistant.fits(rows)

    def seat(self, rows: Rows, last_position: int) -> None:
        self._assistant.seat(rows, last_position)

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        return self._assistant.buffers()

    def serving(self) -> object:
        return self._assistant.serving()

    def prefill(self, prompts: Tensor, prompt_lens: Tensor) -> None:
        # Without the last token, which the first draft feeds: a recurrent state cannot forget it again.
        self._assistant.prefill(prompts[:, :-1], prompt_lens - 1)

    def warm_up_prefill(self) -> float:
        return self._assistant.warm_up_prefill()

    def warm_up(self) -> float:
        return self._assistant.warm_up()

    def propose(self, state: DecodeState) -> Tensor:
        cache = self._assistant.cache
        seq_lens = cache.rows.seq_lens
        seq_lens.copy_(state.text_lens - FED)
        cache.recurrent.final_lens.copy_(seq_lens)
        fed = state.last_tokens(FED)
        drafts = [fed[:, :0]]
        for _ in range(self._num_drafts):
            draft = self._assistant(fed)[:, None]
            drafts.append(draft)
            # A fresh tensor: a view's strides would be other strides than the first block's.
            fed = torch.cat([fed[:, 1:], draft], dim=1)
            seq_lens += 1
        return torch.cat(drafts, dim=1)

    def observe(self, state: DecodeState, committed: Tensor) -> None:
        """The next proposal reads the text; keys of rejected drafts are written over."""
