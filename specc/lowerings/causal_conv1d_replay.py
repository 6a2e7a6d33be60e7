"""``specc::causal_conv1d_replay``: a block's short convolution behind the inputs that a ring keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import triton_kernels
from specc.lowerings.causal_conv1d import ACTIVATIONS, channels_contiguous, convolve, sample_inputs
from specc.lowerings.conv_inputs import reference as conv_inputs
from specc.lowerings.conv_inputs import sample_ring, unheld_ring
from specc.lowerings.framework import Provider, Reason, define_op


def reference(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_lens: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """``specc::causal_conv1d`` over what ``specc::conv_inputs`` returns, which see. T is any.

    Returns [B, C, T] in x's dtype, channels contiguous; 0 for rows of negative slots, and at negative
    positions, where a bias would else have a recurrence take padding for tokens.
    """
    inputs = conv_inputs(x, ring, seq_lens, slots, weight.shape[1])
    y = convolve(inputs.transpose(1, 2), weight, bias, activation, x.shape[2])
    live = seq_lens[:, None] + torch.arange(x.shape[2], device=x.device) >= 0
    if slots is not None:
        live = live & (slots >= 0)[:, None]
    return torch.where(live[:, None], y, 0)


def _triton_supports(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_lens: Tensor,
    slots: Tensor | None,
) -> Reason:
    unfit = triton_kernels.unfit(x, ring, weight, bias, seq_lens, slots)
    return unfit or unheld_ring(x, ring, seq_lens, slots, weight.shape[1])


def _triton(*args: Any) -> Tensor:
    from specc.lowerings.triton_kernels import causal_conv1d

    with torch.cuda.device_of(args[0]):
        return causal_conv1d.replay(*args)


def _fake(
    x: Tensor,
    ring: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    seq_lens: Tensor,
    slots: Tensor | None,
) -> Tensor:
    torch._check(
        activation in ACTIVATIONS, lambda: f"causal_conv1d_replay: no activation is called {activation}"
    )
    return channels_contiguous(x, x.shape[2])


def _sample(device: str) -> tuple[object, ...]:
    x, weight, bias = sample_inputs(device)
    ring, seq_lens, slots = sample_ring(device)
    return x, ring, weight, bias, "silu", seq_lens, slots


causal_conv1d_replay = define_op(
    "causal_conv1d_replay",
    "(Tensor x, Tensor(a!) ring, Tensor weight, Tensor? bias, str? activation, Tensor seq_lens, "
    "Tensor? slots) -> Tensor",
    reference,
    _fake,
    _sample,
    (Provider("triton", _triton, _triton_supports, priority=10),),
)
