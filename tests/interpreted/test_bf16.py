"""bfloat16 in the interpreter, once repaired, is what torch makes of it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.interpreted import bf16

SIZE = 64
NAN, INF = float("nan"), float("inf")
EDGES = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 1e-40, 0.0, -0.0, NAN, INF, -INF, 65504.0, 0.1]


@triton.jit
def _elementwise(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(out + at, x + y)
    tl.store(out + SIZE + at, x - y * 1.7)
    tl.store(out + 2 * SIZE + at, x / y)
    tl.store(out + 3 * SIZE + at, -x)
    tl.store(out + 4 * SIZE + at, tl.where(x < y, x, y))
    tl.store(out + 5 * SIZE + at, tl.maximum(x, y))
    tl.store(out + 6 * SIZE + at, tl.abs(x))
    tl.store(out + 7 * SIZE + at, tl.where((x >= y) & (x != 1), 1.0, 0.0).to(tl.bfloat16))


def elementwise(a: Tensor, b: Tensor) -> Tensor:
    out = a.new_empty(8, SIZE)
    _elementwise[(1,)](a, b, out, SIZE=SIZE)
    return out


def elementwise_by_torch(a: Tensor, b: Tensor) -> Tensor:
    # Triton, unlike torch, makes a bfloat16 of the constant.
    scaled = b * torch.tensor(1.7, dtype=torch.bfloat16)
    least = torch.where(a < b, a, b)
    tests = ((a >= b) & (a != 1)).to(a.dtype)
    return torch.stack([a + b, a - scaled, a / b, -a, least, a.maximum(b), a.abs(), tests])


@triton.jit
def _casts(values, out, back, ints, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(values + at)
    tl.store(out + at, x)
    tl.store(out + SIZE + at, x.to(tl.float16).to(tl.bfloat16))
    tl.store(out + 2 * SIZE + at, x.to(tl.bfloat16, fp_downcast_rounding="rtne"))
    tl.store(out + 3 * SIZE + at, tl.load(ints + at).to(tl.bfloat16))
    tl.store(back + at, tl.load(ints + at).to(tl.bfloat16).to(tl.int32))


def casts(values: Tensor, ints: Tensor) -> tuple[Tensor, Tensor]:
    out = values.new_empty(4, SIZE, dtype=torch.bfloat16)
    back = torch.empty_like(ints)
    _casts[(1,)](values, out, back, ints, SIZE=SIZE)
    return out, back


@triton.jit
def _larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def _reductions(a, out, where, scans, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(a + at)
    tl.store(out + row, tl.sum(x, 1))
    tl.store(out + ROWS + row, tl.max(x, 1))
    tl.store(out + 2 * ROWS + row, tl.min(x, 1))
    tl.store(out + 3 * ROWS + row, tl.reduce(x, 1, _larger))
    tl.store(where + row, tl.argmax(x, 1))
    tl.store(scans + at, tl.cumsum(x, 1))
    tl.store(scans + ROWS * COLUMNS + at, tl.associative_scan(x, 1, _larger))


@triton.jit
def _dot(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    at = at[:, None] * SIZE + at[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def dot(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty(32, 32)
    _dot[(1,)](a, b, out, SIZE=32)
    return out


def random(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def same(ours: Tensor, theirs: Tensor) -> bool:
    """Equal, with NaN equal to NaN and -0 unlike 0."""
    number = ~theirs.isnan()
    bits = (each.float()[number].view(torch.int32) for each in (ours, theirs))
    return bool((ours.isnan() != number).all()) and torch.equal(*bits)


def test_elementwise() -> None:
    a, b = random(SIZE), random(SIZE)
    a[:3], b[:4] = 1.0, b[7]
    assert same(elementwise(a, b), elementwise_by_torch(a, b))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_casts() -> None:
    values = torch.cat([torch.tensor(EDGES), torch.randn(SIZE - len(EDGES)) * 100])
    ints = torch.randint(-(2**20), 2**20, (SIZE,), dtype=torch.int32)
    out, back = casts(values, ints)
    whole = ints.bfloat16()
    assert same(out, torch.stack([values.bfloat16(), values.half().bfloat16(), values.bfloat16(), whole]))
    assert torch.equal(back, whole.int())


def test_reductions_and_scans() -> None:
    x = random(8, 32)
    out, where = x.new_empty(4, 8), torch.empty(8, dtype=torch.int32)
    scans = x.new_empty(2, 8, 32)
    _reductions[(1,)](x, out, where, scans, ROWS=8, COLUMNS=32)
    largest, wide = x.max(1), x.float()
    torch.testing.assert_close(out[0], wide.sum(1).bfloat16(), rtol=2**-7, atol=0)
    assert torch.equal(out[1:], torch.stack([largest.values, x.min(1).values, largest.values]))
    assert torch.equal(where.long(), largest.indices)
    torch.testing.assert_close(scans[0], wide.cumsum(1).bfloat16(), rtol=2**-7, atol=2**-7)
    assert torch.equal(scans[1], x.cummax(1).values)


def test_dot() -> None:
    a, b = random(32, 32), random(32, 32)
    torch.testing.assert_close(dot(a, b), a.float() @ b.float())


def test_the_repair_is_still_needed() -> None:
    """When this fails, Triton has mended its interpreter: drop ``bf16.py``."""
    a, b = random(32, 32), random(32, 32)
    with bf16.unrepaired():
        assert not torch.allclose(dot(a, b), a.float() @ b.float())
    torch.testing.assert_close(dot(a, b), a.float() @ b.float())
