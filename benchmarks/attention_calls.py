"""The calls that benchmarks.attention times: specc's operators and their peers, on inputs in turn."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from specc.errors import ProviderError
from specc.lowerings import (
    scatter_ragged_to_page_table,
    scatter_req_to_token_to_page_table,
    unified_attention,
)

Calls = list[Callable[[], Any]]

KV_HEADS, HEAD_DIM, FLEX_PAGE = 8, 128, 128
# Several times the L2 cache of 50 MB.
ROTATED_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    context: int
    heads: int
    q_len: int
    page_size: int

    def queries(self, device: str) -> Tensor:
        return _random((self.batch, self.heads, self.q_len, HEAD_DIM), device)


class Pools:
    """Random keys and values of one batch and context, several times over, in every peer's layout."""

    def __init__(self, batch: int, context: int, device: str) -> None:
        self.batch, self.context, self.device = batch, context, device
        self.kv_bytes = kv_bytes(batch, context)
        # Room for the dummy page of the largest page size.
        tokens = batch * context + FLEX_PAGE
        self._states = _random((2, num_sets(self.kv_bytes), tokens, KV_HEADS, HEAD_DIM), device)

    def paged(self, page_size: int) -> list[tuple[Tensor, Tensor]]:
        keys, values = self._states.unflatten(2, (-1, page_size))
        return list(zip(keys, values, strict=True))

    def static(self) -> list[tuple[Tensor, Tensor]]:
        return self._viewed(self.batch, KV_HEADS, self.context, HEAD_DIM)

    def in_one_row(self) -> list[tuple[Tensor, Tensor]]:
        return self._viewed(1, KV_HEADS, self.batch * self.context, HEAD_DIM)

    def _viewed(self, *shape: int) -> list[tuple[Tensor, Tensor]]:
        used = self._states[:, :, : self.batch * self.context]
        return [(used[0, i].view(shape), used[1, i].view(shape)) for i in range(used.shape[1])]


def _paged_arguments(case: Case, device: str) -> tuple[Any, ...]:
    width = case.context // case.page_size
    pages = torch.randperm(case.batch * width, device=device, dtype=torch.int32) + 1
    bounds = torch.arange(case.batch + 1, device=device, dtype=torch.int32) * case.q_len
    lens = torch.full((case.batch,), case.context, device=device)
    scale = HEAD_DIM**-0.5
    return pages.view(case.batch, width), bounds, lens, case.q_len, scale, 0, 0.0, None, None, None


def by_specc(case: Case, pools: Pools) -> Calls:
    q = case.queries(pools.device).transpose(1, 2).flatten(0, 1).contiguous()
    arguments = _paged_arguments(case, pools.device)
    sets = pools.paged(case.page_size)
    decision = unified_attention.choose(q, *sets[0], *arguments)
    if decision.provider.name == "reference":
        raise ProviderError(f"no kernel serves this call: {decision.describe()}")
    return [functools.partial(unified_attention, q, k, v, *arguments) for k, v in sets]


def _lower_right(case: Case) -> Any:
    return causal_lower_right(case.q_len, case.context) if case.q_len > 1 else None


def exact(case: Case, pools: Pools) -> Calls:
    q, mask = case.queries(pools.device), _lower_right(case)
    attend = functools.partial(F.scaled_dot_product_attention, q, attn_mask=mask, enable_gqa=True)
    return [functools.partial(attend, k, v) for k, v in pools.static()]


def masked(case: Case, pools: Pools, repeat: bool) -> Calls:
    q = case.queries(pools.device)
    position = torch.arange(case.context, device=pools.device)
    mask = (position <= position[-case.q_len :, None]).expand(case.batch, 1, -1, -1).contiguous()

    def attend(k: Tensor, v: Tensor) -> Tensor:
        if repeat:
            k, v = (_repeat_kv(each, case.heads // KV_HEADS) for each in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=not repeat)

    return [functools.partial(attend, k, v) for k, v in pools.static()]


def _repeat_kv(states: Tensor, group: int) -> Tensor:
    batch, heads, context, dim = states.shape
    return states[:, :, None].expand(batch, heads, group, context, dim).reshape(batch, -1, context, dim)


def flex(case: Case, pools: Pools) -> Calls:
    """Compiled anew for each shape: else torch gives up recompiling and runs it unfused."""
    torch.compiler.reset()
    num_pages = case.batch * case.context // FLEX_PAGE
    paged = PagedAttention(num_pages, FLEX_PAGE, case.batch, device=pools.device)
    paged.empty_pages = torch.randperm(num_pages).tolist()
    lens = torch.full((case.batch,), case.context, device=pools.device)
    for row in range(case.batch):
        paged.reserve(torch.tensor(row, device=pools.device), lens[row])
    mask = paged.convert_logical_block_mask(_causal_blocks(case, pools.device), kv_len=lens)
    attend = functools.partial(torch.compile(flex_attention, dynamic=False), case.queries(pools.device))
    return [functools.partial(attend, k, v, block_mask=mask, enable_gqa=True) for k, v in pools.in_one_row()]


def _causal_blocks(case: Case, device: str) -> BlockMask:
    """Built as it is known to be: create_block_mask would make a mask of every key first."""
    before, blocks = case.context - case.q_len, case.context // FLEX_PAGE
    whole = (before + 1) // FLEX_PAGE
    shape = (case.batch, 1, 1)
    order = torch.arange(blocks, device=device, dtype=torch.int32).expand(*shape, blocks)
    counts = torch.ones(shape, device=device, dtype=torch.int32)
    return BlockMask.from_kv_blocks(
        counts * (blocks - whole),
        order.roll(-whole, -1).contiguous(),
        counts * whole,
        order.contiguous(),
        BLOCK_SIZE=(FLEX_PAGE, FLEX_PAGE),
        mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx + before,
        seq_lengths=(case.q_len, case.context),
    )


def relative_error(case: Case, pools: Pools) -> float:
    """specc's result on the first inputs against SDPA over a dense copy of the same keys and values."""
    q = case.queries(pools.device)
    arguments = _paged_arguments(case, pools.device)
    pages = pools.paged(case.page_size)[0]
    ours = unified_attention(q.transpose(1, 2).flatten(0, 1).contiguous(), *pages, *arguments)
    k, v = (each[arguments[0].long()].flatten(1, 2).transpose(1, 2) for each in pages)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=_lower_right(case), enable_gqa=True)
    theirs = theirs.transpose(1, 2).flatten(0, 1).float()
    return float((ours.float() - theirs).norm() / theirs.norm())


def page_table_calls(rows: int, context: int, page_size: int, device: str) -> dict[str, Calls]:
    """Both operators that build page tables, over 16 tables of slots in turn."""
    width = context // page_size
    slots = torch.arange(rows * context, device=device, dtype=torch.int32).view(rows, context)
    tables = [slots.roll(page_size * i, 1) for i in range(16)]
    lens = torch.full((rows,), context, device=device)
    indptr = torch.arange(rows + 1, device=device) * context
    by_request, ragged = scatter_req_to_token_to_page_table, scatter_ragged_to_page_table
    return {
        by_request.name: [
            functools.partial(by_request, each, None, lens, page_size, width) for each in tables
        ],
        ragged.name: [functools.partial(ragged, each.flatten(), indptr, page_size, width) for each in tables],
    }


def _random(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.empty(shape, device=device, dtype=torch.bfloat16).normal_()


def kv_bytes(batch: int, context: int) -> int:
    return 2 * batch * context * KV_HEADS * HEAD_DIM * torch.bfloat16.itemsize


def num_sets(kv_bytes: int) -> int:
    return max(1, min(64, math.ceil(ROTATED_BYTES / kv_bytes)))
