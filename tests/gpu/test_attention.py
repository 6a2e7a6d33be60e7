"""specc::unified_attention's Triton kernels on a CUDA device: errors, bits, graphs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from specc.lowerings import unified_attention
from tests.attention_cases import Case, build, expected, relative_error

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
HALF = (torch.float16, torch.bfloat16)
RAGGED = {"lens": (9000, 513, 1, 4096, 0, 64), "blocks": (8, 16, 1, 3, 0, 5)}


def run(args: Any) -> Tensor:
    assert unified_attention.choose(*args).provider.name == "triton"
    return unified_attention(*args)


def agree(case: Case) -> None:
    args = build(case, "cuda")
    out = run(args)
    assert not out.isnan().any()
    assert relative_error(out, expected(args)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("page", [1, 16, 64, 128])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_ragged_rows(group: int, page: int, dtype: torch.dtype) -> None:
    agree(Case(**RAGGED, dtype=dtype, page=page, group=group, key_dim=128, value_dim=128))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (256, 256), (192, 128)])
def test_head_dimensions(dims: tuple[int, int], dtype: torch.dtype) -> None:
    agree(Case(**RAGGED, dtype=dtype, key_dim=dims[0], value_dim=dims[1]))


@pytest.mark.parametrize("group", [2, 3, 5, 6, 12, 16])
def test_groups(group: int) -> None:
    agree(Case(**RAGGED, dtype=torch.bfloat16, group=group))


@pytest.mark.parametrize("window", [1, 100, 4096, 100_000])
def test_windows(window: int) -> None:
    agree(Case(**RAGGED, dtype=torch.float16, window=window, sinks=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_softcap_and_sinks(dtype: torch.dtype) -> None:
    agree(Case(**RAGGED, dtype=dtype, softcap=5.0, sinks=True))


@pytest.mark.parametrize("dtype", HALF)
def test_float8_pools(dtype: torch.dtype) -> None:
    agree(Case(**RAGGED, dtype=dtype, fp8=True, key_dim=128, value_dim=128))


@pytest.mark.parametrize("dtype", HALF)
def test_many_rows_and_long_blocks(dtype: torch.dtype) -> None:
    agree(Case(lens=(5000, 700) * 80, blocks=(4, 2) * 80, dtype=dtype, kv_heads=8))
    agree(Case(lens=(2048, 3000), blocks=(2048, 300), dtype=dtype, key_dim=128, value_dim=128))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 511, 512, 513, 2048, 2049])
def test_lengths_at_edges(length: int) -> None:
    agree(Case(lens=(length, length), blocks=(1, min(length, 8)), dtype=torch.bfloat16, spare_pages=0))


# Within one tile both round the same weights in the same way.
@pytest.mark.parametrize(
    ("length", "most"), [(64, 1.001), *((n, 1.0) for n in (300, 700, 2000, 9000, 32000))]
)
@pytest.mark.parametrize("dtype", HALF)
def test_error_against_flash_attention(dtype: torch.dtype, length: int, most: float) -> None:
    """Over a few inputs together: the ratio of two errors varies by half a per cent from one to the next."""
    ours, by_token, by_block = 0.0, 0.0, 0.0
    for seed in range(4):
        case = Case(lens=(length,) * 4, blocks=(16,) * 4, dtype=dtype, key_dim=128, value_dim=128, page=64)
        args = build(case, "cuda", seed)
        truth = expected(args)
        q, k_pages, v_pages, table = args[:4]
        k, v = (pool[table.long()].flatten(1, 2)[:, :length].transpose(1, 2) for pool in (k_pages, v_pages))
        queries = q.unflatten(0, (4, 16)).transpose(1, 2)
        ours += relative_error(run(args), truth) ** 2
        by_token += relative_error(flash_by_token(queries, k, v), truth) ** 2
        by_block += relative_error(flash_by_block(queries, k, v), truth) ** 2
    assert math.sqrt(ours / by_token) <= most
    assert math.sqrt(ours / by_block) <= most


def flash_by_token(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Flash attention's result [B * T, H, D], called for each token with exactly the keys that it sees."""
    unseen = range(q.shape[2] - 1, -1, -1)
    ends = [k.shape[2] - each for each in unseen]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        tokens = [
            scaled_dot_product_attention(q[:, :, j : j + 1], k[:, :, :end], v[:, :, :end], enable_gqa=True)
            for j, end in enumerate(ends)
        ]
    return torch.cat(tokens, dim=2).transpose(1, 2).flatten(0, 1)


def flash_by_block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of one call with a mask aligned to the bottom right."""
    mask = causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2).flatten(0, 1)


def test_a_pool_beyond_2_gib() -> None:
    """Pages that far apart that their offsets need 64 bits, keys and values interleaved."""
    args = list(build(Case(lens=(300, 40), blocks=(4, 2), dtype=torch.bfloat16), "cuda"))
    truth = expected(args)
    num_pages = args[1].shape[0]
    wide = torch.empty(num_pages, 100_000_000, dtype=torch.bfloat16, device="cuda")
    for which in (0, 1):
        pool = args[1 + which]
        size = pool[0].numel()
        view = wide[:, which * size : (which + 1) * size].view(pool.shape)
        view.copy_(pool)
        args[1 + which] = view
    assert (num_pages - 1) * 100_000_000 > 2**31
    assert relative_error(run(args), truth) < 6e-3


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("group", "dim"), [(4, 128), (8, 128), (7, 64), (1, 96)])
def test_bits_do_not_depend_on_company(group: int, dim: int, dtype: torch.dtype) -> None:
    lens = (9000, 513, 4096, 16, 33, 5000, 12345, 700) * 4
    case = Case(lens=lens, blocks=(16,) * 32, dtype=dtype, group=group, key_dim=dim, value_dim=dim)
    args = build(case, "cuda")
    full = run(args).view(32, 16, -1)
    many = [args[3].repeat(20, 1), torch.arange(0, 16 * 640 + 1, 16, dtype=torch.int32, device="cuda")]
    crowd = (args[0].repeat(20, 1, 1), *args[1:3], *many, args[5].repeat(20), *args[6:])
    assert torch.equal(run(crowd).view(20, 32, 16, -1), full.expand(20, -1, -1, -1))
    for row in (0, 1, 2, 4, 6):
        for first, count in ((0, 16), (0, 1), (5, 1), (15, 1), (3, 8)):
            alone = row_of(args, row, first, count)
            wide = torch.nn.functional.pad(alone[3], (0, 5000))
            for table, longest in ((alone[3], count), (wide, count), (alone[3], 16)):
                out = run((*alone[:3], table, *alone[4:6], longest, *alone[7:]))
                assert torch.equal(out.flatten(1), full[row, first : first + count]), (row, first, count)


def row_of(args: Any, row: int, first: int, count: int) -> tuple[Any, ...]:
    """The call of ``count`` tokens of one row, from its token ``first`` on, alone."""
    starts = args[4].tolist()
    q = args[0][starts[row] + first :][:count]
    length = args[5][row : row + 1] - (starts[row + 1] - starts[row]) + first + count
    one = torch.tensor([0, count], dtype=torch.int32, device=q.device)
    return (q, *args[1:3], args[3][row : row + 1], one, length, count, *args[7:])


@pytest.mark.parametrize("copies", [1, 100])
def test_a_graph_follows_lengths_and_pages(copies: int) -> None:
    case = Case(lens=(9000, 513) * copies, blocks=(4, 4) * copies, dtype=torch.bfloat16, page=16)
    args = build(case, "cuda")
    run(args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(args)
    for lens in ((9000, 513), (4000, 100), (30, 500), (2048, 512), (0, 4)):
        args[5].copy_(torch.tensor(lens * copies))
        args[3].copy_(args[3].roll(1, 0) if copies > 1 else args[3])
        clean = [each.nan_to_num(0) if index in (1, 2) else each for index, each in enumerate(args)]
        for pool, values in zip(args[1:3], clean[1:3], strict=True):
            pool.copy_(values)
        graph.replay()
        assert torch.equal(out, run(args))
        assert relative_error(out, expected(args)) < 6e-3
