"""The host's side: committed tokens leave the device in the order plain decoding would make them.

Rows advance by their own accepted lengths, but streamers and stopping criteria know only batches whose
rows all have the same length. So tokens are handed over in lockstep: position by position, as soon as
every row that still runs has one. Criteria then see exactly the calls that ``GenerationMixin._sample``
would make, and a stop in the middle of an accepted block is found where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Drain:
    """Collects tokens on the host, evaluates criteria and feeds the streamer.

    prompts: int64 [B, P] as Hugging Face pads them. ``pad_token`` fills finished rows, if the criteria
    know an EOS; without one, rows keep their tokens until the whole batch stops, as in ``_sample``.
    """

    def __init__(
        self,
        prompts: Tensor,
        max_new_tokens: int,
        criteria: Any,
        pad_token: int | None,
        streamer: Any,
    ) -> None:
        rows, self._prompt = prompts.shape
        fill = 0 if pad_token is None else pad_token
        room = torch.full((rows, max_new_tokens), fill, dtype=torch.int64)
        self._sequences = torch.cat([prompts.cpu(), room], dim=1)
        self._count = 0
        self.handed_over = 0
        self._criteria = criteria
        self._device = prompts.device
        self._streamer = streamer
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self.unfinished = torch.ones(rows, dtype=torch.bool)

    def begin(self) -> None:
        """Put the prompts on the streamer: nothing can be refused any more."""
        if self._streamer is not None:
            self._streamer.put(self._sequences[:, : self._prompt])

    @property
    def sequences(self) -> Tensor:
        """Prompts and what has been handed over, int64 [B, P + new tokens], on the host."""
        return self._sequences[:, : self._prompt + self._count]

    @property
    def finished(self) -> bool:
        return not bool(self.unfinished.any())

    @property
    def stopped_rows(self) -> Tensor:
        """Rows, bool [B], whose further tokens nobody will see."""
        return ~self.unfinished if self._pads else torch.zeros_like(self.unfinished)

    def take(self, tokens: Tensor, counts: Tensor) -> None:
        """Hand over what is complete. tokens: int64 [B, n], everything generated so far, or more;
        counts: int64 [B], how many of them are committed. Both on the host."""
        while not self.finished and self._count < self._ready(counts):
            column = self._prompt + self._count
            token = tokens[:, self._count]
            if self._pads:
                token = torch.where(self.unfinished, token, self._sequences[:, column])
            self._sequences[:, column] = token
            self._count += 1
            self.handed_over += int(self.unfinished.sum()) if self._pads else token.numel()
            if self._streamer is not None:
                self._streamer.put(token)
            self.unfinished &= ~self._criteria(self.sequences.to(self._device), None).cpu()

    def _ready(self, counts: Tensor) -> int:
        needed = counts[self.unfinished] if self._pads else counts
        return int(needed.min())

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
