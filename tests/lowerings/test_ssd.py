"""The Mamba2 operators' references against a float64 loop, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.errors import ProviderError
from specc.lowerings import REGISTRY, fold_ssd, ssd, ssd_replay, ssd_snapshot
from specc.lowerings.triton_kernels import obstacle
from tests.lowerings.pools import bits
from tests.lowerings.ssd_calls import INF, Replay, Shape, Text, drift, oracle, text

LIMITS = settings(max_examples=40, deadline=None)
needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
POOLS = (torch.float32, torch.bfloat16)

shapes = st.builds(
    lambda groups, each, **rest: Shape(heads=groups * each, groups=groups, **rest),
    st.sampled_from([1, 2]),
    each=st.sampled_from([1, 3]),
    dim=st.sampled_from([16, 24]),
    size=st.sampled_from([16, 40]),
    skip=st.booleans(),
    bias=st.booleans(),
    softplus=st.booleans(),
    limits=st.sampled_from([(0.0, INF), (0.01, 0.3)]),
)


def close(ours: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = float(expected.abs().max()) + 1e-3 if expected.numel() else 1.0
    torch.testing.assert_close(ours.double(), expected.double(), rtol=0, atol=tolerance * scale)


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype == torch.float32 else 1e-2


@pytest.mark.parametrize("dtype", POOLS)
@LIMITS
@given(data=st.data(), shape=shapes, tokens=st.sampled_from([1, 2, 7, 16, 17, 64, 65, 130]))
def test_ssd_is_the_recurrence(data: st.DataObject, shape: Shape, tokens: int, dtype: torch.dtype) -> None:
    of = text(shape, 2, tokens)
    block = tuple(each if each is None else each.to(dtype) for each in of.block([0, 0], tokens))
    of = Text(shape, block[0], block[1], *block[3:5], block[2], *block[5:])
    initial = data.draw(st.sampled_from([None, *POOLS]))
    state = torch.randn(2, shape.heads, shape.dim, shape.size)
    state = state if initial is None else state.to(initial)
    y, final = ssd(*block, None if initial is None else state, *of.options)
    expected, states = oracle(of, torch.zeros_like(state) if initial is None else state)
    assert (y.dtype, final.dtype) == (dtype, torch.float32)
    close(y, expected, tolerance(dtype))
    close(final, states[:, -1])


def test_no_tokens() -> None:
    of = text(Shape(), 1, 0)
    state = torch.randn(1, 4, 16, 16)
    y, final = ssd(*of.block([0], 0), state, *of.options)
    assert y.shape == (1, 0, 4, 16)
    assert torch.equal(final, state)


def test_long_decays_stay_finite() -> None:
    """Only differences of sums of A d are exponentiated."""
    of = text(Shape(bias=False, softplus=False), 1, 200)
    of.dt.fill_(9.0)
    of.a.fill_(-5.0)
    y, final = ssd(*of.block([0], 200), torch.randn(1, 4, 16, 16), *of.options)
    close(y, oracle(of, torch.zeros(1, 4, 16, 16))[0])
    assert bool(final.isfinite().all())


class Steps:
    """Blocks drawn one by one: tokens of each, and how many are right in each row."""

    def __init__(self, data: st.DataObject, rows: int, most: int) -> None:
        self.tokens = data.draw(st.lists(st.integers(1, most), min_size=1, max_size=6))
        self.good = [
            data.draw(st.lists(st.integers(0, n), min_size=rows, max_size=rows)) for n in self.tokens
        ]

    def __iter__(self) -> Any:
        return iter(zip(self.tokens, self.good, strict=True))


@pytest.mark.parametrize("pool", POOLS)
@LIMITS
@given(data=st.data(), shape=shapes, every=st.sampled_from([1, 4, 16]))
def test_replay_is_the_recurrence(data: st.DataObject, shape: Shape, every: int, pool: torch.dtype) -> None:
    """Blocks of changing length, wherever boundaries lie, drafts dropped, each row at its own pace."""
    of = text(shape, 2, 100)
    replay = Replay(of, [5, 0], [2, 0], ring_size=every + 2 * 16 - 1, flush_every=every, pool=pool)
    expected, states = oracle(of, replay.first, every, pool)
    close_enough = tolerance(pool)
    for tokens, good in Steps(data, 2, 16):
        at = (replay.seq - replay.start).tolist()
        for row, y in enumerate(replay.feed(tokens, good)):
            close(y, expected[row, at[row] : at[row] + good[row]], close_enough)
        folded = (replay.base[replay.slots] - replay.start).tolist()
        assert all(count % every == 0 for count in folded)
        for row, slot in enumerate(replay.slots.tolist()):
            close(replay.state[slot], states[row, folded[row]], close_enough)
    assert bool(replay.state[[1, 3]].isnan().all())
    assert all(bool(ring[[1, 3]].isnan().all()) for ring in replay.rings)


def assert_same_bits(
    shape: Shape, every: int, pool: torch.dtype, plans: list[list[int]], make: Callable[..., Replay] = Replay
) -> None:
    """One text in blocks of one token, and in those of each plan, the rest of a block of 16 wrong."""
    total = min(map(sum, plans))
    of = text(shape, 2, total)
    outputs, first = [], None
    for plan in [[1] * total, *plans]:
        replay = make(of, [3, 9], [1, 0], ring_size=every + 31, flush_every=every, pool=pool)
        first = replay.first if first is None else first
        replay.state[replay.slots] = first
        rows: list[list[Tensor]] = [[], []]
        for good in plan:
            for row, y in enumerate(replay.feed(1 if len(plan) == total else min(good + 2, 16), [good] * 2)):
                rows[row].append(y)
        outputs.append([torch.cat(row)[:total] for row in rows])
    for other in outputs[1:]:
        for ours, plain in zip(other, outputs[0], strict=True):
            assert torch.equal(bits(ours), bits(plain))


PLANS = [[7, 1, 16, 3, 13], [2] * 20, [16, 16, 8], [1, 7, 3, 1, 7, 3, 1, 7, 3, 7], [0, 5, 11, 0, 16, 8]]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("every", [1, 4, 16])
def test_the_bits_do_not_depend_on_the_blocks(every: int, pool: torch.dtype) -> None:
    assert_same_bits(Shape(), every, pool, PLANS)


@pytest.mark.parametrize("every", [1, 4, 16])
def test_drafts_that_are_not_final_are_read_but_not_stored(every: int) -> None:
    of = text(Shape(), 2, 60)
    replay = Replay(of, [0, 4], [0, 1], ring_size=every + 40, flush_every=every)
    expected, states = oracle(of, replay.first)
    replay.feed(5, [5, 3])
    at = (replay.seq - replay.start).tolist()
    for drafted in range(12):
        for row, y in enumerate(replay.feed(1, [1, 1], final=False)):
            close(y, expected[row, at[row] + drafted : at[row] + drafted + 1])
    assert bool((replay.base <= replay.final.max()).all())
    replay.drop()
    for row, y in enumerate(replay.feed(14, [14, 14])):
        close(y, expected[row, at[row] : at[row] + 14])
    folded = (replay.base - replay.start.new_tensor([0, 4, 0])).tolist()
    for row in range(2):
        close(replay.state[row], states[row, folded[row]])


def call(shape: Shape, batch: int, tokens: int, pool: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """A replay call of ``batch`` rows with 3 final records and more each."""
    of = text(shape, batch, 60)
    replay = Replay(
        of, [4 * row for row in range(batch)], list(range(batch)), ring_size=40, flush_every=4, pool=pool
    )
    replay.feed(8, [3 + row for row in range(batch)])
    block = of.block((replay.seq - replay.start).tolist(), tokens)
    lens = replay.base, replay.seq, replay.final, replay.slots
    return *block, replay.state, *replay.rings, *lens, *of.options, 4, True


@pytest.mark.parametrize("by", ["slots", "seq_lens"])
def test_dead_rows_give_nothing_and_touch_nothing(by: str) -> None:
    args = list(call(Shape(), 3, 5))
    pools = args[7:11]
    args[14] = torch.tensor([1, 0, 2])
    position, value = {"slots": (14, torch.tensor([1, -1, 2])), "seq_lens": (12, args[12].clone())}[by]
    if by == "seq_lens":
        value[1] = -1
    before = [pool.clone() for pool in pools]
    alone = [each.clone() if isinstance(each, Tensor) else each for each in args]
    args[position] = value
    y = ssd_replay(*args)
    whole = ssd_replay(*alone)
    assert not bool(y[1].any())
    assert torch.equal(y[[0, 2]], whole[[0, 2]])
    for pool, old, other in zip(pools, before, alone[7:11], strict=True):
        assert torch.equal(bits(pool[0]), bits(old[0]))
        assert torch.equal(bits(pool[[1, 2]]), bits(other[[1, 2]]))
    args[14] = torch.tensor([-1, -1, -1])
    before = [pool.clone() for pool in pools]
    assert not bool(ssd_replay(*args).any())
    assert all(torch.equal(bits(pool), bits(old)) for pool, old in zip(pools, before, strict=True))


def token_by_token(of: Text, block: tuple[Tensor, ...], state: Tensor, y: Tensor, snapshots: Tensor) -> None:
    """The same bits, whatever the block: states are rounded after each token."""
    x, dt, a, b, c, *rest = block
    for t in range(x.shape[1]):
        one = (*(each[:, t : t + 1] for each in (x, dt)), a, *(each[:, t : t + 1] for each in (b, c)), *rest)
        alone, states = ssd_snapshot(*one, state, None, *of.options)
        assert torch.equal(alone[:, 0], y[:, t])
        assert torch.equal(states[:, 0], snapshots[:, t])
        state = states[:, 0]


@pytest.mark.parametrize("pool", POOLS)
def test_replay_is_snapshot_is_ssd(pool: torch.dtype) -> None:
    of = text(Shape(), 2, 8)
    replay = Replay(of, [0, 0], [1, 0], ring_size=40, flush_every=16, pool=pool)
    first = replay.first.clone()
    ys = torch.stack(replay.feed(8, [8, 8]))
    block = of.block([0, 0], 8)
    y, final = ssd(*block, first, *of.options)
    close(ys, y)
    snapshot_y, snapshots = ssd_snapshot(*block, replay.state, replay.slots, *of.options)
    assert torch.equal(snapshot_y[:, 0], y[:, 0])
    assert torch.equal(snapshot_y, y) or pool == torch.bfloat16
    assert snapshots.dtype == pool
    token_by_token(of, block, replay.state[replay.slots], snapshot_y, snapshots)
    close(snapshots, oracle(of, first)[1][:, 1:], tolerance(pool))
    fold_ssd(replay.state, of.a, *replay.rings, replay.base, replay.seq, replay.slots, None, None)
    close(replay.state[replay.slots], final, tolerance(pool))
    # Snapshots are rounded after each token, a checkpoint where it moves.
    assert torch.equal(replay.state[replay.slots], snapshots[:, -1]) or pool == torch.bfloat16
    close(replay.state[replay.slots], snapshots[:, -1], tolerance(pool))


def test_a_snapshot_of_a_dead_row_is_zero() -> None:
    of = text(Shape(), 2, 3)
    state = torch.randn(1, 4, 16, 16)
    y, snapshots = ssd_snapshot(*of.block([0, 0], 3), state, torch.tensor([-1, 0]), *of.options)
    assert not bool(y[0].any())
    assert not bool(snapshots[0].any())
    assert torch.equal(y[1], ssd(*of.block([0, 0], 3), state[[0, 0]], *of.options)[0][1])


@LIMITS
@given(data=st.data(), pool=st.sampled_from(POOLS))
def test_fold_ends_where_it_is_told(data: st.DataObject, pool: torch.dtype) -> None:
    of = text(Shape(), 3, 20)
    replay = Replay(of, [7, 0, 2], [2, 0, 3], ring_size=23, flush_every=100, pool=pool)
    replay.feed(16, [16, 9, 1])
    states = oracle(of, replay.first)[1]
    upto = replay.base[replay.slots] + torch.tensor([data.draw(st.integers(-2, n)) for n in (16, 9, 1)])
    track = replay.base[replay.slots] + torch.tensor([data.draw(st.integers(0, n)) for n in (16, 9, 1)])
    track_slots = torch.tensor([1, 4, -1]) if data.draw(st.booleans()) else None
    before = replay.state.clone()
    slots = torch.tensor([2, -1, 3])
    fold_ssd(replay.state, of.a, *replay.rings, replay.base, upto, slots, track_slots, track)
    expected = before.clone()
    for row, slot in ((0, 2), (2, 3)):
        count = int(upto[row] - replay.base[slot])
        if count > 0:
            expected[slot] = states[row, count].to(pool)
    if track_slots is not None and int(track[0]) > 7:
        expected[1] = states[0, int(track[0]) - 7].to(pool)
    for slot in range(5):
        if torch.equal(bits(expected[slot]), bits(before[slot])):
            assert torch.equal(bits(replay.state[slot]), bits(before[slot]))
        else:
            close(replay.state[slot], expected[slot], tolerance(pool))


def test_opcheck_of_the_edges() -> None:
    for shape, tokens, pool in (
        (Shape(skip=False, bias=False), 1, torch.float32),
        (Shape(), 7, torch.bfloat16),
    ):
        args = call(shape, 2, tokens, pool)
        torch.library.opcheck(REGISTRY["ssd_replay"].overload, args)
        torch.library.opcheck(REGISTRY["ssd_replay"].overload, (*args[:14], None, *args[15:]))
        folding = args[7], args[2], *args[8:12], args[12]
        torch.library.opcheck(REGISTRY["fold_ssd"].overload, (*folding, None, None, None))
        snapshot = *args[:8], None, *args[15:18]
        torch.library.opcheck(REGISTRY["ssd_snapshot"].overload, snapshot)
    torch.library.opcheck(REGISTRY["ssd"].overload, (*args[:7], None, *args[15:18]))


KERNELS = ("ssd_replay", "fold_ssd", "ssd_snapshot")


@needs_triton
@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize("name", KERNELS)
def test_a_gpu_takes_triton(name: str, hip: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        sample = REGISTRY[name].sample("cuda")
    monkeypatch.setattr(torch.version, "hip", hip)
    assert REGISTRY[name].choose(*sample).provider.name == "triton"


@pytest.mark.parametrize("name", KERNELS)
def test_a_cpu_takes_the_loops_as_one_call(name: str) -> None:
    """In a compiled graph, the reference itself would be unrolled."""
    decision = REGISTRY[name].choose(*REGISTRY[name].sample("cpu"))
    assert decision.describe() == "loops (not triton: needs a CUDA or HIP device, got cpu)"
    assert not decision.provider.inline


def transposed(x: Tensor) -> Tensor:
    """Of the same shape, with the last two dimensions exchanged in memory."""
    return x.new_empty(*x.shape[:-2], x.shape[-1], x.shape[-2]).mT


REFUSALS: list[tuple[str, int, Callable[[Any], Any], str]] = [
    ("ssd_replay", 0, lambda x: x.double(), "needs rings of the block's dtypes, got torch.bfloat16"),
    ("ssd_replay", 0, transposed, "needs x, B and C contiguous in the last dim"),
    ("ssd_replay", 4, lambda c: c.float(), "no kernel for blocks of torch.bfloat16, .*, torch.float32"),
    ("ssd_replay", 7, lambda state: state.double(), "no kernel for states of torch.float64"),
    ("ssd_replay", 7, lambda state: state.new_empty(3, 4, 32, 512), "up to N = 256, got 512"),
    ("ssd_replay", 8, transposed, "needs the state and its rings contiguous"),
    ("ssd_replay", 11, lambda base: base.int(), "no kernel for base of torch.int32"),
    ("ssd_replay", 12, lambda lens: lens.int(), "no kernel for seq_lens of torch.int32"),
    ("ssd_replay", 14, lambda slots: slots.short(), "no kernel for slots of torch.int16"),
    ("ssd_replay", 14, lambda slots: slots.cpu(), "needs all tensors on one device, got cpu, cuda:0"),
    ("fold_ssd", 6, lambda upto: upto.int(), "no kernel for upto of torch.int32"),
    ("fold_ssd", 8, lambda slots: slots.short(), "no kernel for track_slots of torch.int16"),
    ("ssd_snapshot", 7, transposed, "contiguous in the last dimension"),
]


@pytest.mark.parametrize(("name", "position", "change", "why"), REFUSALS)
def test_triton_says_what_it_cannot_serve(
    name: str, position: int, change: Callable[[Any], Any], why: str
) -> None:
    with FakeTensorMode():
        args = list(REGISTRY[name].sample("cuda"))
        args[position] = change(args[position])
        with pytest.raises(ProviderError, match=why):
            REGISTRY[name].choose(*args, forced="triton")


def test_no_drift_over_many_rounds() -> None:
    assert drift(ssd_replay, 300) < 2e-5
