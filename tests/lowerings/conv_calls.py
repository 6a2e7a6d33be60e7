"""Texts and rings for the short convolutions on any device, and what float64 makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specc.lowerings import causal_conv1d_replay


def channels_last(batch: int, channels: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random [B, C, T] as a projection leaves it: channels contiguous."""
    return torch.randn(batch, tokens, channels).to(dtype).transpose(1, 2)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """The convolution of whole texts [B, C, n] in float64, zeros before them."""
    taps = weight.double()[:, None]
    padded = torch.nn.functional.pad(x.double(), (weight.shape[1] - 1, 0))
    bias = None if bias is None else bias.double()
    y = torch.nn.functional.conv1d(padded, taps, bias, groups=x.shape[1])
    return y if activation is None else torch.nn.functional.silu(y)


def past(text: Tensor, position: Sequence[int], tokens: int) -> Tensor:
    """Columns of ``text`` [B, C, n] at ``position[row] ...``, zeros before a text."""
    padded = torch.nn.functional.pad(text, (1000, 0))
    rows = [row[:, 1000 + at : 1000 + at + tokens] for row, at in zip(padded, position, strict=True)]
    return torch.stack(rows)


class Ring:
    """A ring of NaN [S, R, C] and its cursors, driven as a runtime drives them."""

    def __init__(
        self,
        text: Tensor,
        starts: Sequence[int],
        slots: Sequence[int],
        ring_size: int,
        run: Callable[..., Any] = causal_conv1d_replay,
    ) -> None:
        self.text, self.run = text, run
        self.ring = text.new_full((max(slots) + 2, ring_size, text.shape[1]), torch.nan)
        self.seq = torch.tensor(starts, device=text.device)
        self.slots = torch.tensor(slots, device=text.device)

    def feed(self, tokens: int, good: Sequence[int], *filter: Any) -> Tensor:
        """One block for each row, ``good[row]`` of its tokens right; ``filter``: weight, bias, activation."""
        block = past(self.text, self.seq.tolist(), tokens).transpose(1, 2).contiguous()
        for row, count in enumerate(good):
            block[row, count:] = torch.randn(tokens - count, block.shape[2]).to(block)
            # What is left of a text is padding, whatever it holds.
            block[row, : max(0, -int(self.seq[row]))] = torch.nan
        y = self.run(block.transpose(1, 2), self.ring, *filter, self.seq.clone(), self.slots)
        self.seq += torch.tensor(good, device=self.seq.device)
        return y
