"""The page table kernels, in the interpreter, between guards that nothing may touch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specc.lowerings import scatter_ragged, scatter_req_to_token
from specc.lowerings.triton_kernels import page_table
from tests.interpreted.memory import untouched
from tests.lowerings.batches import Batch, batch, batches, paged

POISON = -77
LIMITS = settings(max_examples=60, deadline=None)


def guarded(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A table inside of a larger buffer of poison, and the buffer."""
    buffer = torch.full((rows + 2, width + 5), POISON, dtype=torch.int32)
    return buffer[1:-1, 2:-3], buffer


def assert_filled(out: Tensor, buffer: Tensor, expected: Tensor) -> None:
    assert torch.equal(out, expected)
    out.fill_(POISON)
    assert bool((buffer == POISON).all()), "a guard was overwritten"


def assert_both_kernels(rows: Batch, block: int = page_table.BLOCK) -> None:
    expected = rows.table()
    with mock.patch.object(page_table, "BLOCK", block):
        out, buffer = guarded(*expected.shape)
        page_table.fill_from_requests(out, rows.req_to_token, rows.requests, rows.kv_lens, rows.page_size)
        assert_filled(out, buffer, expected)
        page_table.fill_from_ragged(out, *rows.ragged(), rows.page_size)
        assert_filled(out, buffer, expected)


@LIMITS
@given(rows=batches(), block=st.sampled_from([2, 8]))
def test_each_entry_is_its_page_or_zero(rows: Batch, block: int) -> None:
    assert_both_kernels(rows, block)


def test_rows_of_several_real_blocks() -> None:
    assert_both_kernels(paged([700 * 16, 256 * 16, 256 * 16 + 1, 0], 16, 600))


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_integers_and_strides(index: torch.dtype, contiguous: bool) -> None:
    rows = paged([33, 0, 64], 16, 4)
    slots, requests, lens, indices, indptr = (
        each.to(index) if contiguous else torch.stack([each, -each], -1).to(index)[..., 0]
        for each in (rows.req_to_token, rows.requests, rows.kv_lens, *rows.ragged())
    )
    assert torch.equal(page_table.from_requests(slots, requests, lens, 16, 4), rows.table())
    assert torch.equal(page_table.from_ragged(indices, indptr, 16, 4), rows.table())


def test_no_requests_named_means_one_by_one() -> None:
    rows = paged([17, 16], 16, 3)
    assert torch.equal(page_table.from_requests(rows.req_to_token, None, rows.kv_lens, 16, 3), rows.table())


def test_no_rows_no_tokens_no_width() -> None:
    none, some = torch.zeros(0, dtype=torch.int32), torch.tensor([0, 5])
    assert page_table.from_ragged(none, torch.zeros(1, dtype=torch.long), 16, 4).shape == (0, 4)
    assert page_table.from_ragged(none, some, 16, 4).tolist() == [[0] * 4]
    assert page_table.from_ragged(torch.ones(5).int(), some, 16, 0).shape == (1, 0)
    for slots in (torch.zeros(0, 8, dtype=torch.int32), torch.zeros(1, 0, dtype=torch.int32)):
        assert page_table.from_requests(slots, None, torch.tensor([3]), 16, 2).tolist() == [[0, 0]]


@LIMITS
@given(data=st.data())
def test_wrong_lengths_read_nothing_outside(data: st.DataObject) -> None:
    """Starts and ends anywhere, requests that do not exist, slots of -1: as the references clamp them."""
    anything = st.sampled_from([-(2**40), -17, -1, 0, 3, 32, 70, 2**33])
    indptr = torch.tensor(data.draw(st.lists(anything, min_size=2, max_size=4)))
    indices = torch.randint(-60, 400, (40,), dtype=torch.int32)
    out, buffer = guarded(len(indptr) - 1, 3)
    page_table.fill_from_ragged(out, indices, indptr, 16)
    assert_filled(out, buffer, scatter_ragged.reference(indices, indptr, 16, 3))

    requests, slots = indptr[1:], indices.view(2, 20)
    out, buffer = guarded(len(requests), 3)
    page_table.fill_from_requests(out, slots, requests, requests.flip(0), 16)
    assert_filled(out, buffer, scatter_req_to_token.reference(slots, requests, requests.flip(0), 16, 3))


def test_a_block_at_the_context_limit_stays_in_its_row() -> None:
    """Upstream, pages beyond the width went to the next row's first column, or past the last row."""
    context, block = 64, 4
    rows = paged([context - 2 + block, context - 1 + block, 5, context - 1 + block], 16, context // 16)
    assert bool((rows.table()[:2] > 0).all())
    assert_both_kernels(rows)


def test_a_smaller_batch_in_a_larger_batchs_buffer() -> None:
    """Upstream, what a replay with fewer or shorter rows did not write was stale."""
    lens = [40, 33, 32, 31, 16, 1, 64]
    large, small = paged(lens, 16, 4), paged([17, 0, 48, 0, 0, 0, 0], 16, 4)
    out, buffer = guarded(7, 4)
    for rows in (large, small):
        page_table.fill_from_requests(out, rows.req_to_token, rows.requests, rows.kv_lens, 16)
        assert torch.equal(out, rows.table())
    for rows in (large, small):
        page_table.fill_from_ragged(out, *rows.ragged(), 16)
        assert torch.equal(out, rows.table())
    assert_filled(out, buffer, small.table())


def test_offsets_beyond_32_bits() -> None:
    stride, rows = 2**30 + 16, batch([20, 33, 48], 16, 4, 64)
    size = (2 * stride + 64) * 4
    slots = untouched(size).view(torch.int32).as_strided((3, 64), (stride, 1))
    slots.copy_(rows.req_to_token)
    assert torch.equal(page_table.from_requests(slots, None, rows.kv_lens, 16, 4), rows.table())
