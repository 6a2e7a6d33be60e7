"""Drafters: what guesses the next tokens. Everything they do in a step is device tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from specc.runtime.state import DecodeState


class Drafter(Protocol):
    """``prefill`` once per batch; ``propose`` and ``observe`` once per step, both capturable."""

    def prefill(self, prompts: Tensor, prompt_lens: Tensor) -> None:
        """Read the prompts, int64 [B, q] left-padded, of lengths prompt_lens int64 [B]."""

    def warm_up_prefill(self) -> float:
        """Compile what ``prefill`` runs; seconds it took. Called before it."""

    def warm_up(self) -> float:
        """Compile what ``propose`` runs; seconds it took. Must not change what ``propose`` returns."""

    def propose(self, state: DecodeState) -> Tensor:
        """Drafts for the tokens after each row's text, int64 [B, D - 1]."""

    def observe(self, state: DecodeState, committed: Tensor) -> None:
        """Called after the commit; ``committed`` int64 [B] is how many tokens each row gained."""
