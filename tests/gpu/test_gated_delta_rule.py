"""The Gated DeltaNet kernels on a CUDA device, against the recurrence in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from specc.lowerings import REGISTRY
from specc.lowerings import fold_gated_delta_rule as folding
from specc.lowerings.triton_kernels import gated_delta_exact, gated_delta_fast
from tests.lowerings.gated_delta_calls import (
    Batch,
    Call,
    Row,
    Shape,
    assert_close,
    assert_pool,
    calls,
    drift,
    expected_replay,
    make_batch,
    make_block,
    outputs_of_blocks,
    tolerance,
)

NAMES = ("gated_delta_rule", "gated_delta_rule_replay", "gated_delta_rule_snapshot", "fold_gated_delta_rule")
LAYER = Shape(key_heads=4, key_dim=128, value_dim=128, dtype=torch.bfloat16, flush_every=16, ring_size=47)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def replay(*args: Any) -> Tensor:
    return torch.ops.specc.gated_delta_rule_replay.triton(*args)


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_chosen_and_is_an_operator(name: str) -> None:
    call = REGISTRY[name].sample("cuda")
    assert REGISTRY[name].choose(*call).provider.name == "triton"
    torch.library.opcheck(REGISTRY[name].overload, call)


def assert_replays(batch: Batch, block: tuple[Tensor, ...], exact: bool) -> None:
    expected, pool = expected_replay(batch, block)
    there = batch.to("cuda")
    out = replay(*there.replay(tuple(each.cuda() for each in block), exact))
    assert_close(out, expected, tolerance(batch.shape, exact))
    assert_pool(there.pool, pool, batch.shape, exact)


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=12, deadline=None)
@given(call=calls())
def test_replay_is_the_recurrence(call: Call, exact: bool) -> None:
    assert_replays(*call.make(), exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "ring_size"), [(1, 33), (1, 47), (8, 47), (16, 47)])
def test_the_shape_of_real_layers(tokens: int, ring_size: int, dtype: torch.dtype, exact: bool) -> None:
    shape = dataclasses.replace(LAYER, dtype=dtype, ring_size=ring_size)
    rows = [Row(2**33, pending, drafts) for pending, drafts in ((0, 0), (9, 2), (16, 0), (31, 0), (30, 20))]
    batch = make_batch(shape, [*rows[:4], Row(padding=True)], [4, 1, 0, 3, 2])
    assert_replays(batch, make_block(shape, 5, tokens), exact)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pending", [(5, 7), (16, 23)])
def test_tiles_for_few_rows_and_for_many(pending: tuple[int, int], exact: bool) -> None:
    """The rows of tests are few: other tiles have to be asked for. Exact bits are those of any tile."""
    form = gated_delta_exact if exact else gated_delta_fast
    block = make_block(LAYER, 2, 8)
    batch = make_batch(LAYER, [Row(3, pending[0]), Row(2**33, pending[1])], [4, 1])
    expected, pool = expected_replay(batch, block)
    chosen = [
        tiles for name, tiles in form.TILES.items() if name in {False, True, ("cuda", False), ("cuda", True)}
    ]
    found = []
    for tiles in chosen:
        there = batch.to("cuda")
        rings = there.pool.tensors()[1:]
        lens = there.pool.base, there.seq_lens, there.final_lens, there.slots
        moved = tuple(each.cuda() for each in block)
        found.append(
            form.replay(
                moved, there.pool.state, rings, lens, LAYER.scale, LAYER.l2norm, LAYER.flush_every, tiles
            )
        )
        assert_close(found[-1], expected, tolerance(LAYER, exact))
        assert_pool(there.pool, pool, LAYER, exact)
    assert not exact or torch.equal(*found)


def test_short_rings_of_one_token() -> None:
    """Rings for blocks of one token, for which 16 bits and 32 take one form."""
    for dtype, dim in ((torch.bfloat16, 128), (torch.float32, 128), (torch.float16, 256)):
        shape = dataclasses.replace(LAYER, dtype=dtype, key_dim=dim, value_dim=dim, ring_size=17)
        batch = make_batch(shape, [Row(3, 16), Row(2**33, 7), Row(padding=True), Row(9, 0)], [4, 1, 0, 2])
        assert_replays(batch, make_block(shape, 4, 1), exact=False)


@pytest.mark.parametrize("exact", [False, True])
def test_fused_projections_and_other_strides(exact: bool) -> None:
    shape = dataclasses.replace(LAYER, key_dim=64, value_dim=96)
    batch, block = make_batch(shape, [Row(3, 20), Row(padding=True)], [4, 1]), make_block(shape, 2, 5)
    expected, pool = expected_replay(batch, block)
    there = batch.to("cuda")
    fused = torch.cat([each.flatten(2) for each in block[:3]], -1).cuda()
    parts = fused.split([each.flatten(2).shape[-1] for each in block[:3]], -1)
    q, k, v = (part.unflatten(-1, each.shape[2:]) for part, each in zip(parts, block[:3], strict=True))
    g, beta = torch.stack(block[3:], -1).cuda().unbind(-1)
    there.pool.ring_u = there.pool.ring_u.transpose(1, 2).contiguous().transpose(1, 2)
    there.pool.state = torch.stack([there.pool.state] * 2, 1)[:, 1]
    assert_close(replay(*there.replay((q, k, v, g, beta), exact)), expected, tolerance(shape, exact))
    assert_pool(there.pool, pool, shape, exact)


PLANS: dict[str, Callable[[int], tuple[int, list[int]]]] = {
    "one token a round": lambda i: (1, [1, 1]),
    "all accepted": lambda i: (8, [8, 8]),
    "few accepted": lambda i: (5, [1 + i % 5, 1 + (i + 2) % 3]),
    "steps change": lambda i: ([1, 7, 3, 16][i % 4], [1 + i % [1, 7, 3, 16][i % 4], 1]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("flush_every", "pool_dtype"),
    [(16, torch.float32), (16, torch.bfloat16), (4, torch.float32), (1, torch.bfloat16)],
)
def test_bits_do_not_depend_on_blocks(flush_every: int, pool_dtype: torch.dtype, dtype: torch.dtype) -> None:
    shape = dataclasses.replace(LAYER, flush_every=flush_every, pool_dtype=pool_dtype, dtype=dtype)
    q, k, v, g, beta = make_block(shape, 2, 80, "cuda")
    # Not rounded to bfloat16, all bits of an output show.
    stream = (q, k, v.float(), g, beta)
    plain, _ = outputs_of_blocks(shape, stream, replay, PLANS["one token a round"])
    for name, plan in PLANS.items():
        out, _ = outputs_of_blocks(shape, stream, replay, plan)
        assert torch.equal(out, plain), name


def test_bits_do_not_depend_on_company() -> None:
    batch = make_batch(LAYER, [Row(7, 9), Row(3, 20), Row(0, 0), Row(5, 16)], [4, 1, 0, 3]).to("cuda")
    q, k, v, g, beta = make_block(LAYER, 4, 6, "cuda")
    block = (q, k, v.float(), g, beta)
    together = replay(*batch.clone().replay(block))
    for row in range(4):
        alone = batch.clone()
        one = slice(row, row + 1)
        alone.slots, alone.seq_lens, alone.final_lens = (
            each[one] for each in (batch.slots, batch.seq_lens, batch.final_lens)
        )
        assert torch.equal(replay(*alone.replay(tuple(each[one] for each in block)))[0], together[row])


# Blocks, and rings for them. One token alone has a kernel of its own where the ring is short.
ROUNDS = {"short": ((1, 7, 3, 4), 33), "long": ((8, 16, 1, 5), 47)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("exact", [False, True])
def test_ten_thousand_rounds(exact: bool, name: str) -> None:
    """Against the recurrence in float64, which never sees a ring."""
    blocks, ring_size = ROUNDS[name]
    shape = dataclasses.replace(LAYER, key_heads=1, key_dim=64, value_dim=64, ring_size=ring_size)
    assert drift(shape, replay, exact, blocks, rounds=10_000) < 2e-5


def spread_out(pool: Any, name: str, stride: int) -> None:
    """Puts so much between the rows of ``name``, or its entries, that 32 bits do not reach the last."""
    held = getattr(pool, name)
    strides = list(held.stride())
    strides[stride] = 2**30 + 64 if stride == 0 else 2**26
    if stride:
        strides[0] = 2048
    size = sum((n - 1) * s for n, s in zip(held.shape, strides, strict=True)) + 1
    assert size > 2**31
    memory = torch.empty(size, device="cuda", dtype=held.dtype)
    setattr(pool, name, memory.as_strided(held.shape, strides).copy_(held))


FAR = dataclasses.replace(
    LAYER, key_heads=1, key_dim=64, value_dim=64, pool_rows=3, pool_dtype=torch.bfloat16
)
PLACES = [("state", 0), ("ring_k", 0), ("ring_u", 0), ("ring_u", 1), ("ring_g", 0)]


# One after the other, for each takes up to 13 GB.
@pytest.mark.parametrize(("exact", "tokens"), [(False, 8), (True, 8), (False, 1)])
def test_replays_of_pools_beyond_32_bits(exact: bool, tokens: int) -> None:
    """Slot strides, and strides of entries, that 32 bits do not hold."""
    shape = dataclasses.replace(FAR, ring_size=33) if tokens == 1 else FAR
    batch, block = make_batch(shape, [Row(3, 20), Row(1, 7)], [2, 1]), make_block(shape, 2, tokens)
    expected, pool = expected_replay(batch, block)
    for place in PLACES:
        there = batch.to("cuda")
        spread_out(there.pool, *place)
        out = replay(*there.replay(tuple(each.cuda() for each in block), exact))
        assert_close(out, expected, tolerance(shape, exact))
        assert_pool(there.pool, pool, shape, exact)


def test_folds_and_snapshots_of_pools_beyond_32_bits() -> None:
    batch, block = make_batch(FAR, [Row(3, 20), Row(1, 7)], [2, 1]), make_block(FAR, 2, 4)
    moved, upto = tuple(each.cuda() for each in block), batch.seq_lens.cuda() - 1
    near, live = batch.to("cuda"), torch.tensor([1, 2], device="cuda")
    expected = torch.ops.specc.gated_delta_rule_snapshot.triton(*near.snapshot(moved))
    torch.ops.specc.fold_gated_delta_rule.triton(*near.fold(upto))
    for place in PLACES:
        there = batch.to("cuda")
        spread_out(there.pool, *place)
        found = torch.ops.specc.gated_delta_rule_snapshot.triton(*there.snapshot(moved))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        torch.ops.specc.fold_gated_delta_rule.triton(*there.fold(upto))
        assert torch.equal(there.pool.state[live], near.pool.state[live])


@settings(max_examples=12, deadline=None)
@given(call=calls())
def test_folds_and_snapshots(call: Call) -> None:
    batch, block = call.make()
    shape, there = batch.shape, batch.to("cuda")
    free = [s for s in range(shape.pool_rows) if s not in batch.slots.tolist()]
    track = torch.tensor([(free + [-1] * 3)[i] for i in range(len(batch.slots))], dtype=torch.int32)
    upto, track_upto = batch.seq_lens - 1, batch.seq_lens - 2
    out, states = torch.ops.specc.gated_delta_rule_snapshot.triton(
        *there.snapshot(tuple(each.cuda() for each in block))
    )
    theirs, their_states = REGISTRY["gated_delta_rule_snapshot"].reference(*batch.snapshot(block))
    assert_close(out, theirs, tolerance(shape))
    assert_close(states, their_states, max(1e-4, tolerance(shape)))
    arguments = there.fold(upto.cuda(), (track.cuda(), track_upto.cuda()))
    torch.ops.specc.fold_gated_delta_rule.triton(*arguments)
    folding.reference(*batch.fold(upto, (track, track_upto)))
    assert_pool(there.pool, batch.pool, shape)


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
def test_the_plain_rule(state: torch.dtype | None) -> None:
    block = make_block(LAYER, 2, 5)
    start = None if state is None else torch.randn(2, 8, 128, 128).to(state)
    expected = REGISTRY["gated_delta_rule"].reference(*block, start, LAYER.scale, True)
    moved = (None if each is None else each.cuda() for each in (*block, start))
    found = torch.ops.specc.gated_delta_rule.triton(*moved, LAYER.scale, True)
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, tolerance(LAYER))


def test_a_captured_step_holds_for_other_rows() -> None:
    shape = LAYER
    batches_ = [
        make_batch(shape, rows, [4, 1, 0]).to("cuda")
        for rows in (
            [Row(3, 20), Row(1, 7), Row(9, 16)],
            [Row(5, 31), Row(padding=True), Row(2**33, 0)],
        )
    ]
    block, static = make_block(shape, 3, 8, "cuda"), batches_[0].clone()
    replay(*static.clone().replay(block))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = replay(*static.replay(block))
    for batch in batches_:
        for name in ("slots", "seq_lens", "final_lens"):
            getattr(static, name).copy_(getattr(batch, name))
        for ours, theirs in zip(
            (*static.pool.tensors(), static.pool.base), (*batch.pool.tensors(), batch.pool.base), strict=True
        ):
            ours.copy_(theirs)
        graph.replay()
        expected = replay(*batch.replay(block))
        assert torch.equal(out, expected)
