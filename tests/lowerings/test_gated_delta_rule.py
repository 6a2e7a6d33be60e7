"""The Gated DeltaNet operators: references against a recurrence in float64, and what a GPU would choose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.errors import ProviderError
from specc.lowerings import (
    REGISTRY,
    fold_gated_delta_rule,
    gated_delta_rule,
    gated_delta_rule_replay,
    gated_delta_rule_snapshot,
)
from specc.lowerings.triton_kernels import obstacle
from tests.lowerings.gated_delta_calls import (
    Batch,
    Call,
    Rounds,
    Row,
    Shape,
    assert_close,
    assert_pool,
    calls,
    expected_replay,
    make_batch,
    make_block,
    outputs_of_blocks,
    replayed,
    step,
    tolerance,
)

LIMITS = settings(max_examples=40, deadline=None)
NAMES = ("gated_delta_rule", "gated_delta_rule_replay", "gated_delta_rule_snapshot", "fold_gated_delta_rule")
needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


@LIMITS
@given(call=calls())
def test_replay_is_the_recurrence(call: Call) -> None:
    batch, block = call.make()
    expected, pool = expected_replay(batch, block)
    out = gated_delta_rule_replay(*batch.replay(block))
    assert out.dtype == batch.shape.dtype
    assert_close(out, expected, tolerance(batch.shape))
    assert_pool(batch.pool, pool, batch.shape)


@LIMITS
@given(call=calls(), data=st.data())
def test_fold_takes_records_in(call: Call, data: st.DataObject) -> None:
    """Rows at or before base stay; tracked states are those of the same call, earlier or later."""
    batch, _ = call.make()
    shape, rows = batch.shape, len(batch.slots)
    lens, before = batch.seq_lens, batch.clone()
    upto = lens - torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)))
    free = [s for s in range(shape.pool_rows) if s not in batch.slots.tolist()]
    track = torch.tensor([free[i] if i < len(free) else -1 for i in range(rows)], dtype=torch.int32)
    track = torch.where(torch.tensor([data.draw(st.booleans()) for _ in range(rows)]), track, -1)
    track_upto = (lens - data.draw(st.integers(0, 3))).where(lens > 0, lens)
    tracked = data.draw(st.booleans())
    fold_gated_delta_rule(*batch.fold(upto, (track, track_upto) if tracked else (None, None)))

    expected = before.pool.clone()
    for row, slot in enumerate(batch.slots.tolist()):
        targets = [(slot, int(upto[row])), (int(track[row]), int(track_upto[row]) if tracked else -1)]
        for target, end in targets:
            if slot >= 0 and lens[row] >= 0 and target >= 0 and end > before.pool.base[slot]:
                state = replayed(before, slot, end, rounded=False)
                expected.state[target] = state.to(shape.pool_dtype)
    assert_pool(batch.pool, expected, shape)


@LIMITS
@given(call=calls())
def test_snapshots_are_the_states_on_the_way(call: Call) -> None:
    batch, block = call.make()
    shape, before = batch.shape, batch.pool.clone()
    out, snapshots = gated_delta_rule_snapshot(*batch.snapshot(block))
    assert snapshots.dtype == shape.pool_dtype
    for row, slot in enumerate(batch.slots.tolist()):
        state = before.state[max(slot, 0)].double()
        if slot < 0 or bool(state.isnan().any()):
            assert slot >= 0 or not (bool(out[row].any()) or bool(snapshots[row].any()))
            continue
        for t in range(block[0].shape[1]):
            state, o, _ = step(state, tuple(each[row, t] for each in block), shape)
            assert_close(out[row, t], o, tolerance(shape))
            assert_close(snapshots[row, t], state, max(1e-4, tolerance(shape)))
    assert_pool(batch.pool, before, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 150])
def test_prompts(tokens: int, state: torch.dtype | None, dtype: torch.dtype) -> None:
    shape = Shape(group=3, value_dim=48, dtype=dtype)
    block = make_block(shape, 2, tokens)
    start = None if state is None else torch.randn(2, 6, 64, 48).to(state)
    out, last = gated_delta_rule(*block, start, shape.scale, True)
    carried = torch.zeros(2, 6, 64, 48).double() if start is None else start.double()
    for t in range(tokens):
        carried, o, _ = step(carried, tuple(each[:, t] for each in block), shape)
        assert_close(out[:, t], o, tolerance(shape))
    assert last.dtype == torch.float32
    assert_close(last, carried, 1e-4)


def test_strong_decays_do_not_overflow() -> None:
    shape = Shape()
    q, k, v, g, beta = make_block(shape, 1, 100)
    out, last = gated_delta_rule(q, k, v, g * 1e4, beta, None, shape.scale, True)
    assert not out.isnan().any()
    assert not last.isnan().any()


@pytest.mark.parametrize("flush_every", [1, 4, 16])
def test_replay_snapshots_and_the_plain_rule_agree(flush_every: int) -> None:
    shape = Shape(flush_every=flush_every)
    batch = make_batch(shape, [Row(), Row(9)], [3, 0])
    block = make_block(shape, 2, 7)
    start = batch.pool.state[batch.slots.long()].clone()
    plain, last = gated_delta_rule(*block, start, shape.scale, True)
    out, snapshots = gated_delta_rule_snapshot(*batch.snapshot(block))
    replay = gated_delta_rule_replay(*batch.replay(block))
    assert_close(out, plain, 1e-5)
    assert_close(replay, plain, 1e-5)
    assert_close(snapshots[:, -1], last, 1e-5)
    for kept in (3, 7, 0):
        committed = batch.clone()
        fold_gated_delta_rule(*committed.fold(committed.seq_lens + kept))
        expected = start if kept == 0 else snapshots[:, kept - 1]
        assert_close(committed.pool.state[batch.slots.long()], expected, 1e-5)


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
def test_snapshots_do_not_depend_on_blocks(pool_dtype: torch.dtype) -> None:
    shape = Shape(pool_dtype=pool_dtype)
    batch, block = make_batch(shape, [Row(), Row(9)], [3, 0]), make_block(shape, 2, 7)
    out, snapshots = gated_delta_rule_snapshot(*batch.snapshot(block))
    state = batch.pool.state[batch.slots.long()]
    for t in range(7):
        one = tuple(each[:, t : t + 1] for each in block)
        alone, states = gated_delta_rule_snapshot(*one, state, None, shape.scale, shape.l2norm)
        assert torch.equal(alone[:, 0], out[:, t])
        assert torch.equal(states[:, 0], snapshots[:, t])
        state = states[:, 0]


PLANS: dict[str, Callable[[int], tuple[int, list[int]]]] = {
    "one token a round": lambda i: (1, [1, 1]),
    "all accepted": lambda i: (8, [8, 8]),
    "few accepted": lambda i: (5, [1 + i % 5, 1 + (i + 2) % 3]),
    "steps change": lambda i: ([1, 7, 3, 16][i % 4], [1 + i % [1, 7, 3, 16][i % 4], 1]),
}


@pytest.mark.parametrize("pool_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flush_every", [1, 4, 16])
def test_bits_do_not_depend_on_blocks(flush_every: int, pool_dtype: torch.dtype) -> None:
    shape = Shape(flush_every=flush_every, pool_dtype=pool_dtype, dtype=torch.bfloat16)
    stream = make_block(shape, 2, 50)
    plain, pool = outputs_of_blocks(shape, stream, gated_delta_rule_replay, PLANS["one token a round"])
    for name, plan in PLANS.items():
        out, other = outputs_of_blocks(shape, stream, gated_delta_rule_replay, plan)
        assert torch.equal(out, plain), name
        if torch.equal(other.base, pool.base):
            torch.testing.assert_close(other.state, pool.state, atol=0, rtol=0, equal_nan=True)


def test_no_drift_over_many_rounds() -> None:
    shape = Shape(flush_every=16, ring_size=32, key_heads=1, pool_rows=4)
    rounds = Rounds(shape, 3)
    state = rounds.pool.state[rounds.slots.long()].double()
    for number in range(300):
        tokens = [1, 7, 3, 8][number // 5 % 4]
        block = make_block(shape, 3, tokens)
        out = rounds.verify(block, gated_delta_rule_replay)
        counts = torch.randint(1, tokens + 1, (3,))
        for t in range(int(counts.max())):
            ahead, o, _ = step(state, tuple(each[:, t] for each in block), shape)
            live = t < counts
            assert_close(out[live, t], o[live], 2e-5)
            state = torch.where(live[:, None, None, None], ahead, state)
        rounds.accept(counts)


def test_drafts_are_read_and_never_stored() -> None:
    """An assistant feeds drafts one by one; what it drops later was never in the state."""
    shape = Shape(flush_every=2, pool_dtype=torch.bfloat16)
    batch = make_batch(shape, [Row(4, 5, drafts=5)], [2])
    state = batch.pool.state.clone()
    block = make_block(shape, 1, 3)
    expected, _ = expected_replay(batch, block)
    out = gated_delta_rule_replay(*batch.replay(block))
    assert_close(out, expected, tolerance(shape))
    torch.testing.assert_close(batch.pool.state, state, atol=0, rtol=0, equal_nan=True)


def edges(name: str) -> list[tuple[Any, ...]]:
    shape = Shape(dtype=torch.bfloat16, pool_dtype=torch.bfloat16, pool_rows=3)

    def batch() -> Batch:
        made = make_batch(shape, [Row(2, 9, 1), Row(padding=True)], [1, 0])
        made.pool = dataclasses.replace(made.pool, **{k: v.nan_to_num() for k, v in vars(made.pool).items()})
        return made

    block = make_block(shape, 2, 6)
    rest = shape.scale, True
    upto = torch.tensor([9, 9])
    return {
        "gated_delta_rule": [(*block, None, *rest), (*make_block(shape, 1, 70), None, *rest)],
        "gated_delta_rule_replay": [batch().replay(block), batch().replay(block, exact=False)],
        "gated_delta_rule_snapshot": [batch().snapshot(block), (*block, batch().pool.state, None, *rest)],
        "fold_gated_delta_rule": [batch().fold(upto), batch().fold(upto, (torch.tensor([2, -1]), upto - 2))],
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_of_the_edges(name: str) -> None:
    for call in edges(name):
        torch.library.opcheck(REGISTRY[name].overload, call)


@needs_triton
@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_takes_triton(name: str, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        call = REGISTRY[name].sample("cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert REGISTRY[name].choose(*call).provider.name == "triton"


def test_a_prompt_goes_by_chunks() -> None:
    with FakeTensorMode():
        block = make_block(Shape(), 1, 17, "cuda")
        decision = gated_delta_rule.choose(*block, None, 0.125, True)
    assert decision.describe() == "loops (not triton: takes blocks of 1 to 16 tokens, got [1, 17, 4, 64])"


def unordered(x: torch.Tensor) -> torch.Tensor:
    """A tensor like x whose last dimension is not contiguous."""
    return x.new_empty_strided(x.shape, [2 * stride for stride in x.stride()])


REFUSALS: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("gated_delta_rule", 0, lambda q: q.double(), "needs q and k of one of float32, float16, bfloat16"),
    ("gated_delta_rule", 2, lambda v: v.double(), "has no kernel for v, g, beta of torch.float64"),
    ("gated_delta_rule", 2, lambda v: v.new_empty(2, 5, 4, 8), "dimensions of 16 to 256, got .32, 8."),
    ("gated_delta_rule", 1, unordered, "needs q, k and v contiguous"),
    ("gated_delta_rule", 5, lambda s: s.half(), "needs a state of float32 or bfloat16"),
    ("gated_delta_rule", 5, unordered, "needs a state contiguous in the last dim"),
    ("gated_delta_rule", 4, lambda beta: beta.cpu(), "needs all tensors on one device"),
    ("gated_delta_rule_snapshot", 6, lambda slots: slots.short(), "has no kernel for slots of torch.int16"),
    ("gated_delta_rule_replay", 6, lambda ring: ring.float(), "needs keys of the ring's dtype"),
    ("gated_delta_rule_replay", 7, lambda ring: ring.half(), "has no kernel for rings of torch.bfloat16"),
    ("gated_delta_rule_replay", 15, lambda _: 65, "flushes every 1 to 64 tokens, not every 65"),
    ("gated_delta_rule_replay", 9, lambda base: base.float(), "has no kernel for base of torch.float32"),
    ("fold_gated_delta_rule", 1, unordered, "needs rings contiguous"),
    (
        "fold_gated_delta_rule",
        1,
        lambda ring: ring.new_empty(3, 24, 2, 8),
        "dimensions of 16 to 256, got .8, 64.",
    ),
    ("fold_gated_delta_rule", 7, lambda slots: slots.short(), "has no kernel for track_slots"),
]


@pytest.mark.parametrize(("name", "position", "change", "why"), REFUSALS)
def test_triton_says_what_it_cannot_serve(
    name: str, position: int, change: Callable[[Any], Any], why: str
) -> None:
    with FakeTensorMode():
        call = list(REGISTRY[name].sample("cuda"))
        call[position] = change(call[position])
        with pytest.raises(ProviderError, match=why):
            REGISTRY[name].choose(*call, forced="triton")


def test_fake_kernels_refuse_what_does_not_match() -> None:
    with FakeTensorMode():
        q, k, v, g, beta = make_block(Shape(), 2, 3)
        for block, why in (
            ((q[:, :2], k, v, g, beta), "q and k of one shape"),
            ((q, k, v[:, :2], g, beta), "as many values as keys"),
            ((q, k, v[:, :, :3], g, beta), "a multiple of the key heads"),
            ((q, k, v, g[:, :, :3], beta), "g per token and value head"),
            ((q, k, v, g, beta[:1]), "beta per token and value head"),
        ):
            with pytest.raises(RuntimeError, match=why):
                gated_delta_rule(*block, None, 1.0, True)
