"""What the kernels of Mamba2's recurrence over a few tokens share.

A program takes a stretch of one head's P and all of N, and goes through the records behind the checkpoint and
the block, token by token. Every token is the same sums in the same order wherever its block starts: its bits
do not depend on the blocks. The state is read once for a block and written once in ``flush_every`` tokens.

How long a block is and how many records there are is not specialized: nothing is compiled anew for them.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from specc.lowerings.devices import device_kind

# A program's share of P, and how far records are read ahead.
BLOCK_P, HIP_BLOCK_P = 32, 16
AHEAD: tl.constexpr = tl.constexpr(4)
# Bits may not depend on what the compiler joins.
OPTIONS = {"enable_fp_fusion": False, "num_warps": 4}


@triton.jit
def _softplus(x):
    """log(1 + e^x), right to float32 where e^x is small, too."""
    u = tl.exp(-tl.abs(x))
    # log(1 + u) = 2 artanh(u / (2 + u)), and z is at most 1/3.
    z = u / (2.0 + u)
    s = z * z
    series = tl.fma(s, 1.0 / 15, 1.0 / 13)
    series = tl.fma(s, series, 1.0 / 11)
    series = tl.fma(s, series, 1.0 / 9)
    series = tl.fma(s, series, 1.0 / 7)
    series = tl.fma(s, series, 1.0 / 5)
    series = tl.fma(s, series, 1.0 / 3)
    return tl.maximum(x, 0.0) + 2.0 * tl.fma(z * s, series, z)


@triton.jit
def step_sizes(raw, dt_bias, head, dt_min, dt_max, SOFTPLUS: tl.constexpr):
    steps = raw.to(tl.float32)
    if dt_bias is not None:
        steps += tl.load(dt_bias + head).to(tl.float32)
    if SOFTPLUS:
        steps = _softplus(steps)
    return tl.minimum(tl.maximum(steps, dt_min), dt_max)


@triton.jit
def slot_of(slots, row, pool_rows):
    """The pool row, or -1."""
    slot = row
    if slots is not None:
        slot = tl.load(slots + row).to(tl.int64)
    return tl.minimum(slot, pool_rows - 1)


@triton.jit
def inside(index, LIMIT: tl.constexpr, LENGTH: tl.constexpr):
    """``index < LIMIT``, a constant where all of a length is: masks are registers."""
    if LIMIT % LENGTH == 0:
        return tl.zeros_like(index) == 0
    return index < LIMIT


@triton.jit
def advance(state, x, b, steps, rate):
    """The state [P, N] after the record x [P], b [N]."""
    added = x.to(tl.float32) * steps
    return tl.fma(added[:, None], b.to(tl.float32)[None, :], state * tl.exp(rate * steps))


@triton.jit
def output(state, x, c, d, head):
    """One token's y [P] from the state behind it; c [N]."""
    y = tl.sum(state * c.to(tl.float32)[None, :], 1)
    if d is not None:
        y = tl.fma(x.to(tl.float32), tl.load(d + head).to(tl.float32), y)
    return y


@triton.jit
def place(BLOCK_P: tl.constexpr):
    """Row, head and p of this program."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    return tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), p


def contiguous(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def tiles_of(dim: int, size: int, hip: bool) -> dict[str, int]:
    """How a launch cuts P; of N a program takes all."""
    block_p = min(HIP_BLOCK_P if hip else BLOCK_P, triton.next_power_of_2(dim))
    return {"P": dim, "N": size, "BLOCK_P": block_p, "BLOCK_N": triton.next_power_of_2(size)}


def is_hip(x: Tensor) -> bool:
    return device_kind(x.device) == "hip"
