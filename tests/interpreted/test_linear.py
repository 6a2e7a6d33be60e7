"""Products of few rows, in the interpreter: against float64, and the same bits whatever the tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specc.lowerings import linear, linears
from specc.lowerings.triton_kernels.linear import Tile, multiply, products, tile_of

GUARD = 7
SMALL = (Tile(16, 32, 16, 2, 4), Tile(16, 16, 32, 1, 4), Tile(32, 64, 16, 1, 4))


def inputs(rows: int, inner: int, sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(rows, inner + 3).to(dtype)[:, :inner]
    return x, [(torch.randn(size, inner) / inner**0.5).to(dtype) for size in sizes]


def exact(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = x.double() @ weight.double().t()
    return product if bias is None else product + bias.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "sizes"),
    [
        (1, 256, (64,)),
        (6, 200, (96, 33, 1)),
        (20, 37, (65, 64, 5, 130)),
        (70, 128, (70, 1)),
        (130, 64, (129,)),
        (3, 1, (2,)),
    ],
)
def test_against_float64(
    rows: int, inner: int, sizes: tuple[int, ...], biased: bool, dtype: torch.dtype
) -> None:
    x, weights = inputs(rows, inner, sizes, dtype)
    biases = [torch.randn(size).to(dtype) for size in sizes] if biased else None
    results = products(x, weights, biases)
    for result, weight, bias in zip(results, weights, biases or [None] * len(sizes), strict=True):
        expected = exact(x, weight, bias)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected.to(dtype).double(), rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("tile", SMALL)
def test_nothing_is_written_outside(tile: Tile) -> None:
    x, weights = inputs(19, 40, (33, 5, 16), torch.bfloat16)
    whole = [torch.full((19 * len(weight) + 2 * GUARD,), 77.0).bfloat16() for weight in weights]
    outs = [each[GUARD:-GUARD].view(19, -1) for each in whole]
    multiply(outs, x, weights, None, tile)
    for each, out, weight in zip(whole, outs, weights, strict=True):
        torch.testing.assert_close(out.double(), exact(x, weight, None), rtol=2**-7, atol=2**-9)
        assert bool((torch.cat([each[:GUARD], each[-GUARD:]]) == 77).all())


def test_rows_of_nan_do_not_leak() -> None:
    x, weights = inputs(20, 40, (33,), torch.bfloat16)
    (expected,) = products(x, weights, None)
    x[1::2] = float("nan")
    (result,) = products(x, weights, None)
    assert torch.equal(result[::2], expected[::2])
    assert bool(result[1::2].isnan().all())


def test_no_rows_no_inputs_no_outputs() -> None:
    (none,) = products(torch.empty(0, 8).half(), [torch.empty(4, 8).half()], None)
    assert none.shape == (0, 4)
    (zeros,) = products(torch.empty(2, 0).half(), [torch.empty(4, 0).half()], None)
    assert zeros.tolist() == [[0] * 4] * 2
    empty, one = products(
        torch.ones(1, 16).half(), [torch.empty(0, 16).half(), torch.ones(1, 16).half()], None
    )
    assert (empty.shape, one.tolist()) == ((1, 0), [[16]])


@pytest.mark.parametrize("op", [linear, linears])
def test_providers_hand_over_what_the_reference_takes(op: object) -> None:
    x, (weight,) = inputs(3, 24, (10,), torch.bfloat16)
    bias = torch.randn(10).bfloat16()
    for given in (None, bias):
        if op is linear:
            (provider,) = (each for each in linear.providers if each.name == "triton")
            result = provider.run(x, weight, given)
        else:
            (provider,) = (each for each in linears.providers if each.name == "triton")
            (result,) = provider.run(x, [weight], [given])
        expected = exact(x, weight, given)
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("rows", "sizes", "tile"),
    [
        (6, [4096], Tile(64, 128, 16, 8, 4)),
        (6, [8192, 4096, 32, 32], Tile(64, 128, 16, 4, 4)),
        (6, [12288, 12288], Tile(64, 128, 16, 3, 4)),
        (64, [4096], Tile(64, 128, 32, 6, 4)),
        (128, [4096], Tile(64, 128, 64, 5, 4)),
        (128, [14336, 14336], Tile(128, 64, 128, 5, 8)),
    ],
)
def test_tiles_that_were_measured(rows: int, sizes: list[int], tile: Tile) -> None:
    """With an H200's 132 multiprocessors, which is also what is assumed where there is no device."""
    assert tile_of(torch.empty(rows, 4096).bfloat16(), sizes) == tile
