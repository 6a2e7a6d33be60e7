"""The rows of a request, and rows beside them that only fill up a bucket.

Graphs are compiled and captured for a number of rows. Where that is worth keeping, a batch is rounded up
to a bucket, so that batches of other sizes need no graphs of their own. Idle rows hold two tokens and are
done from the start.
"""

from __future__ import annotations

import bisect
import dataclasses

import torch
from torch import Tensor

from specc.runtime.pages import Rows

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
BEYOND = 64
IDLE_TOKENS = 2


def bucket_of(rows: int) -> int:
    """The number of rows that a batch of ``rows`` is rounded up to."""
    if rows > BUCKETS[-1]:
        return -(-rows // BEYOND) * BEYOND
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)]


@dataclasses.dataclass(frozen=True)
class Batch:
    """N rows, of which the first ``live`` are the request's.

    prompts: int64 [N, P], left-padded; aligned: the same, right-padded; lens: int64 [N], their tokens.
    """

    live: int
    prompts: Tensor
    aligned: Tensor
    lens: Tensor

    @classmethod
    def of(cls, prompts: Tensor, attention_mask: Tensor | None, rows: int) -> Batch:
        """``rows`` rows, the first of which are ``prompts``, int64 [B, P] left-padded as the mask says."""
        live, width = prompts.shape
        if attention_mask is None:
            lens = torch.full((live,), width, dtype=torch.int64, device=prompts.device)
        else:
            lens = (attention_mask != 0).sum(dim=1)
        if rows > live:
            prompts, lens = _with_idle_rows(prompts, lens, rows - live)
        return cls(live, prompts, _right_padded(prompts, lens), lens)

    @property
    def width(self) -> int:
        """Tokens of the longest prompt, padding included."""
        return self.prompts.shape[1]

    def rows(self, beyond: int, idle_beyond: int) -> Rows:
        """What the rows need: the request's grow by up to ``beyond`` tokens, idle ones by ``idle_beyond``."""
        texts, lens = self.aligned.tolist(), self.lens.tolist()
        rows = Rows.of([text[:length] for text, length in zip(texts, lens, strict=True)], beyond)
        idle = [length + idle_beyond for length in lens[self.live :]]
        # An idle row shares nothing with the request's, which reach further, whatever they say.
        leaders = (*rows.leaders[: self.live], *range(self.live, len(lens)))
        return dataclasses.replace(rows, leaders=leaders, reach=(*rows.reach[: self.live], *idle))


def _with_idle_rows(prompts: Tensor, lens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    missing = max(0, IDLE_TOKENS - prompts.shape[1])
    prompts = torch.nn.functional.pad(prompts, (missing, 0))
    idle = prompts.new_zeros(count, prompts.shape[1])
    return torch.cat([prompts, idle]), torch.cat([lens, lens.new_full((count,), IDLE_TOKENS)])


def _right_padded(prompts: Tensor, lens: Tensor) -> Tensor:
    """Move each row's tokens to its front."""
    width = prompts.shape[1]
    source = torch.arange(width, device=prompts.device) + (width - lens)[:, None]
    return prompts.gather(1, source.clamp(max=width - 1))
