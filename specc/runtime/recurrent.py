"""Recurrent layers in specc's cache: a checkpoint of each row's state, and what came since.

A state cannot be cut back the way keys and values can. So a layer keeps the state as of some earlier token
(the checkpoint, at position ``base``) and rings that hold, at each position modulo their size, what that
token adds. Where a row stands is its length alone: committing a block is counting it, for all layers
at once, and tokens that were not committed are written over. The rule by which checkpoints move is in
``specc.lowerings.gated_delta_rule_replay``.
Source: ReplaySSM (Dao AI Lab, 2026: cache a state's inputs instead of its versions).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specc import leaves
from specc.errors import PoolError
from specc.lowerings import (
    Op,
    conv_inputs,
    gated_delta_rule,
    gated_delta_rule_replay,
    gated_delta_rule_snapshot,
    recurrent_state,
    ssd,
    ssd_replay,
    ssd_snapshot,
)

# Final tokens after which a checkpoint moves.
FLUSH_EVERY = 16


@dataclasses.dataclass(frozen=True)
class ConvShape:
    """A causal convolution of ``width`` taps over ``channels`` inputs of ``dtype``."""

    channels: int
    width: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class StateShape:
    """A recurrence: its state per row, and per token what each of its records holds."""

    state: tuple[int, ...]
    records: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclasses.dataclass(frozen=True)
class RecurrentShape:
    """What a layer keeps besides keys and values. ``state`` is None for layers that only convolve."""

    conv: ConvShape
    state: StateShape | None

    def bytes_per_row(self, plan: RecurrentPlan) -> int:
        conv = self.conv.channels * plan.conv_ring(self.conv.width) * self.conv.dtype.itemsize
        if self.state is None:
            return conv
        size = torch.Size(self.state.state).numel() * plan.dtype.itemsize
        if plan.snapshots:
            return conv + size * (plan.snapshot_ring + 1)
        per_token = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.state.records)
        return conv + size + per_token * plan.ring


@dataclasses.dataclass(frozen=True)
class RecurrentPlan:
    """How recurrent layers are kept. ``ahead``: the most tokens fed beyond a row's final ones.

    ``snapshots``: the state after each token in the place of records. ``dtype``: of states.
    """

    ahead: int
    flush_every: int = FLUSH_EVERY
    snapshots: bool = False
    exact: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def ring(self) -> int:
        """Records to hold: what has not been flushed, one more step's tokens, and those fed ahead."""
        return self.flush_every - 1 + 2 * self.ahead

    @property
    def snapshot_ring(self) -> int:
        return 2 * self.ahead + 1

    def conv_ring(self, width: int) -> int:
        return width - 1 + 2 * self.ahead


class RecurrentLayer:
    """One layer's buffers for B rows. ``state`` is None where the layer only convolves.

    conv: [B, R, channels]; state: [B, ...]; rings: one [B, R, ...] for each record, or, where snapshots are
    kept, ``snapshots`` [B, R, ...]. They stay where they are from batch to batch, but while fewer different
    prompts than rows are read, ``conv`` and ``state`` are of those.
    """

    def __init__(self, shape: RecurrentShape, rows: int, plan: RecurrentPlan, device: torch.device) -> None:
        self.shape = shape
        conv = shape.conv
        self._conv = torch.zeros(
            rows, plan.conv_ring(conv.width), conv.channels, dtype=conv.dtype, device=device
        )
        self._state: Tensor | None = None
        self.rings: list[Tensor] = []
        self.snapshots: Tensor | None = None
        if shape.state is not None:
            self._state = torch.zeros(rows, *shape.state.state, dtype=plan.dtype, device=device)
            if plan.snapshots:
                self.snapshots = self._state.new_zeros(rows, plan.snapshot_ring, *shape.state.state)
            else:
                self.rings = [
                    torch.zeros(rows, plan.ring, *each, dtype=dtype, device=device)
                    for each, dtype in shape.state.records
                ]
        self.conv, self.state = self._conv, self._state

    def start(self, readers: int) -> None:
        """Forget everything: that many prompts are going to be read."""
        self.conv = _blank(self._conv, readers)
        self.state = None if self._state is None else _blank(self._state, readers)

    def spread(self, rows: Tensor, seq_lens: Tensor) -> None:
        """Once prompts are read: row b continues what row ``rows[b]`` has read. seq_lens: int64 [B]."""
        self._conv.copy_(self.conv[rows])
        self.conv = self._conv
        if self._state is None or self.state is None:
            return
        self._state.copy_(self.state[rows])
        self.state = self._state
        if self.snapshots is not None:
            row = torch.arange(len(rows), device=rows.device)
            self.snapshots[row, (seq_lens - 1) % self.snapshots.shape[1]] = self.state


def _blank(kept: Tensor, rows: int) -> Tensor:
    return kept.zero_() if len(kept) == rows else kept.new_zeros(rows, *kept.shape[1:])


class RecurrentPools:
    """The recurrent layers of a cache, and how far each row's checkpoints reach.

    base: int64 [B], tokens that the checkpoints include. final_lens: int64 [B], tokens that will stay; the
    target's are its rows' lengths, a drafter's are behind them.
    """

    def __init__(
        self,
        shapes: Mapping[int, RecurrentShape],
        seq_lens: Tensor,
        plan: RecurrentPlan,
        *,
        ahead_of_final: bool,
    ) -> None:
        """``seq_lens``: the rows' own tensor, int64 [B].

        ahead_of_final: lengths will run ahead of what is final, so that final lengths are kept apart.
        """
        rows, device = len(seq_lens), seq_lens.device
        self.plan = plan
        self.layers = {index: RecurrentLayer(shape, rows, plan, device) for index, shape in shapes.items()}
        self.reading = True
        self._has_checkpoints = not plan.snapshots and any(shape.state for shape in shapes.values())
        self.base = torch.zeros_like(seq_lens)
        self.final_lens = torch.zeros_like(seq_lens) if ahead_of_final else seq_lens

    def start(self, readers: int) -> None:
        """Forget everything: that many prompts are going to be read."""
        self.reading = True
        for layer in self.layers.values():
            layer.start(readers)

    def spread(self, rows: Tensor, seq_lens: Tensor) -> None:
        """Once prompts are read, see RecurrentLayer.spread. seq_lens: int64 [B]."""
        for layer in self.layers.values():
            layer.spread(rows, seq_lens)
        self.base.copy_(seq_lens)
        self.final_lens.copy_(seq_lens)
        self.reading = False

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What a captured step reads and writes here, by name."""
        yield "base", self.base
        yield "final_lens", self.final_lens
        for index, layer in self.layers.items():
            parts = {"conv": layer.conv, "state": layer.state, "snapshots": layer.snapshots}
            parts |= {f"ring {number}": ring for number, ring in enumerate(layer.rings)}
            for name, tensor in parts.items():
                if tensor is not None:
                    yield f"layer {index} {name}", tensor

    def check_room(self, tokens: int) -> None:
        """Rings are for blocks of so many tokens; a longer one would write over what it needs."""
        if self.layers and tokens > self.plan.ahead:
            raise PoolError(
                f"a block of {tokens} tokens, where recurrent layers have room for {self.plan.ahead}: "
                f"longer blocks need pools of their own"
            )

    def advance(self) -> None:
        """After all layers of a forward: count what their checkpoints took in at its start."""
        if self._has_checkpoints and not self.reading:
            every = self.plan.flush_every
            self.base.add_((self.final_lens - self.base) // every * every)


class RecurrentView:
    """What a model's forward sees of a recurrent layer while it is fed one block.

    Stands in for ``transformers.cache_utils.LinearAttentionLayer``. It seems to record the past, because
    that has models convolve over what ``update_conv_state`` returns, whatever the block's length.
    """

    record_past = True

    def __init__(self, layer: RecurrentLayer, pools: RecurrentPools, seq_lens: Tensor) -> None:
        self._layer = layer
        self._pools = pools
        self._seq_lens = seq_lens
        self.has_previous_state = {0: True}
        self.conv_states = {0: None}

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return {0: self.state()}

    def inputs(self, x: Tensor) -> Tensor:
        """The inputs [B, C, q] of a convolution behind those before it: [B, C, width - 1 + q]."""
        layer = self._layer
        inputs = conv_inputs(x, layer.conv, self._seq_lens, None, layer.shape.conv.width)
        if self._pools.reading and not torch.compiler.is_compiling():
            at = self._seq_lens[:, None] + torch.arange(x.shape[-1], device=x.device)
            leaves.mark_padding(inputs, at < 0)
        return inputs

    def state(self) -> Tensor | None:
        """The state a block starts from: the plain one while prompts are read, later a stand-in."""
        layer, pools = self._layer, self._pools
        if layer.state is None or pools.reading:
            return layer.state
        if not torch.compiler.is_compiling():
            return leaves.hand_over(self, layer.state)
        pool = layer.state if layer.snapshots is None else layer.snapshots
        plan = pools.plan
        return recurrent_state(
            pool, layer.rings, pools.base, self._seq_lens, pools.final_lens, plan.flush_every, plan.exact
        )

    def keep(self, state: Tensor | None) -> None:
        """Take over the state after a block; only while prompts are read, for else it may not stay."""
        if self._pools.reading and state is not None:
            assert self._layer.state is not None
            self._layer.state.copy_(state)

    def gated_delta_rule(self, *args: Any) -> tuple[Tensor, None]:
        """``leaves.Recurrence``: an eager block. args: q, k, v, g, beta, scale, l2norm."""
        return self._block(gated_delta_rule_replay, gated_delta_rule_snapshot, args[:5], args[5:]), None

    def ssd(self, *args: Any) -> tuple[Tensor, None]:
        """``leaves.Recurrence``: an eager block. args: x, dt, A, B, C, D, dt_bias, softplus, limits."""
        return self._block(ssd_replay, ssd_snapshot, args[:7], args[7:]), None

    def _block(self, replay: Op, snapshot: Op, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> Tensor:
        """Outputs of a block by one of an operator's forms: around the state they take the same arguments."""
        layer, pools, plan = self._layer, self._pools, self._pools.plan
        if layer.snapshots is None:
            lengths = (pools.base, self._seq_lens, pools.final_lens)
            state = (layer.state, *layer.rings, *lengths, None)
            return replay(*tensors, *state, *settings, plan.flush_every, plan.exact)
        rows, size = layer.snapshots.shape[:2]
        row = torch.arange(rows, device=layer.snapshots.device)
        before = layer.snapshots[row, (self._seq_lens - 1) % size]
        out, states = snapshot(*tensors, before, None, *settings)
        token = torch.arange(states.shape[1], device=row.device)
        layer.snapshots[row[:, None], (self._seq_lens[:, None] + token) % size] = states
        return out


class RecurrentRecorder:
    """Stands in for a layer while the shapes of its convolution and recurrence are taken down."""

    record_past = True

    def __init__(self) -> None:
        self.conv: ConvShape | None = None
        self.recurrence: StateShape | None = None
        self.has_previous_state = {0: True}
        self.conv_states = {0: None}

    @property
    def recurrent_states(self) -> dict[int, Tensor]:
        return {0: leaves.hand_over(self, torch.empty(0))}

    @property
    def shape(self) -> RecurrentShape | None:
        return None if self.conv is None else RecurrentShape(self.conv, self.recurrence)

    def convolves(self, inputs: Tensor, width: int) -> None:
        self.conv = ConvShape(inputs.shape[1], width, inputs.dtype)

    def gated_delta_rule(self, *args: Any) -> tuple[Tensor, None]:
        q, k, v, g, beta, scale, l2norm = args
        heads, width = k.shape[2:]
        value_heads, value_width = v.shape[2:]
        records = (
            ((heads, width), k.dtype),
            ((value_heads, value_width), torch.float32),
            ((value_heads,), torch.float32),
        )
        self.recurrence = StateShape((value_heads, width, value_width), records)
        return gated_delta_rule(q, k, v, g, beta, None, scale, l2norm)[0], None

    def ssd(self, *args: Any) -> tuple[Tensor, None]:
        x, _, _, b = args[:4]
        records = (
            (tuple(x.shape[2:]), x.dtype),
            (tuple(b.shape[2:]), b.dtype),
            ((x.shape[2],), torch.float32),
        )
        self.recurrence = StateShape((*x.shape[2:], b.shape[-1]), records)
        return ssd(*args[:7], None, *args[7:])[0], None


def memory(shapes: Sequence[RecurrentShape], rows: int, plan: RecurrentPlan) -> int:
    """Bytes of the pools of these layers."""
    return rows * sum(shape.bytes_per_row(plan) for shape in shapes)
