"""A step of which only the forwards are device graphs: what the whole step as one graph is compared with."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from specc.bench import Call, Outcome, Way
from specc.runtime.device_graph import DeviceGraph, device_graph
from specc.runtime.model import BoundModel


class _Forward:
    """One model's forward over a block, captured; its argument and its result stay where they are."""

    def __init__(self, tokens: Tensor, forward: Callable[[Tensor], Tensor]) -> None:
        self._tokens = tokens.clone()
        self._results: list[Tensor] = []
        self._forward = forward
        self._graph: DeviceGraph = device_graph(tokens.device)
        # Run twice, a forward writes the same to the same places.
        self._graph.capture(self._program)

    def _program(self) -> None:
        self._results[:] = [self._forward(self._tokens)]

    def __call__(self, tokens: Tensor) -> Tensor:
        self._tokens.copy_(tokens)
        self._graph.replay()
        # A step keeps its drafts, and the next replay writes to the same place.
        return self._results[0].clone()


@contextmanager
def graph_per_forward() -> Iterator[None]:
    """Within this, every forward of a step is a graph of its own, and the rest of the step runs eagerly.

    Graphs are captured where forwards are warmed up, which is not part of decoding.
    """
    forwards: weakref.WeakKeyDictionary[BoundModel, _Forward] = weakref.WeakKeyDictionary()
    warm_up, call = BoundModel.warm_up, BoundModel.__call__

    def warmed_up(self: BoundModel) -> float:
        seconds = warm_up(self)
        model = weakref.ref(self)

        def forward(tokens: Tensor) -> Tensor:
            bound = model()
            assert bound is not None
            return call(bound, tokens)

        forwards[self] = _Forward(self.blank, forward)
        return seconds

    def replayed(self: BoundModel, tokens: Tensor) -> Tensor:
        return forwards[self](tokens)

    BoundModel.warm_up, BoundModel.__call__ = warmed_up, replayed  # type: ignore[method-assign]
    try:
        yield
    finally:
        BoundModel.warm_up, BoundModel.__call__ = warm_up, call  # type: ignore[method-assign]


def with_graph_per_forward(way: Way) -> Way:
    """A way whose calls run so. It must not capture steps itself (``device_graph="off"``)."""

    def prepare() -> Call:
        call = way.prepare()

        def within(new_tokens: int) -> Outcome:
            with graph_per_forward():
                return call(new_tokens)

        return within

    return dataclasses.replace(way, prepare=prepare)
