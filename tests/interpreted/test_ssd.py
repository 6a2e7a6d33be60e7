"""The Mamba2 kernels, in the interpreter, against float64 and against the references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from specc.lowerings import fold_ssd, ssd_replay, ssd_snapshot
from specc.lowerings.triton_kernels import ssd_fold as fold_kernel
from specc.lowerings.triton_kernels import ssd_replay as replay_kernel
from specc.lowerings.triton_kernels import ssd_snapshot as snapshot_kernel
from tests.lowerings.ssd_calls import Replay, Shape, Text, oracle, text

SMALL = Shape(heads=2, groups=1, dim=8, size=16)
SHAPES = (
    Shape(heads=2, groups=2, dim=12, size=40, skip=False, limits=(0.01, 0.3)),
    Shape(heads=2, groups=1, dim=16, size=64, bias=False, softplus=False),
)


def run(*args: Any) -> Tensor:
    return replay_kernel.replay(*args[:-1])


def kernels(*args: Any, **options: Any) -> Replay:
    return Replay(*args, run=run, **options)


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours.double(), expected.double(), rtol=tolerance, atol=tolerance)


def cloned(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.clone() if isinstance(each, Tensor) else each for each in args)


def assert_as_reference(
    run: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Results and everything mutated; NaN where the reference has NaN."""
    theirs = cloned(args)
    ours, expected = run(*args), reference(*theirs)
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    for mine, other in zip(args, theirs, strict=True):
        if isinstance(mine, Tensor) and mine.is_floating_point():
            rounding = 2e-2 if mine.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(mine, other, rtol=rounding, atol=rounding, equal_nan=True)


@pytest.mark.parametrize(("every", "shape"), [(1, SMALL), (4, SHAPES[0]), (16, SHAPES[1])])
def test_replay_is_the_recurrence(every: int, shape: Shape) -> None:
    of = text(shape, 2, 60)
    replay = kernels(of, [5, 0], [2, 0], ring_size=every + 31, flush_every=every)
    expected, states = oracle(of, replay.first)
    for tokens, good in ((1, [1, 1]), (7, [3, 7]), (3, [0, 3]), (16, [16, 1]), (5, [5, 5])):
        at = (replay.seq - replay.start).tolist()
        for row, y in enumerate(replay.feed(tokens, good)):
            close(y, expected[row, at[row] : at[row] + good[row]])
    folded = (replay.base[replay.slots] - replay.start).tolist()
    for row, slot in enumerate(replay.slots.tolist()):
        close(replay.state[slot], states[row, folded[row]])
    assert bool(replay.state[[1, 3]].isnan().all())
    assert all(bool(ring[[1, 3]].isnan().all()) for ring in replay.rings)


def test_unfinal_drafts_and_bf16() -> None:
    of = text(Shape(heads=2, groups=1, dim=8, size=16, dtype=torch.bfloat16), 2, 30)
    pool = torch.bfloat16
    replay = kernels(of, [0, 4], [0, 1], ring_size=40, flush_every=8, pool=pool)
    expected, _ = oracle(of, replay.first, 8, pool)
    replay.feed(9, [9, 6])
    for drafted in range(4):
        for row, y in enumerate(replay.feed(1, [1, 1], final=False)):
            at = (9, 6)[row] + drafted
            close(y, expected[row, at : at + 1], 3e-2)
    assert replay.base[:2].tolist() == [8, 4]


def pool_call(of: Text, slots: list[int]) -> tuple[Any, ...]:
    replay = kernels(of, [7, 0], [2, 0], ring_size=23, flush_every=8)
    replay.feed(7, [7, 2])
    block = of.block((replay.seq - replay.start).tolist(), 5)
    lens = replay.base, replay.seq, replay.final, torch.tensor(slots)
    return *block, replay.state, *replay.rings, *lens, *of.options, 8, True


@pytest.mark.parametrize("slots", [[2, -1], [-1, 0], [-1, -1]])
def test_dead_rows(slots: list[int]) -> None:
    assert_as_reference(run, ssd_replay.reference, pool_call(text(SMALL, 2, 20), slots))


def test_a_row_of_no_length_is_dead() -> None:
    args = list(pool_call(text(SMALL, 2, 20), [2, 0]))
    args[12] = torch.tensor([-1, 2])
    assert_as_reference(run, ssd_replay.reference, tuple(args))


@pytest.mark.parametrize(
    ("upto", "tracks"), [([14, 2], [1, 3]), ([7, 1], None), ([3, -2], [-1, 3]), ([40, 0], [1, -1])]
)
def test_fold(upto: list[int], tracks: list[int] | None) -> None:
    """``upto`` may be behind what the rings hold, where only their size limits it."""
    of = text(SMALL, 2, 30)
    replay = kernels(of, [7, 0], [2, 0], ring_size=23, flush_every=100)
    replay.feed(16, [16, 2])
    replay.feed(7, [7, 0])
    track_slots = None if tracks is None else torch.tensor(tracks)
    upto_there, track = torch.tensor(upto), torch.tensor([9, 1])
    args = replay.state, of.a, *replay.rings, replay.base, upto_there, replay.slots, track_slots, track
    assert_as_reference(fold_kernel.fold, fold_ssd.reference, args)


@pytest.mark.parametrize("pool", [torch.float32, torch.bfloat16])
def test_snapshots(pool: torch.dtype) -> None:
    of = text(SHAPES[0], 3, 5)
    state = torch.randn(4, 2, 12, 40).to(pool)
    args = *of.block([0] * 3, 5), state, torch.tensor([3, -1, 0]), *of.options
    ours, expected = snapshot_kernel.snapshot(*args), ssd_snapshot.reference(*cloned(args))
    close(ours[0], expected[0])
    close(ours[1], expected[1], 2e-5 if pool == torch.float32 else 1e-2)


def test_softplus_of_everything() -> None:
    x = torch.cat([torch.linspace(-30, 30, 123), torch.tensor([-100.0, 100.0, 0.0, -1e-6, 25.0])])
    shape = Shape(heads=1, groups=1, bias=False, skip=False)
    of = text(shape, 1, 16)
    steps = []
    for block in x.split(16):
        replay = kernels(of, [0], [0], ring_size=16, flush_every=16)
        args = list(of.block([0], len(block)))
        args[1] = block[None, :, None]
        lens = replay.base, replay.seq, replay.final, replay.slots
        run(*args, replay.state, *replay.rings, *lens, *of.options, 16, True)
        steps.append(replay.ring_dt[0, : len(block), 0])
    expected = torch.nn.functional.softplus(x.double(), threshold=1000)
    torch.testing.assert_close(torch.cat(steps).double(), expected, rtol=3e-6, atol=1e-37)
