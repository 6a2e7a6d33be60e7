"""The Gated DeltaNet kernel written in Gluon, against the recurrence in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.interpreted import gluon
from tests.lowerings.gated_delta_calls import (
    SHORT,
    Batch,
    Call,
    Row,
    assert_close,
    assert_pool,
    expected_replay,
    make_batch,
    make_block,
    short_calls,
    tolerance,
)

gluon.know_constants()
kernels = gluon.interpreted("gated_delta_gluon")


def replay(batch: Batch, block: tuple[Tensor, ...], many: bool = False) -> Tensor:
    lens = batch.pool.base, batch.seq_lens, batch.final_lens, batch.slots
    shape = batch.shape
    rings = batch.pool.tensors()[1:]
    tiles = kernels.TILES[many]
    out = kernels.replay(
        block, batch.pool.state, rings, lens, shape.scale, shape.l2norm, shape.flush_every, tiles
    )
    kernels.async_copy.assert_done()
    return out


@pytest.mark.parametrize("many", [False, True])
@settings(max_examples=8, deadline=None)
@given(call=short_calls(), narrow=st.booleans())
def test_replay(call: Call, narrow: bool, many: bool) -> None:
    batch, (q, k, v, g, beta) = call.make()
    # Not rounded to bfloat16, all bits of an output show.
    block = (q, k, v.float(), g, beta)
    if narrow:
        block = (q, k, v.float(), g.half(), beta.bfloat16())
        batch.slots = batch.slots.long()
    if bool((batch.seq_lens < 2**31).all()):
        batch.seq_lens = batch.seq_lens.int()
    expected, pool = expected_replay(batch, block)
    assert_close(replay(batch, block, many), expected, 3e-5)
    assert_pool(batch.pool, pool, batch.shape, exact=False)


def test_strides() -> None:
    """q, k and v of one projection, a pool whose rows lie apart, rings with the heads first; no slots."""
    batch = make_batch(SHORT, [Row(3, 20, 2), Row(16, 7), Row(), Row(), Row()])
    batch.slots = None  # type: ignore[assignment]
    q, k, v, g, beta = make_block(SHORT, 5, 7)
    theirs = dataclasses.replace(batch.clone(), slots=torch.arange(5, dtype=torch.int32))
    expected, pool = expected_replay(theirs, (q, k, v, g, beta))
    fused = torch.cat([each.flatten(2) for each in (q, k, v)], -1)
    parts = fused.split([128, 128, 256], -1)
    q, k, v = (part.unflatten(-1, (-1, 128)) for part in parts)
    batch.pool.state = torch.stack([batch.pool.state] * 2, 1)[:, 1]
    batch.pool.ring_u = batch.pool.ring_u.transpose(1, 2).contiguous().transpose(1, 2)
    g, beta = torch.stack([g, beta], -1).unbind(-1)
    assert_close(replay(batch, (q, k, v, g, beta)), expected, tolerance(SHORT))
    assert_pool(batch.pool, pool, SHORT, exact=False)
