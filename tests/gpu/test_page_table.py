"""The page table and pool kernels on a CUDA device, against loops and references on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from specc.lowerings import REGISTRY
from specc.lowerings.kv_write import reference, to_stored
from tests.lowerings.batches import PAGE_SIZES, Batch, batch, batches, paged
from tests.lowerings.pools import (
    FP8,
    POOLS,
    STATES,
    bits,
    float8_edges,
    in_layout,
    states_in_layout,
)

KERNELS = ("kv_write", "scatter_ragged_to_page_table", "scatter_req_to_token_to_page_table")


def from_requests(rows: Batch) -> Tensor:
    return torch.ops.specc.scatter_req_to_token_to_page_table.triton(
        rows.req_to_token, rows.requests, rows.kv_lens, rows.page_size, rows.width
    )


def from_ragged(kv_indices: Tensor, kv_indptr: Tensor, page_size: int, width: int) -> Tensor:
    return torch.ops.specc.scatter_ragged_to_page_table.triton(kv_indices, kv_indptr, page_size, width)


def write(*args: Tensor | None) -> None:
    torch.ops.specc.kv_write.triton(*args)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_chosen_and_is_an_operator(name: str) -> None:
    call = REGISTRY[name].sample("cuda")
    assert REGISTRY[name].choose(*call).provider.name == "triton"
    torch.library.opcheck(REGISTRY[name].overload, call)


@settings(max_examples=100, deadline=None)
@given(rows=batches())
def test_each_entry_is_its_page_or_zero(rows: Batch) -> None:
    there = rows.to("cuda")
    assert torch.equal(from_requests(there).cpu(), rows.table())
    assert torch.equal(from_ragged(*there.ragged(), rows.page_size, rows.width).cpu(), rows.table())


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_rows_of_several_blocks(page_size: int) -> None:
    rows = paged([700 * page_size, 256 * page_size, 256 * page_size + 1, 0], page_size, 600)
    there = rows.to("cuda")
    assert torch.equal(from_requests(there).cpu(), rows.table())
    assert torch.equal(from_ragged(*there.ragged(), page_size, 600).cpu(), rows.table())


def test_a_table_beyond_32_bits() -> None:
    num_rows, width = 33000, 65536
    rows = batch([20], 16, width, 64).to("cuda")
    kv_lens = torch.zeros(num_rows, dtype=torch.int64, device="cuda")
    kv_lens[-1] = 20
    table = from_requests(Batch(rows.req_to_token, torch.zeros_like(kv_lens), kv_lens, 16, width))
    assert table.numel() > 2**31
    assert table[-1, :3].tolist() == [*(rows.req_to_token[0, [0, 16]] // 16).tolist(), 0]
    assert int((table != 0).sum()) == 2


def test_slots_beyond_32_bits() -> None:
    stride, rows = 2**30 + 16, batch([20, 33, 48], 16, 4, 64)
    memory = torch.zeros(2 * stride + 64, dtype=torch.int32, device="cuda")
    slots = memory.as_strided((3, 64), (stride, 1))
    slots.copy_(rows.req_to_token)
    there = Batch(slots, rows.requests.cuda(), rows.kv_lens.cuda(), 16, 4)
    assert torch.equal(from_requests(there).cpu(), rows.table())


def on_cuda(pages: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """A pool of ``in_layout`` and its buffer, strides kept."""
    there = buffer.cuda()
    return there.as_strided(pages.shape, pages.stride(), pages.storage_offset()), there


@pytest.mark.parametrize(
    ("dtype", "pool", "scale"),
    [
        *((dtype, pool, None) for dtype in STATES for pool in POOLS),
        (torch.bfloat16, FP8, 0.37),
        (torch.float16, FP8, 0.37),
        (torch.float32, torch.bfloat16, 0.37),
    ],
)
@pytest.mark.parametrize(
    ("layout", "heads", "page", "dims"),
    [
        ("pages first", 8, 16, (128, 128)),
        ("heads before tokens", 3, 6, (80, 64)),
        ("heads first", 1, 64, (576, 512)),
        ("pages first", 40, 1, (64, 72)),
    ],
)
def test_the_pool_is_the_references_bit_by_bit(
    layout: str,
    heads: int,
    page: int,
    dims: tuple[int, int],
    dtype: torch.dtype,
    pool: torch.dtype,
    scale: float | None,
) -> None:
    num_slots = 20 * page
    slots = torch.cat([torch.tensor([-3, num_slots + 9]), torch.randperm(num_slots - 2)[:9] + 1])
    divisor = None if scale is None else torch.tensor([scale])
    divisor_there = None if divisor is None else divisor.cuda()
    for state_layout in ("tokens first", "heads first", "of a fused projection"):
        k, v = (states_in_layout(state_layout, len(slots), heads, dim, dtype) for dim in dims)
        pools = [in_layout(layout, (20, page, heads, dim), pool) for dim in dims]
        theirs = [on_cuda(*each) for each in pools]
        reference(k, v, pools[0][0], pools[1][0], slots, divisor, divisor)
        strided = (torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda") for x in (k, v))
        strided = [there.copy_(x) for there, x in zip(strided, (k, v), strict=True)]
        write(*strided, theirs[0][0], theirs[1][0], slots.cuda(), divisor_there, divisor_there)
        for (_, ours), (_, other) in zip(theirs, pools, strict=True):
            assert torch.equal(bits(ours.cpu()), bits(other)), state_layout


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("dtype", STATES)
def test_float8_rounds_and_saturates_as_the_reference(dtype: torch.dtype, scale: float | None) -> None:
    k = float8_edges().to(dtype)
    k = torch.cat([k, k.new_zeros(-len(k) % 1024)]).view(-1, 1, 1024)
    divisor = None if scale is None else torch.tensor([scale])
    k_pages, v_pages = torch.zeros(2, len(k), 1, 1, 1024, device="cuda").to(FP8)
    there = None if divisor is None else divisor.cuda()
    write(k.cuda(), k.cuda(), k_pages, v_pages, torch.arange(len(k), device="cuda"), there, there)
    # Signalling NaN may come back in another guise, but as NaN.
    number, expected = ~k.isnan(), to_stored(k, FP8, divisor)
    for pages in (k_pages.cpu()[:, 0], v_pages.cpu()[:, 0]):
        assert torch.equal(bits(pages)[number], bits(expected)[number])
        assert bool(pages.float()[~number].isnan().all())


@pytest.mark.parametrize("heads_first", [False, True])
def test_a_pool_beyond_two_gib(heads_first: bool) -> None:
    page, heads, dim = 16, 8, 128
    num_pages = 2**31 // (page * heads * dim) + 3
    if heads_first:
        k_pages = torch.zeros(heads, num_pages, page, dim, device="cuda", dtype=torch.bfloat16).permute(
            1, 2, 0, 3
        )
    else:
        k_pages = torch.zeros(num_pages, page, heads, dim, device="cuda", dtype=torch.bfloat16)
    v_pages = torch.zeros(num_pages, page, heads, 8, device="cuda", dtype=torch.bfloat16)
    assert k_pages.numel() > 2**31
    k = torch.randn(4, heads, dim, device="cuda").bfloat16()
    slots = torch.tensor([0, 17, num_pages * page - 1, num_pages * page - 40], device="cuda")
    write(k, k[..., :8], k_pages, v_pages, slots, None, None)
    for pages, states in ((k_pages, k), (v_pages, k[..., :8])):
        assert torch.equal(pages[slots // page, slots % page], states)
        assert int((pages != 0).sum()) == int((states != 0).sum())


def capture(run: Callable[[], Tensor | None]) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    run()  # Compiles, which a capture does not allow.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


@pytest.mark.parametrize("page_size", [1, 16])
def test_a_captured_table_holds_for_a_smaller_batch(page_size: int) -> None:
    """Upstream, a replay of 3 rows after 7 left stale entries, and page size 1 was never refreshed."""
    width, capacity = 64 // page_size, 80
    steps = [
        batch(lens, page_size, width, capacity)
        for lens in ([40, 33, 32, 31, 16, 1, 66], [17, 0, 48, 0, 0, 0, 0], [1, 2, 3, 64, 65, 79, 80])
    ]
    static = steps[0].to("cuda")
    flat = static.ragged()
    of_requests, table = capture(lambda: from_requests(static))
    of_ragged, ragged_table = capture(lambda: from_ragged(*flat, page_size, width))
    for rows in steps:
        for buffer, value in zip(
            (static.req_to_token, static.kv_lens, *flat),
            (rows.req_to_token, rows.kv_lens, *rows.ragged()),
            strict=True,
        ):
            buffer.copy_(value)
        of_requests.replay()
        of_ragged.replay()
        assert table is not None
        assert ragged_table is not None
        assert torch.equal(table.cpu(), rows.table())
        assert torch.equal(ragged_table.cpu(), rows.table())


@pytest.mark.parametrize("pool", [torch.bfloat16, FP8])
def test_a_captured_write_holds_for_a_smaller_batch(pool: torch.dtype) -> None:
    block, shape = 5, (8, 16, 4, 64)
    k_pages, v_pages = torch.zeros(2, *shape).to(pool)
    k_there, v_there = k_pages.cuda(), v_pages.cuda()
    k, v = torch.zeros(2, 7 * block, 4, 64, device="cuda", dtype=torch.bfloat16)
    slots = torch.zeros(7 * block, dtype=torch.int64, device="cuda")
    graph, _ = capture(lambda: write(k, v, k_there, v_there, slots, None, None))
    for rows in (7, 3, 7):
        states = torch.randn(2, 7 * block, 4, 64).bfloat16()
        # Page 0 takes the padding, and owns nothing.
        at = (torch.randperm(7 * 16)[: 7 * block] + 16).where(torch.arange(7 * block) < rows * block, 0)
        for buffer, value in zip((k, v, slots), (*states, at), strict=True):
            buffer.copy_(value)
        graph.replay()
        reference(*states, k_pages, v_pages, at, None, None)
        assert torch.equal(bits(k_there.cpu()[1:]), bits(k_pages[1:]))
        assert torch.equal(bits(v_there.cpu()[1:]), bits(v_pages[1:]))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    rows = paged([33, 20], 16, 3)
    assert torch.equal(from_requests(rows.to("cuda:1")).cpu(), rows.table())
    k, pages = torch.randn(3, 2, 8), torch.zeros(2, 2, 4, 2, 8, device="cuda:1")
    slots = torch.tensor([6, 1, 4])
    write(k.to("cuda:1"), k.to("cuda:1"), *pages, slots.to("cuda:1"), None, None)
    assert torch.equal(pages[0].cpu().flatten(0, 1)[slots], k)
