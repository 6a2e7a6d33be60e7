"""``specc::causal_conv1d``: the short convolutions of recurrent layers, over the inputs before a block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from specc.lowerings.devices import usual_dtype
from specc.lowerings.framework import define_op

# What may follow the convolution, by the names that models use.
ACTIVATIONS = (None, "silu", "swish")


def reference(
    x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """Each channel's own filter over its last W inputs, then the bias and ``activation``.

    x: [B, C, T]; window: [B, C, Wc], the inputs before x, of which the last W - 1 count; weight: [C, W];
    bias: [C] or None; activation: "silu", "swish" (the same) or None. Returns [B, C, T] in x's dtype,
    channels contiguous. Computed in float32.
    """
    tokens, width = x.shape[2], weight.shape[1]
    before = window[..., window.shape[2] - (width - 1) :].to(x.dtype)
    inputs = torch.cat([before.transpose(1, 2), x.transpose(1, 2)], 1)
    return convolve(inputs, weight, bias, activation, tokens)


def convolve(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, tokens: int
) -> Tensor:
    """[B, C, T] of ``inputs`` [B, W - 1 + T, C]."""
    wide, taps = inputs.float(), weight.float()
    y = sum(wide[:, tap : tap + tokens] * taps[:, tap] for tap in range(weight.shape[1]))
    assert isinstance(y, Tensor)
    y = y if bias is None else y + bias.float()
    return (functional.silu(y) if activation else y).to(inputs.dtype).transpose(1, 2)


def channels_contiguous(x: Tensor, length: int) -> Tensor:
    """Uninitialized [B, C, length] in x's dtype."""
    return x.new_empty((x.shape[0], length, x.shape[1])).transpose(1, 2)


def _fake(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    torch._check(activation in ACTIVATIONS, lambda: f"causal_conv1d: no activation is called {activation}")
    torch._check(
        window.shape[2] >= weight.shape[1] - 1,
        lambda: "causal_conv1d: the window must hold all inputs that the filter reaches",
    )
    return channels_contiguous(x, x.shape[2])


def sample_inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias of two rows, eight channels, five tokens."""
    x = torch.randn(2, 5, 8, device=device, dtype=usual_dtype(device)).transpose(1, 2)
    return x, torch.randn(8, 4, device=device, dtype=x.dtype), torch.randn(8, device=device, dtype=x.dtype)


def _sample(device: str) -> tuple[object, ...]:
    x, weight, bias = sample_inputs(device)
    return x, torch.randn(2, 8, 4, device=device, dtype=x.dtype), weight, bias, "silu"


causal_conv1d = define_op(
    "causal_conv1d",
    "(Tensor x, Tensor window, Tensor weight, Tensor? bias, str? activation) -> Tensor",
    reference,
    _fake,
    _sample,
)
