"""The Mamba2 kernels on a CUDA device: against float64, the same bits in all blocks, poison, large pools."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specc.lowerings import REGISTRY, fold_ssd, ssd_replay, ssd_snapshot
from tests.lowerings.pools import bits
from tests.lowerings.ssd_calls import INF, Replay, Shape, drift, oracle, text

LIMITS = settings(max_examples=25, deadline=None)
POOLS = (torch.float32, torch.bfloat16)
KERNELS = ("ssd_replay", "fold_ssd", "ssd_snapshot")
replay_kernel = torch.ops.specc.ssd_replay.triton


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = float(expected.abs().max()) + 1e-3 if expected.numel() else 1.0
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance * scale)


def tolerance(*dtypes: torch.dtype) -> float:
    return 2e-5 if set(dtypes) == {torch.float32} else 1e-2


def make(*args: Any, **options: Any) -> Replay:
    return Replay(*args, run=replay_kernel, **options)


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_is_chosen_and_is_an_operator(name: str) -> None:
    call = REGISTRY[name].sample("cuda")
    assert REGISTRY[name].choose(*call).provider.name == "triton"
    torch.library.opcheck(REGISTRY[name].overload, call)


SHAPES = (
    Shape(heads=4, groups=2, dim=64, size=128),
    Shape(heads=3, groups=1, dim=24, size=40, skip=False, limits=(0.01, 0.3)),
    Shape(heads=24, groups=1, dim=64, size=16, bias=False, softplus=False),
    Shape(heads=8, groups=8, dim=128, size=256, dtype=torch.bfloat16),
    Shape(heads=100, groups=1, dim=64, size=64, dtype=torch.bfloat16),
)


@LIMITS
@given(
    data=st.data(),
    shape=st.sampled_from(SHAPES),
    every=st.sampled_from([1, 4, 16]),
    pool=st.sampled_from(POOLS),
)
def test_replay_is_the_recurrence(data: st.DataObject, shape: Shape, every: int, pool: torch.dtype) -> None:
    of = text(shape, 2, 60, "cuda")
    replay = make(of, [5, 0], [2, 0], ring_size=every + 31, flush_every=every, pool=pool)
    expected, states = oracle(of, replay.first, every, pool)
    few = tolerance(pool, shape.dtype)
    for tokens in data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=4)):
        good = data.draw(st.lists(st.integers(0, tokens), min_size=2, max_size=2))
        at = (replay.seq - replay.start).tolist()
        for row, y in enumerate(replay.feed(tokens, good)):
            close(y, expected[row, at[row] : at[row] + good[row]], few)
    folded = (replay.base[replay.slots] - replay.start).tolist()
    for row, slot in enumerate(replay.slots.tolist()):
        close(replay.state[slot], states[row, folded[row]], tolerance(pool))
    assert bool(replay.state[[1, 3]].isnan().all())
    assert all(bool(ring[[1, 3]].isnan().all()) for ring in replay.rings)


PLANS = [[7, 1, 16, 3, 13], [2] * 20, [16, 16, 8], [1, 7, 3, 1, 7, 3, 1, 7, 3, 7], [0, 5, 11, 0, 16, 8]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_bits_do_not_depend_on_the_blocks(every: int, pool: torch.dtype, shape: Shape) -> None:
    of = text(shape, 2, 40, "cuda")
    outputs, first = [], None
    for plan in ([1] * 40, *PLANS):
        replay = make(of, [3, 9], [1, 0], ring_size=every + 31, flush_every=every, pool=pool)
        first = replay.first if first is None else first
        replay.state[replay.slots] = first
        junk = 0 if len(plan) == 40 else 2
        rows = [replay.feed(min(good + junk, 16), [good, good]) for good in plan]
        outputs.append(torch.stack([torch.cat([each[row] for each in rows])[:40] for row in range(2)]))
    for other in outputs[1:]:
        assert torch.equal(bits(other), bits(outputs[0]))


@pytest.mark.slow
def test_ten_thousand_rounds() -> None:
    assert drift(replay_kernel, 10_000, "cuda") < 2e-5


def test_drafts_that_are_not_final_are_read_but_not_stored() -> None:
    of = text(Shape(), 2, 60, "cuda")
    replay = make(of, [0, 4], [0, 1], ring_size=44, flush_every=8)
    expected, states = oracle(of, replay.first)
    replay.feed(5, [5, 3])
    for drafted in range(12):
        for row, y in enumerate(replay.feed(1, [1, 1], final=False)):
            at = (5, 3)[row] + drafted
            close(y, expected[row, at : at + 1])
    replay.drop()
    for row, y in enumerate(replay.feed(14, [14, 14])):
        at = (5, 3)[row]
        close(y, expected[row, at : at + 14])
    for row in range(2):
        close(replay.state[row], states[row, int(replay.base[row] - replay.start[row])])


def pool_call() -> tuple[Any, ...]:
    of = text(Shape(dim=64, size=128), 3, 30, "cuda")
    replay = make(of, [7, 0, 1], [2, 0, 3], ring_size=23, flush_every=8)
    replay.feed(7, [7, 2, 5])
    block = of.block((replay.seq - replay.start).tolist(), 5)
    lens = replay.base, replay.seq, replay.final, replay.slots
    return *block, replay.state, *replay.rings, *lens, *of.options, 8, True


def assert_as_reference(name: str, args: tuple[Any, ...]) -> None:
    theirs = tuple(each.clone() if isinstance(each, Tensor) else each for each in args)
    ours = getattr(torch.ops.specc, name).triton(*args)
    torch.testing.assert_close(ours, REGISTRY[name].reference(*theirs), rtol=3e-5, atol=3e-5)
    for mine, other in zip(args, theirs, strict=True):
        if isinstance(mine, Tensor):
            torch.testing.assert_close(mine, other, rtol=3e-5, atol=3e-5, equal_nan=True)


@pytest.mark.parametrize("slots", [[2, -1, 3], [-1, 0, -1], [-1, -1, -1], None])
@pytest.mark.parametrize("length", [None, -1])
def test_dead_rows(slots: list[int] | None, length: int | None) -> None:
    args = list(pool_call())
    args[14] = None if slots is None else torch.tensor(slots, device="cuda")
    if slots is None:
        # Rows 0, 1 and 2 of the pool, of which 1 is nobody's.
        args[11] = torch.where(args[11] < 0, 0, args[11])
        args[12] = torch.tensor([2, -1, 14], device="cuda")
    if length is not None:
        args[12][0] = length
    args[13] = args[12].clone()
    assert_as_reference("ssd_replay", tuple(args))


@pytest.mark.parametrize("tracks", [[1, -1, 4], None])
@pytest.mark.parametrize("upto", [[14, 2, 6], [7, 1, -3], [99, 0, 4]])
def test_fold(upto: list[int], tracks: list[int] | None) -> None:
    of = text(Shape(dim=64, size=128), 3, 40, "cuda")
    replay = make(of, [7, 0, 1], [2, 0, 3], ring_size=23, flush_every=100)
    replay.feed(16, [16, 2, 5])
    replay.feed(7, [7, 0, 0])
    track_slots = None if tracks is None else torch.tensor(tracks, device="cuda")
    ends = torch.tensor(upto, device="cuda"), torch.tensor([9, 1, 3], device="cuda")
    args = replay.state, of.a, *replay.rings, replay.base, ends[0], replay.slots, track_slots, ends[1]
    assert_as_reference("fold_ssd", args)


@pytest.mark.parametrize("pool", POOLS)
def test_replay_is_snapshot_is_fold(pool: torch.dtype) -> None:
    of = text(Shape(dim=64, size=128), 2, 8, "cuda")
    replay = make(of, [0, 0], [1, 0], ring_size=40, flush_every=16, pool=pool)
    y = torch.stack(replay.feed(8, [8, 8]))
    snapshot_y, snapshots = ssd_snapshot(*of.block([0, 0], 8), replay.state, replay.slots, *of.options)
    # Snapshots are rounded after each token, a checkpoint where it moves.
    exact = pool == torch.float32
    assert torch.equal(bits(y), bits(snapshot_y)) or not exact
    expected, states = oracle(of, replay.first)
    close(y, expected)
    close(snapshots, states[:, 1:], tolerance(pool))
    fold_ssd(replay.state, of.a, *replay.rings, replay.base, replay.seq, replay.slots, None, None)
    assert torch.equal(bits(replay.state[replay.slots]), bits(snapshots[:, -1])) or not exact
    close(replay.state[replay.slots], snapshots[:, -1], tolerance(pool))


def test_a_pool_beyond_2_31_numbers() -> None:
    shape = Shape(heads=2, groups=1, dim=16, size=16)
    of = text(shape, 2, 24, "cuda")
    replay = make(of, [3, 0], [1, 0], ring_size=30, flush_every=8)
    wide = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    far = wide.as_strided(replay.state.shape, (2**30 + 512, 256, 16, 1)).copy_(replay.state)
    replay.state = replay.state.bfloat16()
    other = make(of, [3, 0], [1, 0], ring_size=30, flush_every=8, pool=torch.bfloat16)
    other.state = far
    for _ in range(3):
        ours, theirs = replay.feed(8, [8, 8]), other.feed(8, [8, 8])
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(ours, theirs, strict=True))
    assert torch.equal(bits(far.contiguous()[:2]), bits(replay.state[:2]))


@pytest.mark.parametrize("name", ["ring_x", "ring_b", "ring_dt"])
def test_rings_beyond_2_31_numbers(name: str) -> None:
    of = text(Shape(heads=2, groups=1, dim=16, size=16), 2, 24, "cuda")
    near, far = (make(of, [3, 0], [1, 0], ring_size=30, flush_every=8) for _ in range(2))
    far.state = near.state.clone()
    ring = getattr(far, name)
    row = 2**31 // (len(ring) - 1) + 512
    memory = torch.empty(row * (len(ring) - 1) + ring[0].numel(), dtype=ring.dtype, device="cuda")
    assert memory.numel() > 2**31
    setattr(far, name, memory.as_strided(ring.shape, (row, *ring.stride()[1:])).copy_(ring))
    for _ in range(3):
        ours, theirs = near.feed(8, [8, 8]), far.feed(8, [8, 8])
        assert all(torch.equal(bits(x), bits(y)) for x, y in zip(ours, theirs, strict=True))
    for each in (near, far):
        fold_ssd(each.state, of.a, *each.rings, each.base, each.seq, each.slots, None, None)
    assert torch.equal(bits(near.state[near.slots]), bits(far.state[far.slots]))


def test_snapshots_of_a_state_beyond_2_31_numbers() -> None:
    of = text(Shape(heads=2, groups=1, dim=16, size=16), 2, 8, "cuda")
    near = make(of, [3, 0], [2, 0], ring_size=30, flush_every=8, pool=torch.bfloat16)
    wide = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device="cuda")
    far = wide.as_strided(near.state.shape, (2**30 + 512, 256, 16, 1)).copy_(near.state)
    block = of.block([0, 0], 8)
    ours, theirs = (ssd_snapshot(*block, each, near.slots, *of.options) for each in (near.state, far))
    assert all(torch.equal(bits(x), bits(y)) for x, y in zip(ours, theirs, strict=True))


def test_a_captured_graph_holds_for_other_lengths() -> None:
    of = text(Shape(dim=64, size=64), 2, 60, "cuda")
    eager = make(of, [3, 0], [1, 0], ring_size=30, flush_every=4)
    state, rings = eager.state.clone(), [ring.clone() for ring in eager.rings]
    block = tuple(each.clone() if isinstance(each, Tensor) else each for each in of.block([0, 0], 5))
    base, seq, final = eager.base.clone(), eager.seq.clone(), eager.final.clone()
    args = *block, state, *rings, base, seq, final, eager.slots, *of.options, 4, True
    before = [each.clone() for each in (state, *rings)]
    ssd_replay(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ssd_replay(*args)
    for each, old in zip((state, *rings), before, strict=True):
        each.copy_(old)
    for good in ([5, 1], [3, 5], [5, 5], [0, 2]):
        at = (eager.seq - eager.start).tolist()
        for buffer, value in zip(
            (*block, base, seq, final),
            (*of.block(at, 5, good), eager.base, eager.seq, eager.final),
            strict=True,
        ):
            if isinstance(buffer, Tensor):
                buffer.copy_(value)
        graph.replay()
        for row, expected in enumerate(eager.feed(5, good)):
            assert torch.equal(bits(y[row, : good[row]]), bits(expected))


def test_softplus_of_everything() -> None:
    x = torch.linspace(-90, 40, 16 * 512).view(1, 16, 512).cuda()
    of = text(Shape(heads=512, groups=1, bias=False, limits=(0.0, INF)), 1, 16, "cuda")
    replay = make(of, [0], [0], ring_size=16, flush_every=16)
    block = of.block([0], 16)
    lens = replay.base, replay.seq, replay.final, replay.slots
    replay_kernel(block[0], x, *block[2:], replay.state, *replay.rings, *lens, *of.options, 16, True)
    expected = torch.nn.functional.softplus(x.double(), threshold=1000)[0]
    torch.testing.assert_close(replay.ring_dt[0].double(), expected, rtol=1e-5, atol=1e-30)
