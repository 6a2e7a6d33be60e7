"""The page table operators and ``kv_write``: references against plain loops, and what a GPU would choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.errors import ProviderError
from specc.lowerings import (
    REGISTRY,
    kv_write,
    ragged_kv,
    read_pages,
    scatter_ragged_to_page_table,
    scatter_req_to_token_to_page_table,
)
from specc.lowerings.triton_kernels import obstacle
from tests.lowerings.batches import Batch, batch, batches, paged
from tests.lowerings.pools import FP8, LAYOUTS, POOLS, bits, float8_edges, in_layout

LIMITS = settings(max_examples=100, deadline=None)
needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


def from_requests(rows: Batch) -> Tensor:
    return scatter_req_to_token_to_page_table(
        rows.req_to_token, rows.requests, rows.kv_lens, rows.page_size, rows.width
    )


@LIMITS
@given(rows=batches())
def test_both_tables_are_what_a_loop_makes(rows: Batch) -> None:
    expected = rows.table()
    assert from_requests(rows).dtype == torch.int32
    assert torch.equal(from_requests(rows), expected)
    assert torch.equal(scatter_ragged_to_page_table(*rows.ragged(), rows.page_size, rows.width), expected)


@LIMITS
@given(rows=batches())
def test_ragged_kv_lists_the_slots_row_after_row(rows: Batch) -> None:
    table = rows.req_to_token[rows.requests]
    kv_indptr, kv_indices = ragged_kv(table, rows.kv_lens)
    expected = [slots[:length] for slots, length in zip(table.tolist(), rows.kv_lens.tolist(), strict=True)]
    ends = [0]
    for row in expected:
        ends.append(ends[-1] + len(row))
    flat = [slot for row in expected for slot in row]
    assert kv_indptr.tolist() == ends
    assert kv_indices.tolist() == flat + [0] * (table.numel() - len(flat))


@pytest.mark.parametrize(("seq_len", "block", "pages"), [(30, 4, 3), (30, 2, 2), (31, 2, 3), (0, 1, 1)])
def test_pages_of_a_block(seq_len: int, block: int, pages: int) -> None:
    """A block's last token on a page's last slot, and on the next page's first."""
    first = torch.tensor([5, 2, 9, 4, 7])[:, None] * 16
    req_to_token = (first + torch.arange(16)).flatten()[None].int()
    kv_lens = torch.tensor([seq_len + block])
    expected = [*[5, 2, 9][:pages], *[0] * (5 - pages)]
    assert scatter_req_to_token_to_page_table(req_to_token, None, kv_lens, 16, 5).tolist() == [expected]


def test_a_row_beyond_the_width_is_cut_and_its_neighbour_is_not() -> None:
    rows = batch([66, 66, 66], 16, 4, 80)
    assert torch.equal(from_requests(rows), rows.req_to_token[:, :64:16] // 16)
    wide = batch([66], 16, 5, 80)
    assert int((from_requests(wide) > 0).sum()) == 5


def test_nothing_and_nonsense() -> None:
    none = torch.zeros(0, dtype=torch.int32)
    assert scatter_ragged_to_page_table(none, torch.tensor([0, 5]), 16, 2).tolist() == [[0, 0]]
    assert scatter_ragged_to_page_table(none, torch.tensor([0]), 16, 2).shape == (0, 2)
    assert scatter_req_to_token_to_page_table(none[None], None, torch.tensor([3]), 16, 2).tolist() == [[0, 0]]
    slots = torch.tensor([[-1, 40, 50]], dtype=torch.int32)
    table = scatter_req_to_token_to_page_table(slots, torch.tensor([7]), torch.tensor([99]), 2, 4)
    assert table.tolist() == [[0, 25, 0, 0]]
    starts = torch.tensor([-4, 2**40, 2])
    assert scatter_ragged_to_page_table(slots[0], starts, 2, 2).tolist() == [[0, 0], [0, 0]]


@LIMITS
@given(data=st.data())
def test_read_pages_returns_what_kv_write_stored(data: st.DataObject) -> None:
    rows, page = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 16]))
    layout, pool = data.draw(st.sampled_from(sorted(LAYOUTS))), data.draw(st.sampled_from(POOLS))
    scale = data.draw(st.sampled_from([None, torch.tensor([0.25])]))
    pages, _ = in_layout(layout, (5, page, 2, 8), pool)
    # Numbers that every pool can hold, at this scale too.
    k = torch.randint(-15, 16, (rows, 2, 8)).float()
    slots = torch.randperm(5 * page)[:rows]
    kv_write(k, k, pages, pages.clone(), slots, scale, None)
    read = read_pages(pages, slots[:, None].int(), scale, torch.float32)
    assert read.shape == (rows, 2, 1, 8)
    assert torch.equal(read[:, :, 0], k)


def test_read_pages_clamps_strays() -> None:
    pages = torch.arange(6.0).view(3, 2, 1, 1)
    slots = torch.tensor([[-5, 3], [99, 0]], dtype=torch.int32)
    assert read_pages(pages, slots, None, torch.float32).flatten(1).tolist() == [[0, 3], [5, 0]]


def nearest_float8(value: float, numbers: list[float]) -> list[float]:
    """The nearest of the format's numbers, both where the two nearest are equally near."""
    least = min(abs(value - number) for number in numbers)
    return [number for number in numbers if abs(value - number) == least]


def test_float8_is_the_nearest_number_and_the_even_one_of_two() -> None:
    values = float8_edges()
    k = values[torch.randperm(len(values))[:3000]].view(-1, 1, 1)
    pages = torch.zeros(len(k), 1, 1, 1, dtype=FP8)
    kv_write(k, k, pages, pages.clone(), torch.arange(len(k)), None, None)
    codes = torch.arange(0x7F, dtype=torch.uint8)
    numbers = codes.view(FP8).double().tolist()
    for value, stored in zip(k.flatten().tolist(), pages.flatten(), strict=True):
        if value != value:
            assert bool(stored.float().isnan())
            continue
        near = nearest_float8(min(abs(value), 448.0), numbers)
        assert abs(float(stored)) in near
        assert len(near) == 1 or numbers.index(abs(float(stored))) % 2 == 0
        assert float(stored) * value >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_scales_divide(dtype: torch.dtype) -> None:
    k, v = torch.randn(4, 2, 8), torch.randn(4, 2, 6)
    k_pages, v_pages = torch.zeros(1, 4, 2, 8, dtype=dtype), torch.zeros(1, 4, 2, 6, dtype=dtype)
    kv_write(k, v, k_pages, v_pages, torch.arange(4), torch.tensor([0.1]), torch.tensor([30.0]))
    assert torch.equal(bits(k_pages[0]), bits((k / 0.1).to(dtype)))
    assert torch.equal(bits(v_pages[0]), bits((v / 30.0).to(dtype)))


@pytest.mark.parametrize(
    "name", ["kv_write", "scatter_ragged_to_page_table", "scatter_req_to_token_to_page_table"]
)
def test_opcheck_of_the_edges(name: str) -> None:
    calls: dict[str, list[tuple[Any, ...]]] = {
        "kv_write": [
            (
                torch.randn(2, 1, 4),
                torch.randn(2, 1, 3),
                *pool(),
                torch.tensor([3, 1]),
                None,
                torch.ones(1),
            ),
            (torch.randn(0, 1, 4), torch.randn(0, 1, 3), *pool(), torch.zeros(0).long(), None, None),
        ],
        "scatter_ragged_to_page_table": [(*paged([17, 0], 16, 3).ragged(), 16, 3)],
        "scatter_req_to_token_to_page_table": [
            (paged([17, 0], 16, 3).req_to_token, torch.tensor([1, 0]), torch.tensor([17, 0]), 16, 3)
        ],
    }
    for call in calls[name]:
        torch.library.opcheck(REGISTRY[name].overload, call)


def pool() -> tuple[Tensor, Tensor]:
    return torch.zeros(2, 2, 1, 4).bfloat16(), torch.zeros(2, 2, 1, 3).half()


KERNELS = ("kv_write", "scatter_ragged_to_page_table", "scatter_req_to_token_to_page_table")


@needs_triton
@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_gpu_takes_triton(name: str, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        call = REGISTRY[name].sample("cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert REGISTRY[name].choose(*call).provider.name == "triton"


@pytest.mark.parametrize("name", KERNELS)
def test_a_cpu_takes_the_reference(name: str) -> None:
    call = REGISTRY[name].sample("cpu")
    decision = REGISTRY[name].choose(*call)
    assert decision.describe() == "reference (not triton: needs a CUDA or HIP device, got cpu)"
    with pytest.raises(ProviderError, match="needs a CUDA or HIP device"):
        REGISTRY[name].choose(*call, forced="triton")


REFUSALS: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("kv_write", 0, lambda k: k.double(), "has no kernel that writes k of torch.float64"),
    ("kv_write", 3, lambda pages: pages.int(), "writes v of torch.bfloat16 to pages of torch.int32"),
    (
        "kv_write",
        1,
        lambda v: v.new_empty(20, 8, 32),
        "cannot write v of shape .20, 8, 32. to pages of .4, 16, 8, 64.",
    ),
    (
        "kv_write",
        0,
        lambda k: k.new_empty_strided(k.shape, (512, 1, 8)),
        "needs k and its pages contiguous in the last dim",
    ),
    (
        "kv_write",
        2,
        lambda x: x.new_empty_strided(x.shape, (8192, 512, 1, 8)),
        "needs k and its pages contiguous",
    ),
    ("kv_write", 2, lambda x: x.new_empty(3, 16, 8, 64), "needs keys' and values' pages of one shape"),
    ("kv_write", 4, lambda slots: slots.new_empty(3), "needs one slot per token, got .3. for .20, 8, 64."),
    ("kv_write", 4, lambda slots: slots.short(), "has no kernel for slots of torch.int16"),
    ("kv_write", 4, lambda slots: slots.cpu(), "needs all tensors on one device, got cpu, cuda:0"),
    (
        "kv_write",
        5,
        lambda _: torch.ones(8, device="cuda"),
        "needs k_scale of float32 .1., got torch.float32 .8.",
    ),
    ("kv_write", 6, lambda _: torch.ones(1, device="cuda").half(), "needs v_scale of float32"),
    ("scatter_ragged_to_page_table", 0, lambda x: x.short(), "has no kernel for kv_indices of torch.int16"),
    ("scatter_ragged_to_page_table", 1, lambda x: x.float(), "has no kernel for kv_indptr of torch.float32"),
    ("scatter_ragged_to_page_table", 1, lambda x: x.cpu(), "needs all tensors on one device"),
    ("scatter_req_to_token_to_page_table", 0, lambda x: x.short(), "has no kernel for req_to_token"),
    (
        "scatter_req_to_token_to_page_table",
        1,
        lambda _: torch.zeros(3, device="cuda", dtype=torch.int64),
        "needs one request per row, got 3 for 2 rows",
    ),
    ("scatter_req_to_token_to_page_table", 2, lambda x: x.double(), "has no kernel for kv_lens"),
]


@pytest.mark.parametrize(("name", "position", "change", "why"), REFUSALS)
def test_triton_says_what_it_cannot_serve(
    name: str, position: int, change: Callable[[Any], Any], why: str
) -> None:
    with FakeTensorMode():
        call = list(REGISTRY[name].sample("cuda"))
        call[position] = change(call[position])
        with pytest.raises(ProviderError, match=why):
            REGISTRY[name].choose(*call, forced="triton")


def test_fake_kernels_refuse_what_does_not_match() -> None:
    with FakeTensorMode():
        slots, lens = torch.zeros(2, 64, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(RuntimeError, match="one request per row"):
            scatter_req_to_token_to_page_table(slots, torch.zeros(3, dtype=torch.int64), lens, 16, 4)
        k, pages = torch.zeros(2, 1, 4), torch.zeros(1, 4, 1, 4)
        with pytest.raises(RuntimeError, match="one slot per token"):
            kv_write(k, k, pages, pages.clone(), torch.zeros(3, dtype=torch.int64), None, None)
