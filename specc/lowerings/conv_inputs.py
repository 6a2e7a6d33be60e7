"""``specc::conv_inputs``: a block behind the inputs before it, which a ring keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.causal_conv1d import channels_contiguous, sample_inputs
from specc.lowerings.checkpoints import FLOATS, live_rows, put_block
from specc.lowerings.framework import Provider, Reason, define_op


def reference(x: Tensor, ring: Tensor, seq_lens: Tensor, slots: Tensor | None, width: int) -> Tensor:
    """[B, C, width - 1 + T]: the inputs at positions ``seq_lens - width + 1 ...`` from the ring, then x.

    x: [B, C, T] at positions ``seq_lens ...``; ring: [S, R, C]; seq_lens: int64 [B]; slots: int [B] or None
    for 0, 1, 2, ... x is written to the ring, of longer blocks its last R tokens. Negative positions are
    padding: they give 0 and are not written, so that ``seq_lens`` may start below 0. Rows of negative slots
    give 0 and touch nothing. The result's channels are contiguous.
    """
    slot, live = live_rows(slots, torch.ones_like(seq_lens, dtype=torch.bool), ring.shape[0])
    tokens, history = x.shape[2], width - 1
    position = seq_lens[:, None] + torch.arange(-history, tokens, device=x.device)
    before = ring[slot[:, None], position[:, :history] % ring.shape[1]]
    block = x.transpose(1, 2)
    inputs = torch.cat([before.to(x.dtype), block], 1)
    inputs = torch.where((live[:, None] & (position >= 0))[..., None], inputs, 0)
    put_block(ring, slot, live, seq_lens, block)
    return inputs.transpose(1, 2)


# Tokens of a program: the past of the first one's tokens may not be another's.
MAX_WIDTH = 8


def unheld_ring(x: Tensor, ring: Tensor, seq_lens: Tensor, slots: Tensor | None, width: int) -> Reason:
    """Why the Triton kernels cannot serve such a block and ring, or None."""
    if x.dtype not in FLOATS or ring.dtype not in FLOATS:
        return f"has no kernel for x of {x.dtype} and a ring of {ring.dtype}"
    if width > MAX_WIDTH:
        return f"serves filters up to {MAX_WIDTH} wide, got {width}"
    return triton_kernels.not_integers(torch.int64, seq_lens=seq_lens) or triton_kernels.not_integers(
        *triton_kernels.INDICES, slots=slots
    )


def _triton_supports(x: Tensor, ring: Tensor, seq_lens: Tensor, slots: Tensor | None, width: int) -> Reason:
    return triton_kernels.unfit(x, ring, seq_lens, slots) or unheld_ring(x, ring, seq_lens, slots, width)


def _triton(*args: Any) -> Tensor:
    from specc.lowerings.triton_kernels import causal_conv1d

    with torch.cuda.device_of(args[0]):
        return causal_conv1d.inputs(*args)


def _fake(x: Tensor, ring: Tensor, seq_lens: Tensor, slots: Tensor | None, width: int) -> Tensor:
    return channels_contiguous(x, width - 1 + x.shape[2])


def sample_ring(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """ring, seq_lens and slots for the block of ``sample_inputs``."""
    ring = torch.randn(3, 12, 8, device=device, dtype=sample_inputs(device)[0].dtype)
    return ring, torch.tensor([9, 1], device=device), torch.tensor([2, 0], device=device)


def _sample(device: str) -> tuple[object, ...]:
    return sample_inputs(device)[0], *sample_ring(device), 4


conv_inputs = define_op(
    "conv_inputs",
    "(Tensor x, Tensor(a!) ring, Tensor seq_lens, Tensor? slots, int width) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
