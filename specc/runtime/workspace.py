"""What a model keeps from one batch to the next: its pools, its rows and the captured step over them.

A captured step reads and writes fixed addresses, so a batch of the same kind is seated in the tensors of
the one before. A model keeps one workspace, that of its last batch; another kind of batch replaces it.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from specc import compat
from specc.options import Options
from specc.runtime.device_graph import DeviceGraph, HostLink
from specc.runtime.drafters import Drafter
from specc.runtime.masks import MaskPlan
from specc.runtime.model import BoundModel
from specc.runtime.pages import Rows
from specc.runtime.state import DecodeState


@dataclasses.dataclass(frozen=True)
class StepKey:
    """What tells two captured steps of a model apart. Never an address.

    method: how drafts are made; num_draft_tokens: D; rows, capacity: B and the tokens a row's text can
    have; num_eos, num_held: how many ids end a row, or are held back; queue: see ``device_graph.queue_of``;
    dtypes: of the model, the draft, keys and values, and states; masks: what model and draft are to see.
    """

    method: str
    num_draft_tokens: int
    rows: int
    capacity: int
    num_eos: int
    num_held: int
    device: torch.device
    queue: int
    options: Options
    device_graph: str
    prefill_chunk: int
    dtypes: tuple[torch.dtype | None, ...]
    masks: tuple[tuple[MaskPlan, tuple[int, ...]], ...]


@dataclasses.dataclass
class Workspace:
    """The tensors of a step and the step itself. ``graph`` is None until it is captured."""

    key: StepKey
    state: DecodeState
    target: BoundModel
    drafter: Drafter
    draft: weakref.ref[Any] | None
    link: HostLink
    graph: DeviceGraph | None = None
    code: tuple[object, ...] = ()
    addresses: dict[str, int] = dataclasses.field(default_factory=dict)

    def suits(self, key: StepKey, draft: Any, rows: Rows) -> bool:
        """Whether a batch of these rows can be seated here."""
        same_draft = self.draft is None or self.draft() is draft
        return self.key == key and same_draft and self.target.fits(rows) and self.drafter.fits(rows)

    def serves(self) -> bool:
        """Whether the captured step is still what would be captured now. The prompts must have been read."""
        return self.graph is not None and self.moved() is None and self._serving() == self.code

    def captured(self, graph: DeviceGraph) -> None:
        self.graph = graph
        self.code = self._serving()
        self.addresses = dict(self._inputs())

    def _serving(self) -> tuple[object, ...]:
        return self.target.serving(), self.drafter.serving()

    def moved(self) -> str | None:
        """The name of a tensor that is not where the captured step reads it, or None."""
        now = dict(self._inputs())
        names = (name for name in {**now, **self.addresses} if now.get(name) != self.addresses.get(name))
        return next(names, None)

    def _inputs(self) -> Iterator[tuple[str, int]]:
        """Every tensor that the step finds where it is, by a name of its own, and its address."""
        draft = self.draft() if self.draft is not None else None
        groups = {
            "": compat.tensors_of(self.target.model),
            "draft: ": compat.tensors_of(draft) if draft is not None else (),
            "the batch's ": self.state.buffers(),
            "the model's ": self.target.buffers(),
            "the draft model's ": self.drafter.buffers(),
        }
        for what, tensors in groups.items():
            for name, tensor in tensors:
                yield what + name, tensor.data_ptr()


_KEPT: weakref.WeakKeyDictionary[Any, Workspace] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def take(model: Any, key: StepKey, draft: Any, rows: Rows) -> Workspace | None:
    """The model's workspace, if it suits: nobody else's until ``keep``. One that does not suit is gone."""
    with _lock:
        kept = _KEPT.pop(model, None)
    return kept if kept is not None and kept.suits(key, draft, rows) else None


def keep(model: Any, workspace: Workspace) -> None:
    """Leave a workspace for the model's next batch."""
    with _lock:
        _KEPT[model] = workspace


def reset() -> bool:
    """Let go of every workspace; whether there was any."""
    with _lock:
        held = bool(_KEPT)
        _KEPT.clear()
    return held
