"""The Gated DeltaNet kernels in the interpreter, against the recurrence in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import fold_gated_delta_rule as folding
from specc.lowerings.triton_kernels import gated_delta_rule as kernels
from tests.lowerings.gated_delta_calls import (
    Batch,
    Row,
    Shape,
    assert_close,
    assert_pool,
    expected_replay,
    make_batch,
    make_block,
    replayed,
    step,
    tolerance,
)

ROWS = [Row(3, 9, 2), Row(padding=True), Row(1000, 5), Row(padding=True)]
SLOTS = [4, 1, 0, 3]


def replay(batch: Batch, block: tuple[Tensor, ...], exact: bool) -> Tensor:
    rings = batch.pool.tensors()[1:]
    lens = batch.pool.base, batch.seq_lens, batch.final_lens, batch.slots
    shape = batch.shape
    return kernels.replay(
        block, batch.pool.state, rings, lens, shape.scale, shape.l2norm, shape.flush_every, exact
    )


SHAPES: dict[str, tuple[Shape, int]] = {
    "a block within a segment": (Shape(flush_every=16, dtype=torch.bfloat16), 3),
    "a block across boundaries": (Shape(key_dim=32, value_dim=48), 7),
    "a long block": (Shape(key_heads=1, key_dim=32, value_dim=32, dtype=torch.float16), 16),
    "rounded states": (Shape(key_dim=80, pool_dtype=torch.bfloat16, dtype=torch.bfloat16), 5),
    "every token stored": (Shape(key_heads=1, key_dim=32, value_dim=32, flush_every=1), 2),
    "one token": (Shape(flush_every=16, ring_size=24, dtype=torch.bfloat16), 1),
    "one token, padded tiles": (Shape(key_dim=80, value_dim=48, ring_size=24, l2norm=False), 1),
    "one token, a long ring": (Shape(key_heads=1, key_dim=32, value_dim=32, flush_every=16), 1),
    "no norms": (Shape(group=3, key_heads=1, key_dim=32, value_dim=32, l2norm=False), 4),
}


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_replay(name: str, exact: bool) -> None:
    shape, tokens = SHAPES[name]
    batch, block = make_batch(shape, ROWS, SLOTS), make_block(shape, len(ROWS), tokens)
    expected, pool = expected_replay(batch, block)
    out = replay(batch, block, exact)
    assert out.dtype == shape.dtype
    assert_close(out, expected, tolerance(shape, exact))
    assert_pool(batch.pool, pool, shape, exact)


@pytest.mark.parametrize("exact", [False, True])
def test_strides(exact: bool) -> None:
    """q, k and v of one projection, a pool whose rows lie apart, rings with the heads first."""
    shape = Shape(key_dim=32, value_dim=32)
    batch = make_batch(shape, ROWS, SLOTS)
    q, k, v, g, beta = make_block(shape, len(ROWS), 3)
    expected, pool = expected_replay(batch, (q, k, v, g, beta))
    fused = torch.cat([each.flatten(2) for each in (q, k, v)], -1)
    parts = fused.split([64, 64, 128], -1)
    q, k, v = (part.unflatten(-1, (-1, 32)) for part in parts)
    batch.pool.state = torch.stack([batch.pool.state] * 2, 1)[:, 1]
    batch.pool.ring_u = batch.pool.ring_u.transpose(1, 2).contiguous().transpose(1, 2)
    g, beta = torch.stack([g, beta], -1).unbind(-1)
    assert_close(replay(batch, (q, k, v, g, beta), exact), expected, tolerance(shape, exact))
    assert_pool(batch.pool, pool, shape, exact)


@pytest.mark.parametrize("tracked", [False, True])
def test_fold(tracked: bool) -> None:
    shape = Shape(key_dim=32, value_dim=48, flush_every=4, ring_size=37)
    rows = [Row(3, 36), Row(padding=True), Row(1000, 5), Row(8, 4)]
    batch = make_batch(shape, rows, [4, 1, 0, 3])
    before, upto = batch.clone(), batch.seq_lens - torch.tensor([0, 0, 2, 13])
    track: tuple[Any, ...] = (None, None)
    if tracked:
        track = torch.tensor([-1, 2, -1, 2], dtype=torch.int32), batch.seq_lens - 1
    arguments = batch.fold(upto, track)
    kernels.fold(*arguments)
    expected = before.pool.clone()
    expected.state[4] = replayed(before, 4, int(upto[0]), rounded=False)
    expected.state[0] = replayed(before, 0, int(upto[2]), rounded=False)
    if tracked:
        expected.state[2] = replayed(before, 3, int(batch.seq_lens[3]) - 1, rounded=False)
    assert_pool(batch.pool, expected, shape)
    theirs = before.clone()
    folding.reference(*theirs.fold(upto, track))
    assert_pool(batch.pool, theirs.pool, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_snapshots_and_the_plain_rule(dtype: torch.dtype) -> None:
    shape = Shape(key_dim=32, value_dim=48, dtype=dtype, pool_dtype=dtype)
    batch = make_batch(shape, [Row(), Row(padding=True), Row(padding=True)], [4, 1, 0])
    block = make_block(shape, 3, 3)
    out, states = kernels.snapshots(*batch.snapshot(block))
    plain, last = kernels.recurrent(*(x[:1] for x in block), batch.pool.state[4:], shape.scale, True)
    assert states.dtype == dtype
    assert last.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(plain, out[:1])
        assert torch.equal(last, states[:1, -1])
    # Rounded after each token, a state is that of any blocks.
    pool = batch.pool.state[4:]
    for t in range(3):
        one = tuple(x[:1, t : t + 1] for x in block)
        alone, behind = kernels.snapshots(*one, pool, None, shape.scale, True)
        assert torch.equal(alone[:, 0], out[:1, t])
        assert torch.equal(behind[:, 0], states[:1, t])
        pool = behind[:, 0]
    assert not out[2].any()
    assert not states[2].any()
    state = batch.pool.state[4].double()
    for t in range(3):
        state, o, _ = step(state, tuple(each[0, t] for each in block), shape)
        assert_close(out[0, t], o, tolerance(shape))
        assert_close(states[0, t], state, max(1e-4, tolerance(shape)))
    fresh, _ = kernels.recurrent(*block, None, shape.scale, True)
    state = torch.zeros_like(state)
    for t in range(3):
        state, o, _ = step(state, tuple(each[0, t] for each in block), shape)
        assert_close(fresh[0, t], o, tolerance(shape))
