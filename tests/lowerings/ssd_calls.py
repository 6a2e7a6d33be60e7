"""Texts, pools and rings for the Mamba2 operators on any device, and what float64 makes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specc.lowerings import ssd_replay

INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads, groups, P, N, and what is optional: D, dt's bias and limits."""

    heads: int = 4
    groups: int = 2
    dim: int = 16
    size: int = 16
    skip: bool = True
    bias: bool = True
    softplus: bool = True
    limits: tuple[float, float] = (0.0, INF)
    dtype: torch.dtype = torch.float32


@dataclasses.dataclass(frozen=True)
class Text:
    """Inputs of texts: x [rows, n, NH, P], dt [rows, n, NH], b and c [rows, n, G, N]; a, d, bias [NH]."""

    shape: Shape
    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    a: Tensor
    d: Tensor | None
    bias: Tensor | None

    @property
    def options(self) -> tuple[bool, float, float]:
        return self.shape.softplus, *self.shape.limits

    def block(self, at: Sequence[int], tokens: int, good: Sequence[int] | None = None) -> tuple[Any, ...]:
        """x, dt, a, b, c, d, bias of ``tokens`` from ``at[row]`` on, those behind ``good[row]`` garbage."""
        good = [tokens] * len(at) if good is None else good
        x, dt, b, c = (_cut(each, at, tokens, good) for each in (self.x, self.dt, self.b, self.c))
        return x, dt, self.a, b, c, self.d, self.bias


def _cut(stream: Tensor, at: Sequence[int], tokens: int, good: Sequence[int]) -> Tensor:
    block = torch.randn(len(at), tokens, *stream.shape[2:]).to(stream)
    for row, (first, count) in enumerate(zip(at, good, strict=True)):
        block[row, :count] = stream[row, first : first + count]
    return block


def text(shape: Shape, rows: int, tokens: int, device: str = "cpu") -> Text:
    x = torch.randn(rows, tokens, shape.heads, shape.dim)
    dt = torch.randn(rows, tokens, shape.heads) - (1 if shape.softplus else 0)
    dt = dt if shape.softplus else dt.abs() / 4
    b, c = torch.randn(2, rows, tokens, shape.groups, shape.size) / shape.size**0.25
    x, dt, b, c = (each.to(device, shape.dtype) for each in (x, dt, b, c))
    a, d, bias = (torch.rand(shape.heads).to(device) for _ in range(3))
    return Text(shape, x, dt, b, c, -a - 0.05, d if shape.skip else None, bias if shape.bias else None)


def oracle(
    of: Text, state: Tensor, flush_every: int = 10**9, pool: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """y [rows, n, NH, P] and the states before and after each token [rows, n + 1, NH, P, N], in float64.

    ``state``: [rows, NH, P, N]. After every ``flush_every`` tokens it is rounded to ``pool``.
    """
    steps = of.dt.double() if of.bias is None else of.dt.double() + of.bias.double()
    steps = torch.nn.functional.softplus(steps) if of.shape.softplus else steps
    steps = steps.clamp(*of.shape.limits)
    x, each = of.x.double(), of.shape.heads // of.shape.groups
    b, c = (part.double().repeat_interleave(each, 2) for part in (of.b, of.c))
    state, states, outputs = state.double(), [state.double()], []
    for token in range(x.shape[1]):
        decay = (of.a.double() * steps[:, token]).exp()[..., None, None]
        added = torch.einsum("bh,bhp,bhn->bhpn", steps[:, token], x[:, token], b[:, token])
        state = decay * state + added
        y = torch.einsum("bhpn,bhn->bhp", state, c[:, token])
        outputs.append(y if of.d is None else y + of.d.double()[:, None] * x[:, token])
        if (token + 1) % flush_every == 0 and pool != torch.float32:
            state = state.to(pool).double()
        states.append(state)
    return torch.stack(outputs, 1), torch.stack(states, 1)


class Replay:
    """A pool, its rings and cursors, driven as a runtime drives them. What is not in use holds NaN.

    Row r's text starts at position ``starts[r]`` with a random state; ``slots[r]`` is its pool row.
    """

    def __init__(
        self,
        of: Text,
        starts: Sequence[int],
        slots: Sequence[int],
        *,
        ring_size: int,
        flush_every: int,
        pool: torch.dtype = torch.float32,
        run: Callable[..., Any] = ssd_replay,
    ) -> None:
        self.text, self.flush_every, self.run = of, flush_every, run
        shape, device, rows = of.shape, of.x.device, max(slots) + 2
        empty = torch.full((rows, ring_size, shape.heads, shape.dim), torch.nan, device=device)
        self.ring_x = empty.to(shape.dtype)
        self.ring_b = empty.new_full((rows, ring_size, shape.groups, shape.size), torch.nan).to(shape.dtype)
        self.ring_dt = empty.new_full((rows, ring_size, shape.heads), torch.nan)
        self.state = empty.new_full((rows, shape.heads, shape.dim, shape.size), torch.nan).to(pool)
        self.start = torch.tensor(starts, device=device)
        self.slots = torch.tensor(slots, device=device)
        self.state[self.slots] = torch.randn(len(slots), *self.state.shape[1:]).to(self.state)
        self.first = self.state[self.slots].clone()
        self.base = torch.full((rows,), -(10**6), device=device)
        self.base[self.slots] = self.start
        self.final, self.seq = self.start.clone(), self.start.clone()

    @property
    def rings(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.ring_x, self.ring_b, self.ring_dt

    def feed(self, tokens: int, good: Sequence[int], *, final: bool = True) -> list[Tensor]:
        """One block for each row, ``good[row]`` of its tokens right: their outputs, row by row.

        Not ``final``: as a drafter's tokens, which stay until ``drop``.
        """
        at = (self.seq - self.start).tolist()
        block = self.text.block(at, tokens, good)
        lens = self.seq.clone(), self.final.clone()
        y = self.run(
            *block,
            self.state,
            *self.rings,
            self.base,
            *lens,
            self.slots,
            *self.text.options,
            self.flush_every,
            True,
        )
        folded = (self.final - self.base[self.slots]).clamp(min=0) // self.flush_every * self.flush_every
        self.base[self.slots] += folded
        self.seq += torch.tensor(good, device=self.seq.device)
        if final:
            self.final = self.seq.clone()
        return [row[:count] for row, count in zip(y, good, strict=True)]

    def drop(self) -> None:
        self.seq = self.final.clone()


def drift(run: Callable[..., Any], rounds: int, device: str = "cpu") -> float:
    """The largest error, over the largest output, of many blocks of which rows take any number of tokens."""
    of = text(Shape(heads=2, groups=1), 2, 100 + rounds * 9 // 4, device)
    replay = Replay(of, [0, 3], [1, 0], ring_size=31, flush_every=16, run=run)
    expected, _ = oracle(of, replay.first)
    worst, at = expected.new_zeros(()), [0, 0]
    for number in range(rounds):
        tokens = [1, 7, 3, 4][number // 7 % 4]
        good = torch.randint(0, tokens + 1, (2,)).tolist()
        for row, y in enumerate(replay.feed(tokens, good)):
            error = y - expected[row, at[row] : at[row] + good[row]]
            worst = torch.cat([worst[None], error.abs().flatten()]).max()
            at[row] += good[row]
    return float(worst / expected.abs().max())
