"""Prompt lookup: draft what followed the last occurrence of the text's last few tokens.

Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding). Here it runs on
the device, for all rows at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specc.runtime.pages import Rows
from specc.runtime.state import DecodeState

MAX_NGRAM = 3


class NGramDrafter:
    """Looks for the longest suffix of up to ``max_ngram`` tokens; the latest occurrence wins."""

    def __init__(self, num_drafts: int, max_ngram: int = MAX_NGRAM) -> None:
        self._num_drafts = num_drafts
        self._max_ngram = max_ngram

    def fits(self, rows: Rows) -> bool:
        return True

    def seat(self, rows: Rows, last_position: int) -> None:
        """Nothing is kept."""

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def serving(self) -> object:
        return lookup

    def prefill(self, prompts: Tensor, prompt_lens: Tensor) -> None:
        """The text is all there is to know."""

    def warm_up_prefill(self) -> float:
        return 0.0

    def warm_up(self) -> float:
        return 0.0

    def propose(self, state: DecodeState) -> Tensor:
        return lookup(state.text, state.text_lens, self._num_drafts, self._max_ngram)

    def observe(self, state: DecodeState, committed: Tensor) -> None:
        """The committed tokens are in the text already."""


def lookup(text: Tensor, text_lens: Tensor, num_drafts: int, max_ngram: int) -> Tensor:
    """Continuations of the best earlier match. text: int64 [B, T]; text_lens: int64 [B], >= 1.

    Returns int64 [B, num_drafts]. Where a continuation reaches the end of the text it starts over
    behind the match, which continues a text that repeats itself. A row without a match repeats its
    last token: a draft costs nothing to be wrong.
    """
    width = text.shape[1]
    at = torch.arange(width, device=text.device)
    last = text_lens[:, None] - 1
    matched = torch.zeros_like(text)
    alive = at < last
    for back in range(max_ngram):
        wanted = text.gather(1, (last - back).clamp(min=0))
        alive = alive & (text.roll(back, dims=1) == wanted) & (at >= back) & (last >= back)
        matched = matched + alive
    found = torch.where(matched > 0, matched * width + at, -1)
    score, best = found.max(dim=1, keepdim=True)
    start = torch.where(score >= 0, best, last - 1)
    period = last - start
    ahead = torch.arange(num_drafts, device=text.device)
    return text.gather(1, start + 1 + ahead % period)
