"""What a Dynamo graph changes in place, and when. A change reaches every view of the same memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Graph, Node

from specc.passes.framework import changed_by, fake_value

# The memory of a tensor that does not tell, such as one within vmap: it may be any.
UNKNOWN = 0


class Changes:
    """The nodes of ``graph`` that change memory, as it is now; nodes added later must change nothing."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        changes = ((node, memory_of(changed_by(node))) for node in graph.nodes)
        self._changes = [(node, memory) for node, memory in changes if memory]

    def to(
        self, nodes: Iterable[Node], first: Node | None = None, last: Node | None = None
    ) -> Iterator[tuple[Node, int]]:
        """Nodes that change what ``nodes`` hold, from ``first`` on and before ``last``, with their places."""
        memory = memory_of(nodes)
        order = self.order()
        begin = order[first] if first is not None else 0
        end = order[last] if last is not None else len(order)
        for node, changed in self._changes:
            met = changed & memory or (memory and UNKNOWN in changed)
            if not node._erased and begin <= order[node] < end and met:
                yield node, order[node]

    def order(self) -> dict[Node, int]:
        return {node: index for index, node in enumerate(self._graph.nodes)}


def memory_of(nodes: Iterable[Node]) -> set[int]:
    """Which memory the tensors behind these nodes lie in: views share theirs with what they view."""
    found = set()
    for node in nodes:
        value = fake_value(node)
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, torch.Tensor):
                found.add(_storage(each))
    return found


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return UNKNOWN
