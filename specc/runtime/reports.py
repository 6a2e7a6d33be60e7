"""What a step tells the host: for each row, how many drafts were right and which tokens it committed."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specc.runtime.state import DecodeState


def write_report(state: DecodeState, choice: Tensor, num_correct: Tensor, committed: Tensor) -> None:
    """Leave a step's outcome in ``state.report``. choice: int64 [B, up to D]; the others int64 [B]."""
    width = 2 + choice.shape[1]
    torch.cat([num_correct[:, None], committed[:, None], choice], dim=1, out=state.report[:, :width])


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A report on the host. num_correct, committed: int64 [B]; tokens: int64 [B, D].

    Of ``tokens`` the first ``committed`` count. A row that was done before the step commits none.
    """

    num_correct: Tensor
    committed: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, report: Tensor) -> StepReport:
        return cls(report[:, 0], report[:, 1], report[:, 2:])

    def without(self, rows: Tensor) -> StepReport:
        """As if these rows, bool [B], had been done before."""
        if not bool(rows.any()):
            return self
        return dataclasses.replace(self, committed=self.committed.masked_fill(rows, 0))


class Tally:
    """Adds up reports. ``steps``: one for each row that committed something; ``batch_steps``: of all rows."""

    def __init__(self, num_draft_tokens: int) -> None:
        self.steps = 0
        self.batch_steps = 0
        self.committed = 0
        # By how many of its drafts were right.
        self._steps_with = [0] * num_draft_tokens

    def count(self, report: StepReport) -> None:
        before = self.steps
        for num_correct, committed in zip(
            report.num_correct.tolist(), report.committed.tolist(), strict=True
        ):
            if committed:
                self.steps += 1
                self.committed += committed
                self._steps_with[num_correct] += 1
        self.batch_steps += self.steps > before

    @property
    def mean_accepted_length(self) -> float:
        return self.committed / max(self.steps, 1)

    @property
    def acceptance(self) -> list[float]:
        right = range(1, len(self._steps_with))
        return [sum(self._steps_with[count:]) / max(self.steps, 1) for count in right]
