"""Calls of ``specc::unified_attention`` over a poisoned pool, and what they should give."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specc.lowerings.kv_write import FP8
from specc.lowerings.unified_attention import reference

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows of ``lens`` keys and blocks of ``blocks`` tokens over shuffled pages."""

    lens: Sequence[int]
    blocks: Sequence[int]
    dtype: torch.dtype = torch.float32
    kv_heads: int = 2
    group: int = 4
    key_dim: int = 64
    value_dim: int = 64
    page: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    spare_pages: int = 2


def build(case: Case, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """The arguments of the call. Whatever no row may use is NaN: page 0, spare pages, tails of pages."""
    torch.manual_seed(seed)
    needed = [max(0, -(-length // case.page)) for length in case.lens]
    width = max(1, max(needed)) + case.spare_pages
    num_pages = sum(needed) + 1
    pools = []
    order = torch.randperm(num_pages - 1, dtype=torch.int32) + 1
    table = torch.zeros(len(needed), width, dtype=torch.int32)
    for row, pages in enumerate(order.split(needed)):
        table[row, : len(pages)] = pages
    for dim in (case.key_dim, case.value_dim):
        pool = torch.randn(num_pages, case.page, case.kv_heads, dim, device=device).to(case.dtype)
        pool[0] = NAN
        for row, length in enumerate(case.lens):
            if length > 0 and length % case.page:
                pool[table[row, needed[row] - 1], length % case.page :] = NAN
        pools.append(pool.to(FP8) if case.fp8 else pool)
    starts = torch.tensor([0, *case.blocks]).cumsum(0).to(torch.int32)
    heads = case.kv_heads * case.group
    q = torch.randn(int(starts[-1]), heads, case.key_dim, device=device).to(case.dtype)
    sinks = torch.randn(heads, device=device).to(case.dtype) if case.sinks else None
    scales = [torch.tensor([s], device=device) if case.fp8 else None for s in (0.5, 1.5)]
    lens = torch.tensor(case.lens, device=device)
    tensors = (q, *pools, table.to(device), starts.to(device), lens)
    scale = case.key_dim**-0.5
    return (*tensors, max(1, *case.blocks), scale, case.window, case.softcap, sinks, *scales)


def expected(args: Sequence[Any]) -> Tensor:
    """The reference in float64, over a pool without NaN, which no visible key holds."""
    q, k_pages, v_pages, *rest, sinks, k_scale, v_scale = args
    pools = [
        (pool.double() if scale is None else pool.double() * scale.double()).nan_to_num(0)
        for pool, scale in ((k_pages, k_scale), (v_pages, v_scale))
    ]
    sinks = None if sinks is None else sinks.double()
    return reference(q.double(), *pools, *rest, sinks, None, None)


def relative_error(out: Tensor, truth: Tensor) -> float:
    return float((out.double() - truth).norm() / truth.norm().clamp(min=1e-30))
