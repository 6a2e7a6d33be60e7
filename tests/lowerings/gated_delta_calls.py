"""Calls of the Gated DeltaNet operators, and what they mean: one token at a time, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

NAN = float("nan")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer and its pool: ``group`` value heads read each of ``key_heads``."""

    key_heads: int = 2
    group: int = 2
    key_dim: int = 64
    value_dim: int = 64
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype = torch.float32
    l2norm: bool = True
    flush_every: int = 4
    ring_size: int = 40
    pool_rows: int = 5

    @property
    def heads(self) -> int:
        return self.key_heads * self.group

    @property
    def scale(self) -> float:
        return self.key_dim**-0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """A row with ``pending`` records behind base, of which the last ``drafts`` are not final."""

    base: int = 0
    pending: int = 0
    drafts: int = 0
    padding: bool = False


def make_block(shape: Shape, rows: int, tokens: int, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, g, beta, on ``device``."""

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(rows, tokens, heads, dim, device=device).to(shape.dtype)

    q, k = normal(shape.key_heads, shape.key_dim), normal(shape.key_heads, shape.key_dim)
    if not shape.l2norm:
        k = k / shape.key_dim**0.5
    v = normal(shape.heads, shape.value_dim)
    g = -torch.rand(rows, tokens, shape.heads, device=device)
    return q, k, v, g * 0.5, torch.rand(rows, tokens, shape.heads, device=device)


@dataclasses.dataclass
class Pool:
    """state, ring_k, ring_u, ring_g, base."""

    state: Tensor
    ring_k: Tensor
    ring_u: Tensor
    ring_g: Tensor
    base: Tensor

    @staticmethod
    def poisoned(shape: Shape, device: str = "cpu") -> Pool:
        """Everything is NaN, and base 0."""
        rows, size = shape.pool_rows, shape.ring_size

        def full(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full(dims, NAN, dtype=dtype, device=device)

        return Pool(
            full(rows, shape.heads, shape.key_dim, shape.value_dim, dtype=shape.pool_dtype),
            full(rows, size, shape.key_heads, shape.key_dim, dtype=shape.dtype),
            full(rows, size, shape.heads, shape.value_dim),
            full(rows, size, shape.heads),
            torch.zeros(rows, dtype=torch.int64, device=device),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.state, self.ring_k, self.ring_u, self.ring_g

    def clone(self) -> Pool:
        return Pool(*(each.clone() for each in (*self.tensors(), self.base)))


@dataclasses.dataclass
class Batch:
    """Rows in a pool, everything that no row owns being NaN."""

    shape: Shape
    pool: Pool
    slots: Tensor
    seq_lens: Tensor
    final_lens: Tensor

    def replay(self, block: tuple[Tensor, ...], exact: bool = True) -> tuple[Any, ...]:
        """Arguments of gated_delta_rule_replay."""
        lens = self.pool.base, self.seq_lens, self.final_lens, self.slots
        rest = self.shape.scale, self.shape.l2norm, self.shape.flush_every, exact
        return (*block, *self.pool.tensors(), *lens, *rest)

    def fold(
        self, upto: Tensor, track: tuple[Tensor | None, Tensor | None] = (None, None)
    ) -> tuple[Any, ...]:
        """Arguments of fold_gated_delta_rule."""
        return (*self.pool.tensors(), self.pool.base, upto, self.slots, *track, self.shape.l2norm)

    def snapshot(self, block: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """Arguments of gated_delta_rule_snapshot."""
        return (*block, self.pool.state, self.slots, self.shape.scale, self.shape.l2norm)

    def to(self, device: str) -> Batch:
        pool = Pool(*(each.to(device) for each in (*self.pool.tensors(), self.pool.base)))
        lens = (each.to(device) for each in (self.slots, self.seq_lens, self.final_lens))
        return Batch(self.shape, pool, *lens)

    def clone(self) -> Batch:
        return Batch(self.shape, self.pool.clone(), self.slots, self.seq_lens, self.final_lens)


def make_batch(shape: Shape, rows: list[Row], slots: list[int] | None = None) -> Batch:
    """Random states and records; ``slots`` default to 0, 1, 2, ..."""
    pool = Pool.poisoned(shape)
    slots = list(range(len(rows))) if slots is None else slots
    lens = []
    for i, (row, slot) in enumerate(zip(rows, slots, strict=True)):
        if row.padding and i % 2:
            lens.append((-1, -1))
            continue
        if row.padding:
            slots = [*slots[:i], -1, *slots[i + 1 :]]
            lens.append((40, 40))
            continue
        pool.state[slot] = (torch.randn(pool.state.shape[1:]) * 0.3).to(shape.pool_dtype)
        pool.base[slot] = row.base
        at = torch.arange(row.base, row.base + row.pending) % shape.ring_size
        _, k, u, g, _ = make_block(shape, 1, row.pending)
        pool.ring_k[slot, at], pool.ring_u[slot, at], pool.ring_g[slot, at] = k[0], u[0].float(), g[0]
        seq_len = row.base + row.pending
        lens.append((seq_len, seq_len - row.drafts))
    seq_lens, final_lens = torch.tensor(lens).T
    return Batch(shape, pool, torch.tensor(slots, dtype=torch.int32), seq_lens, final_lens)


def unit(x: Tensor, shape: Shape) -> Tensor:
    """Queries or keys [..., H, K] as float64 [..., HV, K]."""
    x = x.double()
    if shape.l2norm:
        x = x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    return x.repeat_interleave(shape.group, -2)


def step(state: Tensor, token: tuple[Tensor, ...], shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """State, o and u behind one token: float64 [..., HV, K, V] and twice [..., HV, V]."""
    q, k, v, g, beta = token
    q, k = unit(q, shape) * shape.scale, unit(k, shape)
    state = state * g.double().exp()[..., None, None]
    u = (v.double() - (state * k[..., None]).sum(-2)) * beta.double()[..., None]
    state = state + k[..., None] * u[..., None, :]
    return state, (state * q[..., None]).sum(-2), u


def replayed(batch: Batch, slot: int, upto: int, rounded: bool = True) -> Tensor:
    """A row's state before position ``upto``, float64 [HV, K, V]; ``rounded``: at boundaries."""
    shape, pool = batch.shape, batch.pool
    first, state = int(pool.base[slot]), pool.state[slot].double()
    for position in range(first, upto):
        at = slot, position % shape.ring_size
        k, u, g = unit(pool.ring_k[at], shape), pool.ring_u[at].double(), pool.ring_g[at].double()
        state = state * g.exp()[:, None, None] + k[..., None] * u[:, None]
        state = _at_boundary(state, position + 1 - first, shape) if rounded else state
    return state


def _at_boundary(state: Tensor, behind: int, shape: Shape) -> Tensor:
    return state.to(shape.pool_dtype).double() if behind % shape.flush_every == 0 else state


def expected_replay(batch: Batch, block: tuple[Tensor, ...]) -> tuple[Tensor, Pool]:
    """Outputs in float64 and the pool behind a call of gated_delta_rule_replay."""
    shape, pool = batch.shape, batch.pool.clone()
    tokens = block[0].shape[1]
    out = torch.zeros(*block[2].shape, dtype=torch.float64)
    for row, slot in enumerate(batch.slots.tolist()):
        start, final = int(batch.seq_lens[row]), int(batch.final_lens[row])
        if slot < 0 or start < 0:
            continue
        first = int(pool.base[slot])
        state = replayed(batch, slot, start)
        for t in range(tokens):
            token = tuple(each[row, t] for each in block)
            state, out[row, t], u = step(state, token, shape)
            state = _at_boundary(state, start + t + 1 - first, shape)
            at = slot, (start + t) % shape.ring_size
            pool.ring_k[at], pool.ring_u[at], pool.ring_g[at] = token[1], u.float(), token[3]
        flushed = max(0, (final - first) // shape.flush_every * shape.flush_every)
        if flushed:
            pool.state[slot] = replayed(batch, slot, first + flushed).to(shape.pool_dtype)
    return out, pool


def tolerance(shape: Shape, exact: bool = True) -> float:
    """What a result may be off, values being of the order of 1.

    A state's rounding to bfloat16 may go the other way, or, where not exact, not happen.
    """
    if shape.pool_dtype == torch.bfloat16:
        return 2e-2 if exact else 5e-2
    return {torch.float32: 3e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[shape.dtype]


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), atol=atol, rtol=atol, equal_nan=True
    )


def assert_pool(actual: Pool, expected: Pool, shape: Shape, exact: bool = True) -> None:
    """Keys and decays are copies; NaN stays where no row wrote."""
    atol = max(1e-4, tolerance(shape, exact) if shape.pool_dtype == torch.bfloat16 else 0)
    for name in ("ring_k", "ring_g"):
        theirs = getattr(expected, name)
        torch.testing.assert_close(getattr(actual, name).cpu(), theirs, atol=0, rtol=0, equal_nan=True)
    assert_close(actual.ring_u, expected.ring_u, atol)
    assert_close(actual.state, expected.state, atol)


@st.composite
def rows_of(draw: st.DrawFn, shape: Shape, tokens: int) -> list[Row]:
    """Counts at and around the boundaries, with room for the block; drafts; padding rows."""
    room = shape.ring_size - tokens
    length = shape.flush_every
    edges = [n for m in range(3) for n in (m * length - 1, m * length, m * length + 1) if 0 <= n <= room]
    pending = st.sampled_from(edges) | st.integers(0, room)
    row = st.builds(
        lambda base, pending, drafts, padding: Row(base, pending, min(drafts, pending), padding == 0),
        st.sampled_from([0, 1, 7, 1000, 2**33 + 5]),
        pending,
        st.sampled_from([0, 0, 1, 3]),
        st.integers(0, 4),
    )
    return draw(st.lists(row, min_size=1, max_size=3))


@dataclasses.dataclass(frozen=True)
class Call:
    """What a batch and a block are made of."""

    shape: Shape
    rows: tuple[Row, ...]
    slots: tuple[int, ...]
    tokens: int
    seed: int

    def make(self) -> tuple[Batch, tuple[Tensor, ...]]:
        torch.manual_seed(self.seed)
        batch = make_batch(self.shape, list(self.rows), list(self.slots))
        return batch, make_block(self.shape, len(self.rows), self.tokens)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Batches with a block of 1 to 16 tokens."""
    count = draw(st.integers(1, 16))
    shape = Shape(
        key_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 4)),
        key_dim=draw(st.sampled_from([64, 64, 128, 256, 80])),
        value_dim=draw(st.sampled_from([64, 64, 128, 256, 48])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])),
        pool_dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        l2norm=draw(st.booleans()),
        flush_every=draw(st.sampled_from([1, 4, 16])),
        ring_size=draw(st.sampled_from([33, 40])),
    )
    rows = draw(rows_of(shape, count))
    slots = draw(st.permutations(range(shape.pool_rows)))[: len(rows)]
    return Call(shape, tuple(rows), tuple(slots), count, draw(st.integers(0, 2**32 - 1)))


# What the kernel written in Gluon takes.
SHORT = Shape(key_heads=1, key_dim=128, value_dim=128, dtype=torch.bfloat16, flush_every=16, ring_size=31)


@st.composite
def short_calls(draw: st.DrawFn) -> Call:
    """Batches with a block of 2 to 8 tokens, of shapes like SHORT."""
    count = draw(st.integers(2, 8))
    shape = dataclasses.replace(
        SHORT,
        key_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        value_dim=draw(st.sampled_from([128, 128, 256])),
        l2norm=draw(st.booleans()),
        ring_size=draw(st.sampled_from([15 + 2 * count, 31 + count])),
    )
    rows = draw(rows_of(shape, count))
    slots = draw(st.permutations(range(shape.pool_rows)))[: len(rows)]
    return Call(shape, tuple(rows), tuple(slots), count, draw(st.integers(0, 2**32 - 1)))


class Rounds:
    """Rows whose blocks are verified and partly accepted, round after round, as a runtime does it."""

    def __init__(self, shape: Shape, rows: int, device: str = "cpu") -> None:
        self.shape, self.device = shape, device
        self.pool = Pool.poisoned(shape, device)
        self.slots = torch.randperm(shape.pool_rows, device=device)[:rows].int()
        size = rows, shape.heads, shape.key_dim, shape.value_dim
        start = (torch.randn(size, device=device) * 0.3).to(shape.pool_dtype)
        self.pool.state[self.slots.long()] = start
        self.seq_lens = torch.zeros(rows, dtype=torch.int64, device=device)

    def verify(self, block: tuple[Tensor, ...], replay: Any, exact: bool = True) -> Tensor:
        """Outputs of a block; base moves over what the call has flushed."""
        lens = self.pool.base, self.seq_lens, self.seq_lens, self.slots
        rest = self.shape.scale, self.shape.l2norm, self.shape.flush_every, exact
        out = replay(*block, *self.pool.tensors(), *lens, *rest)
        slot, length = self.slots.long(), self.shape.flush_every
        self.pool.base[slot] += (self.seq_lens - self.pool.base[slot]) // length * length
        return out

    def accept(self, counts: Tensor) -> None:
        self.seq_lens += counts


def drift(shape: Shape, replay: Any, exact: bool, blocks: Sequence[int], rounds: int) -> float:
    """The largest error of an output in so many rounds on a CUDA device, against one state in float64."""
    held = Rounds(shape, 3, "cuda")
    state = held.pool.state[held.slots.long()].double()
    worst = torch.zeros((), device="cuda", dtype=torch.float64)
    for number in range(rounds):
        tokens = blocks[number // 7 % len(blocks)]
        q, k, v, g, beta = make_block(shape, 3, tokens, "cuda")
        block = (q, k, v.float(), g, beta)
        out = held.verify(block, replay, exact)
        # Few of a block as a rule, for the sake of time.
        most = tokens if number % 5 == 0 else min(tokens, 2)
        counts = torch.randint(0, most + 1, (3,), device="cuda")
        for t in range(most):
            ahead, o, _ = step(state, tuple(each[:, t] for each in block), shape)
            live = (t < counts)[:, None, None]
            worst = torch.maximum(worst, torch.where(live, (out[:, t] - o).abs(), 0).max())
            state = torch.where(live[..., None], ahead, state)
        held.accept(counts)
    return float(worst)


def cut(stream: tuple[Tensor, ...], starts: Tensor, tokens: int, accepted: Tensor) -> tuple[Tensor, ...]:
    """Row b's tokens from ``starts[b]`` on, garbage behind the first ``accepted[b]``."""
    place = torch.arange(tokens, device=starts.device)
    at = (starts[:, None] + place).clamp(max=stream[0].shape[1] - 1)
    row, right = torch.arange(len(starts), device=starts.device)[:, None], place < accepted[:, None]
    block = []
    for i, each in enumerate(stream):
        garbage = torch.randn(*at.shape, *each.shape[2:], device=each.device).to(each.dtype)
        garbage = (garbage, garbage, garbage, -garbage.abs(), garbage.sigmoid())[i]
        block.append(
            torch.where(right.reshape(*right.shape, *[1] * (each.dim() - 2)), each[row, at], garbage)
        )
    return tuple(block)


def outputs_of_blocks(
    shape: Shape, stream: tuple[Tensor, ...], replay: Any, plan: Any, exact: bool = True
) -> tuple[Tensor, Pool]:
    """Outputs [B, T, HV, V] of a whole stream, and the pool, when verified as ``plan`` has it.

    plan(round) returns the block's length and how many of its tokens each row accepts, a list.
    """
    rows, length = stream[0].shape[:2]
    device = str(stream[0].device)
    torch.manual_seed(5)
    rounds = Rounds(shape, rows, device)
    out = torch.full(stream[2].shape, NAN, device=device, dtype=stream[2].dtype)
    number = 0
    while int(rounds.seq_lens.min()) < length:
        tokens, accepts = plan(number)
        counts = torch.minimum(torch.tensor(accepts, device=device), length - rounds.seq_lens)
        block = cut(stream, rounds.seq_lens, tokens, counts)
        found = rounds.verify(block, replay, exact)
        for row in range(rows):
            start, count = int(rounds.seq_lens[row]), int(counts[row])
            out[row, start : start + count] = found[row, :count]
        rounds.accept(counts)
        number += 1
    return out, rounds.pool
