"""The host's side: committed tokens leave the device in the order plain decoding would make them.

Rows advance by their own accepted lengths, but streamers and stopping criteria know only batches whose
rows all have the same length. So tokens are handed over in lockstep: position by position, as soon as
every row that still runs has one. Criteria then see exactly the calls that ``GenerationMixin._sample``
would make, and a stop in the middle of an accepted block is found where it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from specc.runtime.device_graph import HostLink
from specc.runtime.reports import StepReport


class Drain:
    """Collects tokens on the host, evaluates criteria and feeds the streamer.

    prompts: int64 [B, P] as Hugging Face pads them. ``pad_token`` fills finished rows, if the criteria
    know an EOS; without one, rows keep their tokens until the whole batch stops, as in ``_sample``.
    Between steps the device may wait for this thread, whose caches have gone cold meanwhile: what is done
    for each step or token is plain Python on lists, which is several times as fast as operators of torch.
    """

    def __init__(
        self,
        prompts: Tensor,
        max_new_tokens: int,
        criteria: Any,
        pad_token: int | None,
        streamer: Any,
        link: HostLink,
    ) -> None:
        rows, self._prompt = prompts.shape
        self._fill = 0 if pad_token is None else pad_token
        self._limit = max_new_tokens
        room = torch.empty(rows, max_new_tokens, dtype=torch.int64, device="cpu")
        self._sequences = torch.cat([prompts.cpu(), room], dim=1)
        # Tokens handed over, position by position, that are not in the sequences yet.
        self._columns: list[list[int]] = []
        self._received: list[list[int]] = [[] for _ in range(rows)]
        self._stops = _Stops(criteria, prompts.device, link)
        self._streamer = streamer
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self._unfinished = set(range(rows))
        # Rows whose own tokens are handed over.
        self._kept = list(range(rows))
        self._stopped = (False,) * rows
        self.handed_over = self._count = 0

    def begin(self) -> None:
        """Put the prompts on the streamer: nothing can be refused any more."""
        if self._streamer is not None:
            self._streamer.put(self._sequences[:, : self._prompt])

    @property
    def sequences(self) -> Tensor:
        """Prompts and what has been handed over, int64 [B, P + new tokens], on the host."""
        end = self._prompt + self._count
        if self._columns:
            self._sequences[:, end - len(self._columns) : end] = torch.tensor(self._columns, device="cpu").T
            self._columns.clear()
        return self._sequences[:, :end]

    @property
    def lens(self) -> list[int]:
        """The new tokens received of each row."""
        return [len(row) for row in self._received]

    @property
    def finished(self) -> bool:
        return not self._unfinished

    @property
    def stopped_rows(self) -> tuple[bool, ...]:
        """Rows whose further tokens nobody will see; another tuple once there are more."""
        return self._stopped

    @property
    def most_steps_left(self) -> int:
        """Steps after which every row is at its limit, however few drafts are right."""
        left = (self._limit - len(self._received[row]) for row in self._kept)
        return max(left, default=0)

    def take(self, report: StepReport) -> None:
        """Receive what a step committed, and hand over what is complete."""
        for row, (committed, tokens) in enumerate(zip(report.committed, report.tokens, strict=True)):
            self._received[row] += tokens[:committed]
        kept, ready = self._kept, self._ready()
        while self._unfinished and self._count < ready:
            self._hand_over()
            if self._kept is not kept:
                kept, ready = self._kept, self._ready()

    def _ready(self) -> int:
        """The length that all rows have whose tokens are still wanted."""
        return min((len(self._received[row]) for row in self._kept), default=0)

    def _hand_over(self) -> None:
        """The next token of each row."""
        tokens = [self._received[row][self._count] for row in self._kept]
        column = [self._fill] * len(self._received)
        for row, token in zip(self._kept, tokens, strict=True):
            column[row] = token
        self._columns.append(column)
        self._count += 1
        self.handed_over += len(tokens)
        if self._streamer is not None:
            self._streamer.put(torch.tensor(column, device="cpu"))
        if self._stops.may_stop(tokens, self._prompt + self._count):
            self._stop(self._stops(self.sequences).tolist())

    def _stop(self, stops: list[bool]) -> None:
        stopping = [row for row in self._unfinished if stops[row]]
        if not stopping:
            return
        self._unfinished.difference_update(stopping)
        if self._pads:
            self._kept = sorted(self._unfinished)
            self._stopped = tuple(row not in self._unfinished for row in range(len(self._received)))

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


class _Stops:
    """Stopping criteria as Hugging Face calls them, without waiting for steps that are queued.

    Criteria nobody knows get their ids where the model is, as they do from ``generate``.
    """

    def __init__(self, criteria: Any, device: torch.device, link: HostLink) -> None:
        self._device = device
        self._link = link
        known = [each for each in criteria if type(each) in _STOPS_NEVER_BEFORE]
        self._there = [each for each in criteria if type(each) not in _STOPS_NEVER_BEFORE]
        self._here = [_on_the_host(each) for each in known]
        self._eos = {token for each in self._here for token in _eos_ids(each)}
        lengths = [_STOPS_NEVER_BEFORE[type(each)](each) for each in known]
        # What nobody knows may stop at any token.
        self._from = 0 if self._there else min(lengths, default=math.inf)

    def may_stop(self, tokens: list[int], length: int) -> bool:
        """Whether any criterion might stop a row. tokens: the rows' last; length: of the texts, with them."""
        return length >= self._from or not self._eos.isdisjoint(tokens)

    def __call__(self, sequences: Tensor) -> Tensor:
        """Which rows stop, bool [B], on the host. sequences: int64 [B, tokens so far], on the host."""
        stops = torch.zeros_like(sequences[:, 0], dtype=torch.bool)
        for each in self._here:
            stops |= each(sequences, None)
        if self._there:
            with self._link.aside():
                moved = sequences.to(self._device)
                for each in self._there:
                    stops |= torch.as_tensor(each(moved, None)).cpu().bool()
        return stops


def _length_limit(criterion: Any) -> float:
    # From there on it warns.
    warns_at = criterion.max_position_embeddings
    return min(criterion.max_length, math.inf if warns_at is None else warns_at + 1)


# Criteria that look at lengths, ids and the clock only, which are asked on the host: the shortest text that
# each can have something to say on, but for one that ends in an EOS id.
_STOPS_NEVER_BEFORE: dict[type, Callable[[Any], float]] = {
    MaxLengthCriteria: _length_limit,
    MaxTimeCriteria: lambda criterion: 0,
    EosTokenCriteria: lambda criterion: math.inf,
}


def _eos_ids(criterion: Any) -> list[int]:
    return criterion.eos_token_id.reshape(-1).tolist() if isinstance(criterion, EosTokenCriteria) else []


def _on_the_host(criterion: Any) -> Any:
    moved = copy.copy(criterion)
    if isinstance(moved, EosTokenCriteria):
        moved.eos_token_id = moved.eos_token_id.cpu()
    return moved
