"""Drafters: what guesses the next tokens. Everything they do in a step is device tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from specc.runtime.pages import Rows
from specc.runtime.state import DecodeState


class Drafter(Protocol):
    """``prefill`` once per batch; ``propose`` and ``observe`` once per step, both capturable.

    A drafter may serve one batch after another: ``seat`` comes before each but the first.
    """

    def fits(self, rows: Rows) -> bool:
        """Whether as many rows as these find room in what the drafter keeps."""

    def seat(self, rows: Rows, last_position: int) -> None:
        """Begin anew with these rows. Every tensor that ``propose`` reads stays where it is."""

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What ``propose`` and ``observe`` read and write of the drafter's own, by name."""

    def serving(self) -> object:
        """What identifies the code that ``propose`` would run now; None for none."""

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
