"""The recurrences of a captured graph, their forms, and what a verify graph returns for a commit."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch

from specc.compat import OpOverload
from specc.lowerings import (
    gated_delta_rule,
    gated_delta_rule_replay,
    gated_delta_rule_snapshot,
    ssd,
    ssd_replay,
    ssd_snapshot,
)

Kind = Literal["convolution", "gated_delta_rule", "ssd", "snapshots"]


@dataclasses.dataclass(frozen=True)
class StateRecords:
    """One state a commit writes: the graph's input ``state``, from its outputs ``records``.

    records: the inputs [B, C, T] of a convolution; k, u, g [B, T, ...] of a gated delta rule (``l2norm`` as
    its operator's); x, B, d [B, T, ...] and A [NH] of an ssd; snapshots [B, T, ...] of either.
    """

    kind: Kind
    state: int
    records: tuple[int, ...]
    l2norm: bool = False


@dataclasses.dataclass(frozen=True)
class GraphRecords:
    """What a verify graph returns behind the ``outputs`` that are its caller's."""

    outputs: int
    states: tuple[StateRecords, ...]


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """``kind``'s other forms. ``rings``: a record has this argument's shape, and this dtype or its own.

    All operators take the same arguments before and behind those that say where the state is.
    """

    kind: Kind
    replay: OpOverload
    snapshot: OpOverload
    rings: tuple[tuple[str, torch.dtype | None], ...]


RECURRENCES = {
    gated_delta_rule.overload: Recurrence(
        "gated_delta_rule",
        gated_delta_rule_replay.overload,
        gated_delta_rule_snapshot.overload,
        (("k", None), ("v", torch.float32), ("g", torch.float32)),
    ),
    ssd.overload: Recurrence(
        "ssd",
        ssd_replay.overload,
        ssd_snapshot.overload,
        (("x", None), ("B", None), ("dt", torch.float32)),
    ),
}
