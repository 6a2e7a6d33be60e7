"""The Gated DeltaNet kernel written in Gluon on a CUDA device, against the recurrence in float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from specc.lowerings.triton_kernels import gated_delta_fast, gated_delta_rule, gluon_obstacle
from specc.lowerings.triton_kernels.gated_delta_rule import replay_form
from tests.lowerings.gated_delta_calls import (
    SHORT,
    Call,
    Pool,
    Row,
    assert_close,
    assert_pool,
    drift,
    expected_replay,
    make_batch,
    make_block,
    short_calls,
    tolerance,
)

if gluon_obstacle() is not None:
    pytest.skip(str(gluon_obstacle()), allow_module_level=True)

from specc.lowerings.triton_kernels import gated_delta_gluon as kernels


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def operator(*args: Any) -> Tensor:
    return torch.ops.specc.gated_delta_rule_replay.triton(*args)


def replay(*args: Any, tiles: kernels.Tiles | None = None) -> Tensor:
    """The kernel, called as the operator is, by tiles for few rows or for many, whatever their number."""
    block, state, rings, lens = args[:5], args[5], args[6:9], args[9:13]
    scale, l2norm, flush_every, _ = args[13:]
    return kernels.replay(block, state, rings, lens, scale, l2norm, flush_every, tiles)


@pytest.mark.parametrize("tiles", kernels.TILES.values())
@settings(max_examples=30, deadline=None)
@given(call=short_calls())
def test_replay_is_the_recurrence(call: Call, tiles: Any) -> None:
    batch, block = call.make()
    expected, pool = expected_replay(batch, block)
    there = batch.to("cuda")
    out = replay(*there.replay(tuple(each.cuda() for each in block), False), tiles=tiles)
    assert_close(out, expected, tolerance(batch.shape))
    assert_pool(there.pool, pool, batch.shape, exact=False)


def test_it_is_what_the_operator_takes() -> None:
    """Rows of all lengths, in pools whose entries lie apart, by the operator; twice, for the same bits."""
    shape = dataclasses.replace(SHORT, key_heads=2, pool_rows=80)
    rows = [Row(padding=True) if i % 9 == 8 else Row(2**33 + i, i % 24, i % 3) for i in range(80)]
    batch, block = make_batch(shape, rows, torch.randperm(80).tolist()), make_block(shape, 80, 8)
    expected, pool = expected_replay(batch, block)
    moved = tuple(each.cuda() for each in block)
    outs = []
    for _ in range(2):
        there = batch.to("cuda")
        there.pool.ring_u = there.pool.ring_u.transpose(1, 2).contiguous().transpose(1, 2)
        there.pool.state = torch.stack([there.pool.state] * 2, 1)[:, 1]
        rings = there.pool.tensors()[1:]
        form = replay_form(moved, there.pool.state, rings, shape.flush_every, exact=False)
        assert form is kernels
        outs.append(operator(*there.replay(moved, exact=False)))
        assert_close(outs[-1], expected, tolerance(shape))
        assert_pool(there.pool, pool, shape, exact=False)
    assert torch.equal(*outs)


def test_what_it_does_not_take_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(rows: int = 80, tokens: int = 8, width: int = 128, shift: int = 0, **changes: Any) -> Any:
        """Of a state that is part of rows of ``width``, ``shift`` elements into its memory."""
        shape = dataclasses.replace(SHORT, key_heads=2, pool_rows=rows, **changes)
        state, *rings = Pool.poisoned(shape, "cuda").tensors()
        size = *state.shape[:3], max(width, state.shape[3])
        memory = torch.empty(math.prod(size) + shift, device="cuda", dtype=state.dtype)
        state = memory[shift:].view(size)[..., : state.shape[3]]
        block = make_block(shape, rows, tokens, "cuda")
        return replay_form(block, state, tuple(rings), shape.flush_every, exact=False)

    assert form() is form(rows=1) is form(ring_size=39) is form(width=144) is kernels
    others = [
        {"ring_size": 40}, {"tokens": 9, "ring_size": 40}, {"flush_every": 1}, {"shift": 1}, {"width": 132},
        {"key_dim": 64}, {"value_dim": 64}, {"dtype": torch.float16}, {"pool_dtype": torch.bfloat16},
    ]  # fmt: skip
    for each in others:
        assert form(**each) is gated_delta_fast, each
    monkeypatch.setattr(kernels, "_has_units", lambda index: False)
    assert form() is gated_delta_fast
    monkeypatch.undo()
    monkeypatch.setattr(gated_delta_rule, "gluon_obstacle", lambda: "none")
    assert form() is gated_delta_fast


@pytest.mark.slow
def test_ten_thousand_rounds() -> None:
    assert drift(SHORT, replay, exact=False, blocks=(8, 7, 2, 4), rounds=10_000) < 2e-5


def test_pools_beyond_32_bits() -> None:
    """Slots further apart than 32 bits say; heads and entries that are, it does not take."""
    shape = dataclasses.replace(SHORT, pool_rows=3)
    batch, block = make_batch(shape, [Row(3, 20), Row(1, 7)], [2, 1]), make_block(shape, 2, 8)
    expected, pool = expected_replay(batch, block)
    for name in ("state", "ring_k", "ring_u", "ring_g"):
        there = batch.to("cuda")
        held = getattr(there.pool, name)
        strides = 2**30 + 64, *held.stride()[1:]
        size = sum((n - 1) * s for n, s in zip(held.shape, strides, strict=True)) + 1
        memory = torch.empty(size, device="cuda", dtype=held.dtype)
        assert size > 2**31
        setattr(there.pool, name, memory.as_strided(held.shape, strides).copy_(held))
        moved = tuple(each.cuda() for each in block)
        form = replay_form(moved, there.pool.state, there.pool.tensors()[1:], 16, exact=False)
        assert form is kernels
        assert_close(operator(*there.replay(moved, exact=False)), expected, tolerance(shape))
        assert_pool(there.pool, pool, shape, exact=False)


def test_entries_too_far_apart_for_32_bits_go_elsewhere() -> None:
    block, pool = make_block(SHORT, 1, 8, "cuda"), Pool.poisoned(SHORT, "cuda")
    state, ring_k, ring_u, ring_g = pool.tensors()
    far = torch.empty_strided(ring_u.shape, (0, 2**27, 128, 1), device="meta")
    assert replay_form(block, state, (ring_k, ring_u, ring_g), 16, exact=False) is kernels
    assert replay_form(block, state, (ring_k, far, ring_g), 16, exact=False) is gated_delta_fast
