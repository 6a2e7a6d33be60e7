"""Proves that a captured mask is the mask of a causal chain, by computing it.

Every model family and every version of transformers spells its masks in other nodes, but a mask that
attention over a cache can use depends on nothing but how many tokens each row holds. So the nodes that
make it are taken out of the graph and run on chosen lengths, and what they return is compared with the
rule "query i of row b sees keys t <= length[b] + offset + i, of these the last ``window``", entry for
entry. A mask that depends on anything else, a tree, a padding or a bias is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from specc import compat
from specc.passes.framework import changed_by, fake_tensor, fake_value, tensor_of
from specc.passes.in_place import UNKNOWN, Changes, memory_of

# A symbolic size is tried far beyond every number the mask's own code mentions, such as a window.
MARGIN = 64
SMALL_BLOCK = 5
LARGE_BLOCK = 256
# Above this, a number in the graph is a fill value and no window.
LARGEST_WINDOW = 2**21
RANDOM_TRIALS = 3
# Entries of a mask that may be computed at once: a graph is not worth minutes of proof.
LARGEST_MASK = 2**28
# Up to this many lengths are all tried; of more, those at which the numbers of the mask's code may matter.
ALL_LENGTHS = 256
SCALING = frozenset(
    {"mul", "imul", "truediv", "itruediv", "floordiv", "ifloordiv", "div", "floor_divide", "lshift"}
)


@dataclasses.dataclass(frozen=True)
class Chain:
    """Query i of row b sees keys ``t <= lengths[b] + offset + i``, the last ``window`` of them (0: all).

    ``lengths``: the graph input that holds the rows' lengths, int [B] or one number for all rows, which
    may be a symbolic number; None where the mask is the same for every length.
    """

    lengths: Node | None
    offset: int
    window: int


class NotAChainError(Exception):
    """Why a mask is not a causal chain's."""


def prove_chain(mask: Node, rows: int, changes: Changes | None = None) -> Chain:
    """The rule that ``mask``, bool or additive [B or 1, 1, q, S], follows. Raises NotAChainError.

    ``changes``: those of the mask's graph, where they are known.
    """
    needed = _ancestors(mask)
    _check_unchanged(mask, needed, changes or Changes(mask.graph))
    program = _Program(mask, needed, _lengths_input(mask, needed, rows))
    chain = _read_rule(program)
    for sizes in program.trial_sizes():
        for lengths in program.trial_lengths(sizes):
            _check_rule(_as_positions(lengths), _visible(program.run(lengths, sizes)), chain)
    return chain


def _read_rule(program: _Program) -> Chain:
    """At the longest rows and the largest sizes: only there does a window show."""
    sizes = program.trial_sizes()[-1]
    trials = list(program.trial_lengths(sizes))
    shortest, longest = (_visible(program.run(trials[index], sizes)) for index in (0, -1))
    if program.lengths is None or _last_seen(shortest) == _last_seen(longest):
        # Past a full window, the mask stays as it is.
        return _rule_of(torch.zeros(1), longest, None)
    return _rule_of(_as_positions(trials[-1]), longest, program.lengths)


def _ancestors(mask: Node) -> list[Node]:
    needed: dict[Node, None] = {}
    pending = [mask]
    while pending:
        node = pending.pop()
        if node not in needed:
            needed[node] = None
            pending.extend(node.all_input_nodes)
    return [node for node in mask.graph.nodes if node in needed]


def _check_unchanged(mask: Node, needed: list[Node], changes: Changes) -> None:
    """What the mask is made of must not be changed in place before it is read, nor the mask ever."""
    order = changes.order()
    reads: dict[int, int] = {}
    for node in needed:
        reads |= dict.fromkeys(memory_of(node.all_input_nodes), order[node])
        if node.op == "get_attr" and fake_tensor(node) is not None:
            raise NotAChainError(f"it depends on {node.name}, a tensor of the module")
    reads |= dict.fromkeys(memory_of([mask]), len(order))
    for node, place in changes.to(needed):
        changed = memory_of(changed_by(node))
        if UNKNOWN in changed or any(place <= reads.get(each, -1) for each in changed):
            raise NotAChainError(f"{_names(changed_by(node))}, which it is made from, is changed in place")


def _names(nodes: list[Node]) -> str:
    return ", ".join(node.name for node in nodes)


def _lengths_input(mask: Node, needed: list[Node], rows: int) -> Node | None:
    """The one input that can be lengths: whole numbers, one for each row or one for all."""
    found = [node for node in needed if node.op == "placeholder" and _may_be_lengths(node, mask, rows)]
    if len(found) > 1:
        names = ", ".join(node.name for node in found)
        raise NotAChainError(f"it depends on more than one input that could be a length ({names})")
    return found[0] if found else None


def _may_be_lengths(node: Node, mask: Node, rows: int) -> bool:
    value = fake_value(node)
    if isinstance(value, torch.SymInt):
        return not any(compat.is_size(value, size) for size in tensor_of(mask).shape)
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        return False
    # A symbolic size is not compared: that would be a guard.
    return value.dim() == 0 or (
        value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] in (1, rows)
    )


class _Program:
    """The part of a graph that makes a mask, as a function of the lengths and of the number of keys."""

    def __init__(self, mask: Node, needed: list[Node], lengths: Node | None) -> None:
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in needed:
            copies[node] = graph.node_copy(node, lambda each: copies[each])
        graph.output(copies[mask])
        assert mask.graph.owning_module is not None
        self._module = GraphModule(mask.graph.owning_module, graph)
        self._inputs = [node for node in needed if node.op == "placeholder"]
        self.lengths = lengths
        self._q_size, self._k_size = [*tensor_of(mask).shape, 0, 0][2:4]
        self._rows = compat.hint(tensor_of(mask).shape[0]) if tensor_of(mask).dim() else 1
        self._q_hint = compat.hint(self._q_size)
        self._numbers = sorted({number for node in needed for number in _numbers(node)})
        self._reach = _reach(needed, max([0, *self._numbers]))

    def trial_sizes(self) -> list[tuple[int, int]]:
        """Numbers of queries and keys to try where these are symbolic: a rule must not depend on them."""
        beyond = 2 * self._reach + MARGIN
        keys = [self._k_size] if isinstance(self._k_size, int) else [beyond, 2 * beyond]
        block = min(LARGE_BLOCK, self._reach + MARGIN)
        queries = [self._q_size] if isinstance(self._q_size, int) else [SMALL_BLOCK, block]
        count = max(len(keys), len(queries))
        widest = [(queries[min(i, len(queries) - 1)], keys[min(i, len(keys) - 1)]) for i in range(count)]
        return [(q if isinstance(self._q_size, int) else min(q, max(1, k // 2)), k) for q, k in widest]

    def trial_lengths(self, sizes: tuple[int, int]) -> Iterator[Any]:
        """Empty rows, rows of any length, and rows that the block fills to the last key."""
        like = None if self.lengths is None else fake_value(self.lengths)
        if like is None:
            yield None
            return
        if isinstance(like, torch.SymInt):
            # The graph is kept for every number in this range, so the rule has to hold at its ends.
            low, high = compat.bounds(like)
            beyond = max(low, 2 * self._reach) + MARGIN
            high = beyond if high is None else min(high, beyond)
            yield from sorted({low, high, *self._telling(low, high)})
            return
        assert isinstance(like, Tensor)
        _, _, q_len, width = self.run(_real(like), sizes).shape
        longest = width - q_len
        if longest < 0:
            raise NotAChainError(f"it has {width} keys for a block of {q_len}")
        none = _real(like)
        yield none
        lengths = torch.tensor(self._telling(0, longest))
        rows = torch.arange(like.numel())
        for start in range(len(lengths)):
            yield lengths[(rows + start) % len(lengths)].view(none.shape).to(none)
        for trial in range(RANDOM_TRIALS):
            generator = torch.Generator().manual_seed(trial)
            yield torch.randint(0, longest + 1, none.shape, generator=generator).to(none)
        yield none + longest

    def _telling(self, low: int, high: int) -> list[int]:
        """Lengths at which a mask that is no chain's would show it."""
        if high - low < ALL_LENGTHS:
            return list(range(low, high + 1))
        bends = {low, (low + high) // 2, high}
        for number in self._numbers:
            bends |= {number, number - self._q_hint, high - number}
        near = {bend + i for bend in bends for i in (-1, 0, 1)}
        return sorted(length for length in near if low <= length <= high)

    def run(self, lengths: Any, sizes: tuple[int, int]) -> Tensor:
        if self._rows * math.prod(sizes) > LARGEST_MASK:
            raise NotAChainError(f"proving it takes masks of {self._rows} x {sizes[0]} x {sizes[1]} entries")
        values = [lengths if node is self.lengths else self._substitute(node, sizes) for node in self._inputs]
        state = torch.get_rng_state()
        with compat.no_modes(), torch.no_grad():
            try:
                mask = self._module(*values)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, LookupError) as error:
                raise NotAChainError(
                    f"it depends on {self._data()} ({(str(error).splitlines() or [''])[0]})"
                ) from error
        if not torch.equal(state, torch.get_rng_state()):
            torch.set_rng_state(state)
            raise NotAChainError("it is drawn at random")
        if not isinstance(mask, Tensor) or mask.device.type == "meta":
            raise NotAChainError(f"it depends on {self._data()}")
        if mask.dim() != 4 or mask.shape[1] != 1:
            raise NotAChainError(f"its shape is {list(mask.shape)} and not [B, 1, q, S]")
        return mask

    def _substitute(self, node: Node, sizes: tuple[int, int]) -> Any:
        """A stand-in for an input: sizes that show every window, tensors that have a shape but no data."""
        value = fake_value(node)
        if isinstance(value, torch.SymInt):
            return sizes[1] if compat.is_size(value, self._k_size) else sizes[0]
        if isinstance(value, Tensor):
            shape = [compat.hint(size) for size in value.shape]
            return torch.empty(shape, dtype=value.dtype, device="meta")
        return value

    def _data(self) -> str:
        inputs = (node for node in self._inputs if node is not self.lengths)
        return ", ".join(node.name for node in inputs if fake_tensor(node) is not None) or "more than lengths"


def _numbers(node: Node) -> Iterator[int]:
    """Numbers that a call is given, among them windows; not what masks are filled with."""
    found: list[int] = []

    def visit(value: Any) -> Any:
        if type(value) in (int, float) and abs(value) <= LARGEST_WINDOW:
            found.append(math.ceil(abs(value)))
        return value

    map_aggregate((node.args, node.kwargs), visit)
    return iter(found)


def _reach(needed: list[Node], largest: int) -> int:
    """The largest window that the mask's code can mention: its largest number, times what it scales by."""
    reach = largest
    for node in needed:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in SCALING:
            reach *= max([1, *_numbers(node)]) if len(node.all_input_nodes) < 2 else max(largest, 1)
    return min(reach, LARGEST_WINDOW)


def _real(like: Tensor) -> Tensor:
    """A tensor with data of the same shape, dtype and device."""
    with compat.no_modes():
        return torch.zeros(tuple(like.shape), dtype=like.dtype, device=like.device)


def _as_positions(lengths: Any) -> Tensor:
    """Lengths as [rows or 1, 1, 1, 1], to stand against a mask."""
    return torch.as_tensor(0 if lengths is None else lengths).reshape(-1, 1, 1, 1)


def _visible(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise NotAChainError(f"it holds {mask.dtype}")
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((hidden | (mask == 0)).all()):
        raise NotAChainError("it adds a bias to the scores")
    return ~hidden


def _rule_of(lengths: Tensor, visible: Tensor, source: Node | None) -> Chain:
    """Read the rule off the last query of the first row."""
    last = _last_seen(visible)
    first = int(visible[0, 0, -1].nonzero()[0])
    offset = last - (visible.shape[2] - 1) - int(lengths.flatten()[0])
    return Chain(source, offset, last - first + 1 if first else 0)


def _last_seen(visible: Tensor) -> int:
    """The last key that the last query of the first row sees."""
    seen = visible[0, 0, -1].nonzero()
    if seen.numel() == 0:
        raise NotAChainError("a query sees no key at all")
    return int(seen[-1])


def _check_rule(lengths: Tensor, visible: Tensor, chain: Chain) -> None:
    key = torch.arange(visible.shape[3], device=visible.device)
    query = torch.arange(visible.shape[2], device=visible.device)[:, None]
    start = lengths.to(visible.device) if chain.lengths is not None else 0
    position = start + chain.offset + query
    expected = key <= position
    if chain.window:
        expected = expected & (key > position - chain.window)
    if not bool(visible.any(-1).all()):
        raise NotAChainError("a query sees no key at all")
    if not bool((visible == expected).all()):
        raise NotAChainError(
            "it is not a causal chain's: a tree of drafts, a padding or a chunk keeps its mask"
        )
