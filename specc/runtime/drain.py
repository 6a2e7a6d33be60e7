"""The host's side: committed tokens leave the device in the order plain decoding would make them.

Rows advance by their own accepted lengths, but streamers and stopping criteria know only batches whose
rows all have the same length. So tokens are handed over in lockstep: position by position, as soon as
every row that still runs has one. Criteria then see exactly the calls that ``GenerationMixin._sample``
would make, and a stop in the middle of an accepted block is found where it is.
"""

from __future__ import annotations

import copy
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
    lens: int64 [B], the new tokens received of each row.
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
        fill = 0 if pad_token is None else pad_token
        room = torch.full((rows, max_new_tokens), fill, dtype=torch.int64)
        self._sequences = torch.cat([prompts.cpu(), room], dim=1)
        self._received = torch.zeros(rows, max_new_tokens, dtype=torch.int64)
        self.lens = torch.zeros(rows, dtype=torch.int64)
        self._count = 0
        self.handed_over = 0
        self._stops = _Stops(criteria, prompts.device, link)
        self._streamer = streamer
        self._pads = any(hasattr(each, "eos_token_id") for each in criteria)
        # Between steps the device may wait for this thread: what seldom changes is not computed again.
        self._unfinished = torch.ones(rows, dtype=torch.bool)
        self._running = rows
        self._stopped = torch.zeros(rows, dtype=torch.bool)

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
        return self._running == 0

    @property
    def stopped_rows(self) -> Tensor:
        """Rows, bool [B], whose further tokens nobody will see; another tensor once there are more."""
        return self._stopped

    @property
    def most_steps_left(self) -> int:
        """Steps after which every row is at its limit, however few drafts are right."""
        left = self._received.shape[1] - self.lens
        return int(left.masked_fill(self._stopped, 0).max())

    def take(self, report: StepReport) -> None:
        """Receive what a step committed, and hand over what is complete."""
        at = torch.arange(report.tokens.shape[1])
        row, column = (at < report.committed[:, None]).nonzero(as_tuple=True)
        self._received[row, self.lens[row] + column] = report.tokens[row, column]
        self.lens += report.committed
        running, ready = self._running, self._ready()
        while self._running and self._count < ready:
            self._hand_over(self._received[:, self._count])
            if self._running != running:
                running, ready = self._running, self._ready()

    def _hand_over(self, token: Tensor) -> None:
        column = self._prompt + self._count
        if self._pads and self._running < len(token):
            token = torch.where(self._unfinished, token, self._sequences[:, column])
        self._sequences[:, column] = token
        self._count += 1
        self.handed_over += self._running if self._pads else len(token)
        if self._streamer is not None:
            # Of its own: a streamer may keep it.
            self._streamer.put(token.clone())
        stops = self._stops(self.sequences) & self._unfinished
        if bool(stops.any()):
            self._stop(stops)

    def _stop(self, rows: Tensor) -> None:
        self._unfinished &= ~rows
        self._running = int(self._unfinished.sum())
        if self._pads:
            self._stopped = ~self._unfinished

    def _ready(self) -> int:
        """The length that all rows have whose tokens are still wanted; none where nobody wants any."""
        if not self._running:
            return 0
        return int((self.lens[self._unfinished] if self._pads else self.lens).min())

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


# Criteria that look at lengths, ids and the clock only: they are asked on the host.
_ON_THE_HOST = (MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria)


class _Stops:
    """Stopping criteria as Hugging Face calls them, without waiting for steps that are queued.

    Criteria nobody knows get their ids where the model is, as they do from ``generate``.
    """

    def __init__(self, criteria: Any, device: torch.device, link: HostLink) -> None:
        self._device = device
        self._link = link
        self._here: list[Callable[[Tensor, Any], Tensor]] = []
        self._there: list[Callable[[Tensor, Any], Tensor]] = []
        for each in criteria:
            known = type(each) in _ON_THE_HOST
            (self._here if known else self._there).append(_on_the_host(each) if known else each)

    def __call__(self, sequences: Tensor) -> Tensor:
        """Which rows stop, bool [B], on the host. sequences: int64 [B, tokens so far], on the host."""
        stops = torch.zeros(sequences.shape[0], dtype=torch.bool)
        for each in self._here:
            stops |= each(sequences, None)
        if self._there:
            with self._link.aside():
                moved = sequences.to(self._device)
                for each in self._there:
                    stops |= torch.as_tensor(each(moved, None)).cpu()
        return stops


def _on_the_host(criterion: Any) -> Any:
    moved = copy.copy(criterion)
    if isinstance(moved, EosTokenCriteria):
        moved.eos_token_id = moved.eos_token_id.cpu()
    return moved
