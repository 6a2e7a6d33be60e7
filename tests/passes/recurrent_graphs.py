"""Small functions with short convolutions and recurrences, over windows and states or over specc's rings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specc import lowerings

ROWS, CHANNELS, WIDTH, RING = 2, 6, 4, 24
HEADS, VALUE_HEADS, KEY, VALUE = 2, 4, 8, 6
EVERY = 4


def weights() -> tuple[Tensor, Tensor]:
    return torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)


def inputs(q_len: int) -> Tensor:
    """[B, C, q], channels contiguous, as models make them."""
    return torch.randn(ROWS, q_len, CHANNELS).transpose(1, 2)


def window(columns: int = WIDTH) -> Tensor:
    return torch.randn(ROWS, CHANNELS, columns)


def conv_ring() -> Tensor:
    return torch.randn(ROWS, RING, CHANNELS)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = "silu"
) -> Tensor:
    """A model's convolution over all that it is given, as specc.leaves has it."""
    before = x.new_zeros(x.shape[0], x.shape[1], weight.shape[-1] - 1)
    return torch.ops.specc.causal_conv1d(x, before, weight, bias, activation)


def over_window(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As transformers' cache layer and models do for several tokens."""
    full = torch.cat([kept, x], dim=-1)
    kept.copy_(full[..., -kept.shape[-1] :])
    return convolve(full, weight, bias)[:, :, -x.shape[-1] :]


def over_window_token(x: Tensor, kept: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As specc.leaves does for one token."""
    out = torch.ops.specc.causal_conv1d(x, kept, weight, bias, "silu")
    kept.copy_(torch.cat([kept, x], dim=-1)[..., -kept.shape[-1] :])
    return out


def over_ring(x: Tensor, ring: Tensor, weight: Tensor, bias: Tensor, seq_lens: Tensor) -> Tensor:
    """As models do over specc's cache; of padding, whose outputs the operator makes zero, nothing is read."""
    full = torch.ops.specc.conv_inputs(x, ring, seq_lens, None, weight.shape[-1])
    y = convolve(full, weight, bias)[:, :, -x.shape[-1] :]
    positions = seq_lens[:, None] + torch.arange(x.shape[-1])
    return torch.where((positions >= 0)[:, None], y, 0)


# --- recurrences -------------------------------------------------------------------------------

Recur = Callable[..., tuple[Tensor, Tensor]]


def gated_delta_tokens(q_len: int) -> tuple[Tensor, ...]:
    """q, k, v, g, beta."""
    q, k = torch.randn(2, ROWS, q_len, HEADS, KEY)
    v = torch.randn(ROWS, q_len, VALUE_HEADS, VALUE)
    g, beta = -torch.rand(ROWS, q_len, VALUE_HEADS), torch.rand(ROWS, q_len, VALUE_HEADS)
    return q, k, v, g, beta


def ssd_tokens(q_len: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, dt_bias."""
    x = torch.randn(ROWS, q_len, VALUE_HEADS, VALUE)
    b, c = torch.randn(2, ROWS, q_len, HEADS, KEY)
    a, d, dt_bias = torch.rand(3, VALUE_HEADS)
    return x, torch.randn(ROWS, q_len, VALUE_HEADS), -a, b, c, d, dt_bias


@dataclasses.dataclass(frozen=True)
class Kind:
    """One recurrence: its operators, settings, a block's arguments, and its shapes."""

    name: str
    tokens: Callable[[int], tuple[Tensor, ...]]
    settings: tuple[Any, ...]
    state: tuple[int, ...]
    rings: tuple[tuple[int, ...], ...]

    def __call__(self, tokens: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(torch.ops.specc, self.name)(*tokens, state, *self.settings)

    @property
    def operators(self) -> tuple[Any, Any, Any]:
        """The recurrence, its replay form and its snapshot form."""
        names = (self.name, f"{self.name}_replay", f"{self.name}_snapshot")
        functional, replay, snapshot = (getattr(lowerings, name).overload for name in names)
        return functional, replay, snapshot

    def pool(self) -> tuple[Tensor, list[Tensor]]:
        state = torch.randn(ROWS, *self.state)
        return state, [torch.rand(ROWS, RING, *shape) * 0.1 for shape in self.rings]


GATED_DELTA = Kind(
    "gated_delta_rule",
    gated_delta_tokens,
    (0.3, True),
    (VALUE_HEADS, KEY, VALUE),
    ((HEADS, KEY), (VALUE_HEADS, VALUE), (VALUE_HEADS,)),
)
SSD = Kind(
    "ssd",
    ssd_tokens,
    (True, 0.0, float("inf")),
    (VALUE_HEADS, VALUE, KEY),
    ((VALUE_HEADS, VALUE), (HEADS, KEY), (VALUE_HEADS,)),
)
KINDS = (GATED_DELTA, SSD)


def lengths() -> tuple[Tensor, Tensor, Tensor]:
    """base, seq_lens, final_lens: a row that is flushed, one that is not."""
    return torch.tensor([3, 7]), torch.tensor([9, 8]), torch.tensor([8, 8])
