"""A few rows times up to four weights of the same inner length, in one launch, with sums of a fixed order.

A weight's rows take the matrix unit's long side and the tokens its short one: a tile is full of weights
even where there is one token, and each weight is read once for all the tokens that one tile holds.

One program sums all of a result, in one accumulator and in ascending order of the inputs. So a token's bits
depend on its own inputs and the weight: not on the number of tokens, nor on what else is in the launch. Tiles
may differ with both, because they decide only which program does the sum.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.linear import MOST

# Bytes of an address, and entries of a length, that make for wide loads and stores.
ALIGNMENT = 16
# Of a weight's and of a token's entry.
BYTES = 2
# Which of a CDNA GPU's matrix instructions is taken would otherwise depend on the tile, and its sums with it.
# On Hopper the tile decides how many tokens an instruction takes, never how many inputs.
ONE_INSTRUCTION = {} if torch.version.hip is None else {"matrix_instr_nonkdim": 16}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of the weight, inputs and tokens that a program takes at a time, and how it is compiled."""

    outputs: int
    inner: int
    tokens: int
    stages: int
    warps: int


@triton.jit
def _pointer(address, like, ALIGNED: tl.constexpr):
    pointer = address.to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["rows", "token_tiles", "outputs0", "outputs1", "outputs2", "outputs3"])
def _products(
    x,
    weight0,
    weight1,
    weight2,
    weight3,
    bias0,
    bias1,
    bias2,
    bias3,
    out0,
    out1,
    out2,
    out3,
    rows,
    inner,
    x_stride,
    token_tiles,
    outputs0,
    outputs1,
    outputs2,
    outputs3,
    OUTPUTS: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # Programs of the same weights follow each other, so that all but the first find them in the L2 cache.
    tile = tl.program_id(0) // token_tiles
    token = tl.program_id(0) % token_tiles * TOKENS + tl.arange(0, TOKENS)
    weight, bias, out, outputs = weight0, bias0, out0, outputs0
    if weight1 is not None:
        # As integers: where a branch decides between pointers, the compiler for HIP gives up.
        weight, out = weight0.to(tl.int64), out0.to(tl.int64)
        if bias0 is not None:
            bias = bias0.to(tl.int64)
        tiles = tl.cdiv(outputs0, OUTPUTS)
        if tile >= tiles:
            weight, out = weight1.to(tl.int64), out1.to(tl.int64)
            outputs, tile = outputs1, tile - tiles
            if bias0 is not None:
                bias = bias1.to(tl.int64)
            if weight2 is not None:
                tiles = tl.cdiv(outputs1, OUTPUTS)
                if tile >= tiles:
                    weight, out = weight2.to(tl.int64), out2.to(tl.int64)
                    outputs, tile = outputs2, tile - tiles
                    if bias0 is not None:
                        bias = bias2.to(tl.int64)
                    if weight3 is not None:
                        tiles = tl.cdiv(outputs2, OUTPUTS)
                        if tile >= tiles:
                            weight, out = weight3.to(tl.int64), out3.to(tl.int64)
                            outputs, tile = outputs3, tile - tiles
                            if bias0 is not None:
                                bias = bias3.to(tl.int64)
        weight = _pointer(weight, x, ALIGNED)
        out = _pointer(out, out0, ALIGNED)
        if bias0 is not None:
            bias = _pointer(bias, x, ALIGNED)
    if EVEN:
        outputs = tl.multiple_of(outputs, 16)
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    k = tl.arange(0, INNER)
    # Rows past the last repeat it: their results are not stored.
    row = tl.minimum(output, outputs - 1).to(tl.int64)
    weights = weight + row[:, None] * inner + k[None, :]
    inputs = x + token.to(tl.int64)[None, :] * x_stride + k[:, None]
    is_token = token[None, :] < rows
    total = tl.zeros([OUTPUTS, TOKENS], tl.float32)
    for at in tl.range(0, inner, INNER, num_stages=STAGES):
        if WHOLE:
            w = tl.load(weights + at)
            t = tl.load(inputs + at, mask=is_token, other=0.0)
        else:
            live = at + k < inner
            w = tl.load(weights + at, mask=live[None, :], other=0.0)
            t = tl.load(inputs + at, mask=is_token & live[:, None], other=0.0)
        total = tl.dot(w, t, total)
    if bias0 is not None:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    results = out + token.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(results, total.to(out.dtype.element_ty), mask=(output[:, None] < outputs) & is_token)


# Outputs and tokens of a tile -> its step along the inputs, stages and warps, for 1, 2 and 3 programs that
# share a multiprocessor. Chosen by measurement on an H200 (benchmarks/NOTES.md).
SHARED: dict[tuple[int, int], tuple[tuple[int, int, int], ...]] = {
    (64, 16): ((128, 8, 4), (128, 4, 4), (128, 3, 4)),
    (64, 32): ((128, 6, 4), (128, 4, 4), (128, 3, 4)),
    (64, 64): ((128, 5, 4), (128, 3, 4), (64, 4, 4)),
    (64, 128): ((128, 4, 4),),
    (128, 128): ((64, 5, 8),),
}
# Most rows of x -> tiles for them, the largest first.
TILES = {
    16: ((64, 16),),
    32: ((64, 32),),
    64: ((64, 64), (64, 32)),
    None: ((128, 128), (64, 128), (64, 64)),
}
# For rows that lie so that they are read entry by entry, through registers.
SCATTERED = Tile(64, 64, 64, 4, 4)
# The share of multiprocessors that a launch of large tiles has to keep busy.
BUSY = 0.6


def tile_of(x: Tensor, sizes: list[int]) -> Tile:
    """The tile for a product of ``x`` and weights of ``sizes`` rows."""
    rows, inner = x.shape
    processors, shared = _limits(x.device)
    if torch.version.hip is not None:
        return _within(shared, Tile(32, 128, min(max(triton.next_power_of_2(rows), 16), 64), 2, 4))
    if inner % ALIGNMENT or _stride(x) % ALIGNMENT:
        return _within(shared, SCATTERED)
    shapes = next(shapes for most, shapes in TILES.items() if most is None or rows <= most)
    enough = (shape for shape in shapes if _programs(rows, sizes, *shape) >= BUSY * processors)
    outputs, tokens = shape = next(enough, shapes[-1])
    programs = _programs(rows, sizes, *shape)
    waves = [triton.cdiv(programs, processors * n) * n for n in range(1, len(SHARED[shape]) + 1)]
    # The fewest places left empty by the last wave; among equals, the most programs at a time.
    step, stages, warps = SHARED[shape][max(n for n, places in enumerate(waves) if places == min(waves))]
    return _within(shared, Tile(outputs, step, tokens, stages, warps))


def _within(shared: int, tile: Tile) -> Tile:
    """With as many stages as fit into ``shared`` bytes."""
    stage = (tile.outputs + tile.tokens) * tile.inner * BYTES
    return dataclasses.replace(tile, stages=min(tile.stages, max(shared // stage, 1)))


def _stride(x: Tensor) -> int:
    """Of rows. That of a single one says nothing."""
    return x.stride(0) if len(x) > 1 else x.shape[1]


def _programs(rows: int, sizes: list[int], outputs: int, tokens: int) -> int:
    return triton.cdiv(rows, tokens) * sum(triton.cdiv(size, outputs) for size in sizes)


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 132, 232448
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


def products(x: Tensor, weights: list[Tensor], biases: list[Tensor] | None) -> list[Tensor]:
    """``x @ weight.T (+ bias)`` of each weight. x: [M, K], rows of any stride; weights: contiguous [N, K]."""
    outs = [x.new_empty(len(x), len(weight)) for weight in weights]
    multiply(outs, x, weights, biases, tile_of(x, [len(weight) for weight in weights]))
    return outs


def multiply(
    outs: list[Tensor], x: Tensor, weights: list[Tensor], biases: list[Tensor] | None, tile: Tile
) -> None:
    """The same into ``outs``, contiguous [M, N] each."""
    rows, inner = x.shape
    sizes = [len(weight) for weight in weights]
    programs = _programs(rows, sizes, tile.outputs, tile.tokens)
    if not programs:
        return
    absent: list[None] = [None] * (MOST - len(weights))
    _products[(programs,)](
        x,
        *weights,
        *absent,
        *(biases or (None for _ in weights)),
        *absent,
        *outs,
        *absent,
        rows,
        inner,
        _stride(x),
        triton.cdiv(rows, tile.tokens),
        *sizes,
        *[0 for _ in absent],
        OUTPUTS=tile.outputs,
        INNER=tile.inner,
        TOKENS=tile.tokens,
        STAGES=tile.stages,
        WHOLE=inner % tile.inner == 0,
        EVEN=all(size % ALIGNMENT == 0 for size in sizes),
        ALIGNED=all(each.data_ptr() % ALIGNMENT == 0 for each in (*weights, *outs, *(biases or ()))),
        num_warps=tile.warps,
        **ONE_INSTRUCTION,
    )
