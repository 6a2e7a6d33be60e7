"""specc::unified_attention's Triton kernels against the reference, interpreted: every feature, small."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings.triton_kernels import attention
from tests.attention_cases import Case, build, expected, relative_error

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Units of work small enough that short rows have many."""
    monkeypatch.setattr(attention, "CHUNK", 64)
    monkeypatch.setattr(attention, "SECTION", 256)
    return


MODES = {"walk": (1, 1), "sections": (1, 40), "pairs": (4, 40), "chunks": (40, 40)}


def set_mode(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    busy, launched = MODES[mode]
    monkeypatch.setattr(attention, "BUSY", busy)
    monkeypatch.setattr(attention, "LAUNCHED", launched)


def run(args: tuple[Any, ...]) -> Tensor:
    return attention.paged_attention(*args)


def agree(case: Case) -> Tensor:
    args = build(case)
    out = run(args)
    assert out.dtype == case.dtype
    assert out.shape == (args[0].shape[0], args[0].shape[1], case.value_dim)
    assert not out.isnan().any()
    assert relative_error(out, expected(args)) < TOLERANCE[case.dtype]
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ragged_rows(mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode(monkeypatch, mode)
    agree(Case(lens=(700, 37, 1, 0, 256), blocks=(2, 5, 1, 0, 3), dtype=dtype, group=2, kv_heads=1))


@pytest.mark.parametrize("page", [1, 16, 64, 128])
@pytest.mark.parametrize("group", [1, 3, 7, 16])
def test_pages_and_groups(page: int, group: int) -> None:
    agree(Case(lens=(130, 64), blocks=(5, 16), page=page, group=group, kv_heads=1))


@pytest.mark.parametrize("dims", [(80, 80), (96, 96), (128, 128), (256, 256), (192, 128), (8, 24)])
def test_head_dimensions(dims: tuple[int, int]) -> None:
    agree(Case(lens=(70, 33), blocks=(2, 1), key_dim=dims[0], value_dim=dims[1], kv_heads=1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("window", [1, 5, 64, 300, 100_000])
def test_windows(window: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode(monkeypatch, mode)
    agree(Case(lens=(660, 64, 3), blocks=(6, 2, 3), window=window, sinks=True, kv_heads=1))


def test_a_window_hides_what_lies_before_it() -> None:
    case = Case(lens=(400,), blocks=(3,), window=50, kv_heads=1, page=1)
    args = build(case)
    truth = expected(args)
    for pool in args[1:3]:
        pool[args[3][0, : 400 - 3 - 50 + 1].long()] = float("nan")
    assert relative_error(run(args), truth) < 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_softcap_and_sinks(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_mode(monkeypatch, mode)
    agree(Case(lens=(400, 20), blocks=(2, 4), softcap=3.0, sinks=True, group=2))
    agree(Case(lens=(400, 20), blocks=(2, 4), sinks=True, group=2))


def test_long_blocks() -> None:
    agree(Case(lens=(300, 90), blocks=(200, 17), kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float8_pools(dtype: torch.dtype) -> None:
    agree(Case(lens=(100, 30), blocks=(3, 2), dtype=dtype, fp8=True, window=60))


def test_the_largest_weight_of_a_tile_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key counts in each of a chunk's tiles: what remains is the rounding of the result."""
    monkeypatch.setattr(attention, "CHUNK", 512)
    monkeypatch.setattr(attention, "SECTION", 512)
    args = build(Case(lens=(512,), blocks=(8,), dtype=torch.bfloat16, kv_heads=1, page=64))
    q, keys = args[0].zero_(), args[1]
    q[..., 0] = 8.0
    keys[..., 0] = -60.0
    keys[:, 17, :, 0] = torch.rand(keys.shape[0], 1).to(torch.bfloat16)
    out, truth = run(args), expected(args)
    assert relative_error(out, truth) < 1.02 * relative_error(truth.to(torch.bfloat16), truth)


def test_lengths_beyond_the_table_are_clamped_and_positions_are_not() -> None:
    args = list(build(Case(lens=(64, 64), blocks=(3, 2), spare_pages=0)))
    args[5] = torch.tensor([70, 10_000])
    assert relative_error(run(tuple(args)), expected(args)) < 2e-6
    args[8] = 10
    out = run(tuple(args))
    assert relative_error(out, expected(args)) < 2e-6
    assert not out[3:].any()


def test_tokens_at_negative_positions_give_zero() -> None:
    args = list(build(Case(lens=(5, 40), blocks=(8, 2), sinks=True)))
    out = run(tuple(args))
    assert not out[:3].any()
    assert relative_error(out, expected(args)) < 2e-6
    args[5] = torch.tensor([-7, 0])
    assert not run(tuple(args)).any()


def test_stray_pages_and_tokens() -> None:
    args = list(build(Case(lens=(40, 20), blocks=(3, 2), spare_pages=4)))
    truth = expected(args)
    args[3][:, 3:] = torch.tensor([2**31 - 1, -5, 7000, -(2**31)])[: args[3].shape[1] - 3]
    assert relative_error(run(tuple(args)), truth) < 2e-6
    args[0] = torch.cat([args[0], torch.full_like(args[0], float("nan"))])
    out = run(tuple(args))
    assert relative_error(out[:5], truth) < 2e-6
    assert not out[5:].any()


def test_nothing_to_do() -> None:
    args = list(build(Case(lens=(40, 20), blocks=(0, 0))))
    assert run(tuple(args)).shape == (0, 8, 64)
    args = list(build(Case(lens=(0,), blocks=(2,))))
    assert not run(tuple(args)).any()


def test_any_outer_strides() -> None:
    args = list(build(Case(lens=(90, 40), blocks=(2, 3))))
    truth = expected(args)
    args[1] = args[1].permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    args[2] = torch.cat([args[2], args[2]], dim=3)[..., :64]
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[3] = torch.cat([args[3], args[3]], dim=1)[:, : args[3].shape[1]]
    assert relative_error(run(tuple(args)), truth) < 2e-6


def row_of(args: tuple[Any, ...], row: int, first: int, count: int) -> tuple[Any, ...]:
    """The call of ``count`` tokens of one row, from its token ``first`` on, alone."""
    starts = args[4]
    q = args[0][starts[row] + first :][:count]
    length = args[5][row : row + 1] - (starts[row + 1] - starts[row]) + first + count
    one = torch.tensor([0, count], dtype=torch.int32)
    return (q, *args[1:3], args[3][row : row + 1], one, length, count, *args[7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_company(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lens=(660, 150, 45), blocks=(16, 16, 16), dtype=dtype, kv_heads=1, group=2, sinks=True)
    args = build(case)
    set_mode(monkeypatch, "walk")
    full = run(args).view(3, 16, 2, 64)
    for mode in MODES:
        set_mode(monkeypatch, mode)
        assert torch.equal(run(args).view(3, 16, 2, 64), full), mode
        for row, first, count in ((0, 0, 16), (0, 0, 1), (1, 0, 7), (2, 0, 3)):
            # Only of a block's first tokens: a product's rows differ in bits in NumPy, by their place.
            alone = row_of(args, row, first, count)
            wide = torch.nn.functional.pad(alone[3], (0, 50))
            out = run((*alone[:3], wide, *alone[4:]))
            assert torch.equal(out, full[row, first : first + count]), (mode, row, first)


@pytest.mark.parametrize("programs", [(1, 1), (4, 2), (500, 8)])
def test_the_plan_bounds_the_scratch(programs: tuple[int, int]) -> None:
    rows, kv_heads = programs
    for capacity in (1, 512, 40_000, 2**20):
        answers = rows * kv_heads * 64
        work = attention.plan(rows, kv_heads, 1, capacity, 132, answers, 128)
        if work.slots > 1:
            assert 4 * answers * work.slots * 130 <= attention.SCRATCH_LIMIT
        assert 1 <= work.splits <= work.slots


def test_configurations_know_nothing_of_a_short_blocks_length() -> None:
    for group in (1, 2, 3, 4, 7, 8, 16, 64):
        tiles = attention.tiles_for("cuda", torch.bfloat16, 128, group, short=True)
        assert tiles.rows >= group
        assert tiles == dataclasses.replace(attention.TILES["cuda", "half", 128, True], rows=tiles.rows)
