"""What a step tells the host: for each row, how many drafts were right and which tokens it committed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from specc.runtime.state import DecodeState


def write_report(state: DecodeState, choice: Tensor, num_correct: Tensor, committed: Tensor) -> None:
    """Leave a step's outcome in ``state.report``. choice: int64 [B, up to D]; the others int64 [B]."""
    width = 2 + choice.shape[1]
    torch.cat([num_correct[:, None], committed[:, None], choice], dim=1, out=state.report[:, :width])


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A report on the host. num_correct, committed: one of each row; tokens: D of each row.

    Of ``tokens`` the first ``committed`` count. A row that was done before the step commits none.
    """

    num_correct: list[int]
    committed: list[int]
    tokens: list[list[int]]

    @classmethod
    def of(cls, rows: list[list[int]]) -> StepReport:
        """rows: what ``write_report`` left, as lists."""
        return cls([row[0] for row in rows], [row[1] for row in rows], [row[2:] for row in rows])

    def without(self, rows: Sequence[bool]) -> StepReport:
        """As if these rows had been done before."""
        if not any(rows):
            return self
        left = [0 if out else count for count, out in zip(self.committed, rows, strict=True)]
        return dataclasses.replace(self, committed=left)


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
        for num_correct, committed in zip(report.num_correct, report.committed, strict=True):
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
