"""Batches with pages, for the tests of the page table operators on every device."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from specc.lowerings.ragged_kv import reference as ragged_kv

PAGE_SIZES = (1, 16, 64, 128)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of ``kv_lens`` tokens, whose slots the ``requests`` of ``req_to_token`` hold."""

    req_to_token: Tensor
    requests: Tensor
    kv_lens: Tensor
    page_size: int
    width: int

    def to(self, device: str) -> Batch:
        tensors = (self.req_to_token, self.requests, self.kv_lens)
        return Batch(*(each.to(device) for each in tensors), self.page_size, self.width)

    def ragged(self) -> tuple[Tensor, Tensor]:
        """``kv_indices, kv_indptr`` of the same rows."""
        kv_indptr, kv_indices = ragged_kv(self.req_to_token[self.requests], self.kv_lens)
        return kv_indices, kv_indptr

    def table(self) -> Tensor:
        """The page table as it is meant, one entry at a time."""
        out = torch.zeros(len(self.kv_lens), self.width, dtype=torch.int32)
        slots = self.req_to_token.tolist()
        for row, (request, length) in enumerate(
            zip(self.requests.tolist(), self.kv_lens.tolist(), strict=True)
        ):
            tokens = range(0, min(length, len(slots[request])), self.page_size)
            for column, token in enumerate(tokens[: self.width]):
                out[row, column] = slots[request][token] // self.page_size
        return out


def batch(
    kv_lens: list[int], page_size: int, width: int, capacity: int, requests: list[int] | None = None
) -> Batch:
    """Pages in random order, the rest of a request's slots stale or -1."""
    requests = list(range(len(kv_lens))) if requests is None else requests
    num_requests, pages = max(requests, default=0) + 1, -(-capacity // page_size)
    firsts = (torch.randperm(num_requests * pages) + 1).view(num_requests, pages, 1) * page_size
    slots = (firsts + torch.arange(page_size)).flatten(1)[:, :capacity].int()
    longest = torch.zeros(num_requests, dtype=torch.long)
    longest.scatter_reduce_(0, torch.tensor(requests, dtype=torch.long), torch.tensor(kv_lens).long(), "amax")
    unused = torch.arange(capacity) >= longest[:, None]
    slots[unused] = torch.randint(-1, 2**31 - 1, slots.shape, dtype=torch.int32)[unused]
    return Batch(slots, torch.tensor(requests).long(), torch.tensor(kv_lens).long(), page_size, width)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Rows that are empty, end at and around a page's end, at and beyond the width and the capacity."""
    page_size, width = draw(st.sampled_from(PAGE_SIZES)), draw(st.integers(1, 7))
    full = width * page_size
    capacity = draw(st.sampled_from([1, page_size, full - 1, full, full + 1, full + 3 * page_size]))
    near = st.integers(0, width + 2).flatmap(
        lambda pages: st.sampled_from([-1, 0, 1]).map(lambda off: max(0, pages * page_size + off))
    )
    kv_lens = draw(st.lists(near | st.integers(0, full + 2 * page_size), min_size=1, max_size=5))
    requests = draw(st.permutations(range(len(kv_lens) + 1)))[: len(kv_lens)]
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return batch(kv_lens, page_size, width, max(capacity, 1), list(requests))


def paged(kv_lens: list[int], page_size: int, width: int) -> Batch:
    """``batch`` with room for whatever ``kv_lens`` asks."""
    return batch(kv_lens, page_size, width, max(kv_lens) + page_size)
