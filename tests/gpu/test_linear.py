"""Products of few rows on a CUDA device: their bits depend on a row and the weight, on nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from specc.lowerings import REGISTRY
from specc.lowerings.linear import HALVES
from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

BF16 = torch.bfloat16
ROWS = (1, 2, 3, 6, 8, 12, 24, 32, 48, 64, 96, 128, 200, 300)
# [N, K]: projections of 8B models, a router, tails everywhere, and a length that is no multiple of 16 bytes.
SHAPES = [
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (4096, 12288),
    (32, 4096),
    (200, 1000),
    (77, 515),
]


def rows_of(count: int, inner: int, dtype: torch.dtype = BF16) -> Tensor:
    """Standard normal with magnitudes over 16 binades, so that the order of sums shows."""
    scale = torch.exp2(torch.randint(-8, 8, (count, inner), device="cuda").float())
    return (torch.randn(count, inner, device="cuda") * scale).to(dtype)


def weight_of(outputs: int, inner: int, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(outputs, inner, device="cuda") / inner**0.5).to(dtype)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.specc.linear.triton(x, weight, bias)


@pytest.mark.parametrize("name", ["linear", "linears"])
def test_the_kernel_is_chosen_and_is_an_operator(name: str) -> None:
    call = REGISTRY[name].sample("cuda")
    assert REGISTRY[name].choose(*call).provider.name == "triton"
    torch.library.opcheck(REGISTRY[name].overload, call)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("outputs", "inner"), SHAPES)
def test_a_row_has_the_same_bits_whatever_is_beside_it(outputs: int, inner: int, dtype: torch.dtype) -> None:
    x, weight = rows_of(max(ROWS), inner, dtype), weight_of(outputs, inner, dtype)
    expected = multiply(x, weight)
    assert not bool(expected.isnan().any())
    for count in ROWS:
        assert torch.equal(multiply(x[:count], weight), expected[:count]), count
    order = torch.randperm(len(x), device="cuda")
    assert torch.equal(multiply(x[order], weight), expected[order])
    others = x.clone()
    others[1::2] = float("nan")
    assert torch.equal(multiply(others[:24], weight)[::2], expected[:24:2])
    strided = torch.empty(len(x), inner + 8, device="cuda", dtype=dtype)[:, :inner].copy_(x)
    assert torch.equal(multiply(strided, weight), expected)
    assert torch.equal(multiply(x, weight), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "sizes", [(4096, 1024, 1024), (14336, 14336), (8192, 4096, 32, 32), (200, 77, 1, 64)]
)
def test_a_weight_gives_the_same_bits_alone_and_with_others(sizes: tuple[int, ...], biased: bool) -> None:
    x, weights = rows_of(200, 4096), [weight_of(size, 4096) for size in sizes]
    biases = [torch.randn(size, device="cuda").to(BF16) if biased else None for size in sizes]
    alone = [multiply(x, *each) for each in zip(weights, biases, strict=True)]
    for count in (1, 6, 32, 48, 64, 128, 200):
        together = torch.ops.specc.linears.triton(x[:count], weights, biases)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one, other[:count]), count


def test_every_tile_sums_alike() -> None:
    """What the bits rest on: the tile decides who does a sum, not how. In float32, where all of it shows."""
    from specc.lowerings.triton_kernels.linear import SHARED, Tile
    from specc.lowerings.triton_kernels.linear import multiply as into

    settings = [(shape, *each) for shape, shared in SHARED.items() for each in shared]
    tiles = {
        Tile(outputs, inner, tokens, stages, warps) for (outputs, tokens), inner, stages, warps in settings
    }
    for outputs, inner in ((1024, 14336), (4096, 4096)):
        x, weight = rows_of(200, inner), weight_of(outputs, inner)
        outs = [torch.full((200, outputs), float("nan"), device="cuda") for _ in tiles]
        for out, tile in zip(outs, tiles, strict=True):
            into([out], x, [weight], None, tile)
        assert not bool(outs[0].isnan().any())
        assert all(torch.equal(one, other) for one, other in itertools.pairwise(outs))


@pytest.mark.parametrize(("outputs", "inner"), SHAPES)
def test_as_exact_as_cublas(outputs: int, inner: int) -> None:
    x, weight = torch.randn(64, inner, device="cuda").to(BF16), weight_of(outputs, inner)
    exact = x.double() @ weight.double().t()
    ours, cublas = ((y.double() - exact).norm() / exact.norm() for y in (multiply(x, weight), x @ weight.t()))
    assert ours < 1.01 * cublas + 1e-5


def test_two_graphs_on_two_streams_at_once() -> None:
    weights = [weight_of(size, 4096) for size in (4096, 1024, 1024)]
    inputs = [rows_of(6, 4096) for _ in range(2)]
    expected = [torch.ops.specc.linears.triton(x, weights, [None] * 3) for x in inputs]
    torch.cuda.synchronize()
    graphs, results = [torch.cuda.CUDAGraph() for _ in inputs], []
    for graph, x in zip(graphs, inputs, strict=True):
        with torch.cuda.graph(graph):
            results.append([torch.ops.specc.linears.triton(x, weights, [None] * 3) for _ in range(20)])
    for _ in range(20):
        for graph in graphs:
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.replay()
    torch.cuda.synchronize()
    for result, reference in zip(results, expected, strict=True):
        assert all(torch.equal(y, z) for ys in result for y, z in zip(ys, reference, strict=True))


def test_a_weight_beyond_two_gib() -> None:
    weight = torch.zeros(2**31 // 4096 + 70, 4096, device="cuda", dtype=BF16)
    weight[-70:] = weight_of(70, 4096)
    x = rows_of(3, 4096)
    assert torch.equal(multiply(x, weight)[:, -70:], multiply(x, weight[-70:]))
