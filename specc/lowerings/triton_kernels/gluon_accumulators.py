"""Accumulators of ``mma.sync`` of 16 x 8 x 16, and products for which nothing has to move (Gluon).

A thread of such an accumulator has two neighbours of a row, and two rows 8 apart. Where rows lie next to each
other in memory they are renamed: four that follow each other are one thread's, which loads and stores 16
bytes at a time and has an accumulator. Which row is which matters to ``to_memory`` only.

PTX ISA, "Matrix Fragments for mma.m16n8k16".
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2


@gluon.constexpr_function
def accumulator(warps):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def operand(which, bits, warps):
    return gl.DotOperandLayout(which, accumulator(warps), 32 // bits)


@gluon.constexpr_function
def in_memory(rows, columns, warps):
    """[rows, columns], rows next to each other in memory, by the threads and registers of ``accumulator``.

    A warp has 32 rows or more.
    """
    registers = [[1, 0], [2, 0], [0, 1]]
    lanes = [[0, 2], [0, 4], [4, 0], [8, 0], [16, 0]]
    registers += [[1 << bit, 0] for bit in range(5, (rows // warps).bit_length() - 1)]
    registers += [[0, 1 << bit] for bit in range(3, columns.bit_length() - 1)]
    first = (rows // warps).bit_length() - 1
    return gl.DistributedLinearLayout(
        registers, lanes, [[1 << bit, 0] for bit in range(first, rows.bit_length() - 1)], [], [rows, columns]
    )


@gluon.jit
def to_accumulator(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Names rows as the accumulator does: nothing moves."""
    part: gl.constexpr = ROWS // WARPS // 32
    x = gl.permute(gl.reshape(x, [WARPS, part, 8, 2, 2, COLUMNS]), (1, 3, 0, 4, 2, 5))
    return gl.convert_layout(gl.reshape(x, [ROWS, COLUMNS]), accumulator(WARPS), True)


@gluon.jit
def to_memory(x, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """Back from ``to_accumulator``."""
    part: gl.constexpr = ROWS // WARPS // 32
    x = gl.permute(gl.reshape(x, [part, 2, WARPS, 2, 8, COLUMNS]), (2, 0, 4, 1, 3, 5))
    return gl.convert_layout(gl.reshape(x, [ROWS, COLUMNS]), in_memory(ROWS, COLUMNS, WARPS), True)


@gluon.jit
def _upper(y):
    """What bfloat16 holds of a float32, cut off; and the rest."""
    bits = y.to(gl.int32, bitcast=True)
    rest = y - (bits & -65536).to(gl.float32, bitcast=True)
    return (bits >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True), rest


@gluon.jit
def thirds(y, WARPS: gl.constexpr):
    """An accumulator as three first operands of bfloat16, which lose nothing."""
    layout: gl.constexpr = operand(0, 16, WARPS)
    first, rest = _upper(y)
    second, rest = _upper(rest)
    third, _ = _upper(rest)
    return (
        gl.convert_layout(first, layout, True),
        gl.convert_layout(second, layout, True),
        gl.convert_layout(third, layout, True),
    )


@gluon.jit
def add_product_of_thirds(acc, first, second, third, y):
    """``acc + x y`` of an x cut by ``thirds``, y: bfloat16."""
    acc = mma_v2(third, y, acc)
    acc = mma_v2(second, y, acc)
    return mma_v2(first, y, acc)


# Operands of 32 bits hold other columns of x, and rows of y, than an accumulator: of each 8, the even ones
# come first. The same order on both sides changes no product.


@gluon.jit
def wide_first(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """An accumulator as the first operand of a product of 32 bits: nothing moves."""
    y = gl.permute(gl.reshape(y, [ROWS, COLUMNS // 8, 4, 2]), (0, 1, 3, 2))
    return gl.convert_layout(gl.reshape(y, [ROWS, COLUMNS]), operand(0, 32, WARPS), True)


@gluon.jit
def wide_second(y, ROWS: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """The second operand that goes with ``wide_first``."""
    y = gl.permute(gl.reshape(y, [ROWS // 8, 4, 2, COLUMNS]), (0, 2, 1, 3))
    return gl.convert_layout(gl.reshape(y, [ROWS, COLUMNS]), operand(1, 32, WARPS), True)


@gluon.jit
def high(y, mask):
    """The bits of a float32 that tf32 holds, cut off by ``mask``, -8192."""
    return (y.to(gl.int32, bitcast=True) & mask).to(gl.float32, bitcast=True)


@gluon.jit
def add_wide_product(acc, x, y, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """``acc + x y^T``, x: [ROWS, 16], y: [16, 16], accumulators of float32: three products of tf32."""
    x = wide_first(x, ROWS, 16, WARPS)
    y = wide_second(gl.permute(y, (1, 0)), 16, 16, WARPS)
    x_high, y_high = high(x, -8192), high(y, -8192)
    acc = mma_v2(x - x_high, y_high, acc, input_precision="tf32")
    acc = mma_v2(x_high, y - y_high, acc, input_precision="tf32")
    return mma_v2(x_high, y_high, acc, input_precision="tf32")
