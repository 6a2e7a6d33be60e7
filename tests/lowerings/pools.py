"""Pools of keys and values in several layouts, for the tests of ``kv_write`` on every device."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
STATES = (torch.float32, torch.float16, torch.bfloat16)
POOLS = (*STATES, FP8)
# Where, in memory, the dimensions pages, page, heads, D of a pool lie.
LAYOUTS = {"pages first": (0, 1, 2, 3), "heads before tokens": (0, 2, 1, 3), "heads first": (2, 0, 1, 3)}
GUARD = 3


def in_layout(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A pool [num_pages, P, Hkv, D] of some numbers between guards, and the whole buffer."""
    order = LAYOUTS[layout]
    outer = [shape[dim] for dim in order]
    buffer = torch.randn([outer[0] + 2, *outer[1:-1], outer[-1] + GUARD]).to(dtype)
    inner = buffer[1:-1, ..., :-GUARD]
    return inner.permute([order.index(dim) for dim in range(4)]), buffer


def states_in_layout(layout: str, tokens: int, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Keys or values [tokens, Hkv, D], inner dimension contiguous."""
    if layout == "of a fused projection":
        return (
            torch.randn(tokens, 3 * heads * dim)
            .to(dtype)[:, heads * dim : -heads * dim]
            .unflatten(1, (heads, dim))
        )
    if layout == "heads first":
        return torch.randn(heads, tokens, dim).to(dtype).transpose(0, 1)
    return torch.randn(tokens, heads, dim).to(dtype)


def bits(x: Tensor) -> Tensor:
    """Something that compares exactly, NaN and -0 included."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def float8_edges() -> Tensor:
    """float32 [n]: every bfloat16, all float8s, what lies halfway between two, and their neighbours."""
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    exact = torch.cat([codes, middles, torch.tensor([448.0, 464.0, 479.99, 480.0, 512.0])])
    up, down = (exact.nextafter(torch.tensor(to)) for to in (torch.inf, -torch.inf))
    positive = torch.cat([exact, up, down])
    anything = torch.randint(-(2**31), 2**31 - 1, (4096,), dtype=torch.int32).view(torch.float32)
    return torch.cat([half, positive, -positive, anything])
