"""Under ``mode="verify"``, recurrent layers leave their states to a commit that takes over what was right.

Over specc's cache each recurrence stands over ``specc::recurrent_state``. It becomes the replay operator,
which reads a checkpoint and rings, or, where the cache keeps states, the snapshot operator.

Over another model's cache the graph stops writing windows and states back. Beside its outputs it returns what
``specc.commit`` needs to do so later: the convolutions' inputs, and the recurrences' records or snapshots.
After SGLang's update_mamba_state_after_mtp_verify and ReplaySSM (Dao AI Lab).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch.fx import GraphModule, Node

from specc.compat import OpOverload
from specc.errors import UnsupportedError
from specc.lowerings import causal_conv1d, conv_inputs, recurrent_state
from specc.passes.convolution_sites import joined, suffix_of
from specc.passes.framework import (
    DynamoInserter,
    Pass,
    PassContext,
    PassResult,
    Sites,
    call_arguments,
    erase_unused,
    overload_of,
    source_line,
    tensor_of,
)
from specc.passes.in_place import Changes, memory_of
from specc.passes.recurrences import RECURRENCES, GraphRecords, Kind, Recurrence, StateRecords

NAME = "state_commit"

# At boundaries a state is rounded to its dtype. A block of up to so many tokens meets none.
BOUNDARY = 16


def run(gm: GraphModule, context: PassContext) -> PassResult:
    sites = Sites(NAME)
    if context.options.mode == "verify":
        _Rewriter(gm, context, sites).run()
    return sites.result


def records_of(gm: GraphModule) -> GraphRecords | None:
    """What the pass has a graph return besides its outputs, if anything."""
    return gm.meta.get(NAME)


@dataclasses.dataclass(frozen=True)
class _Left:
    """``state`` is left to a commit, which needs ``records``: what they are where ``node`` reads it."""

    kind: Kind
    node: Node
    state: Node
    records: tuple[Node, ...]
    l2norm: bool = False


class _Rewriter:
    """Rewrites one verify graph; ``UnsupportedError`` leaves it unusable."""

    def __init__(self, gm: GraphModule, context: PassContext, sites: Sites) -> None:
        self._gm = gm
        self._options = context.options
        self._sites = sites
        self._inputs = gm.graph.find_nodes(op="placeholder")
        self._left: list[_Left] = []
        self._made: dict[Any, Node] = {}

    def run(self) -> None:
        for node in list(self._gm.graph.nodes):
            if node.target in RECURRENCES:
                self._recurrence(node, RECURRENCES[overload_of(node)])
            elif node.target is causal_conv1d.overload:
                self._convolution(node)
        for node in self._gm.graph.find_nodes(op="call_function", target=recurrent_state):
            if node.users:
                _refuse(next(iter(node.users)), "reads a recurrent state as no recurrence does")
            self._gm.graph.erase_node(node)
        self._check_untouched()
        self._return_records()

    def _recurrence(self, node: Node, forms: Recurrence) -> None:
        state = call_arguments(node)["state"]
        if isinstance(state, Node) and state.target is recurrent_state:
            self._over_pool(node, state, forms)
        elif isinstance(state, Node) and state.op == "placeholder":
            self._over_input(node, state, forms)
        else:
            _refuse(node, "starts from no cached state: read prompts without mode='verify'")

    # --- over specc's cache ---

    def _over_pool(self, node: Node, stand_in: Node, forms: Recurrence) -> None:
        for write in [user for user in stand_in.users if user.target == "copy_"]:
            if write.users or write.args[0] is not stand_in:
                _refuse(node, "has its state read behind it")
            self._gm.graph.erase_node(write)
        given = call_arguments(stand_in)
        lengths = (given["base"], given["seq_lens"], given["final_lens"])
        make = DynamoInserter(self._gm.graph, node, node)
        if given["rings"]:
            where = (given["state"], *given["rings"], *lengths, None)
            y = self._call(make, node, forms.replay, where, (given["flush_every"], given["exact"]))
            done = forms.replay
        else:
            y = self._from_snapshots(make, node, forms, given["state"], given["seq_lens"])
            done = forms.snapshot
        self._replace(node, y)
        self._sites.fired(node, f"recurrence over specc's cache is {_name(done)}")

    def _from_snapshots(
        self, make: DynamoInserter, node: Node, forms: Recurrence, ring: Node, seq_lens: Node
    ) -> Node:
        """The state behind position p lies in entry p % R of ``ring`` [B, R, ...]."""
        size = _size(make, ring, 1)
        rows = self._once(("rows",), lambda: _arange(make, seq_lens, 0))

        def last() -> Node:
            return make.call(operator.mod, make.call(operator.sub, seq_lens, 1), size)

        def entries() -> Node:
            tokens = _arange(make, node.all_input_nodes[0], 1)
            positions = make.call(operator.add, make.method("unsqueeze", seq_lens, 1), tokens)
            return make.call(operator.mod, positions, size)

        before = self._once(("last", seq_lens, str(size)), last)
        state = make.call(operator.getitem, ring, (rows, before))
        pair = self._call(make, node, forms.snapshot, (state, None))
        y, snapshots = (make.call(operator.getitem, pair, i) for i in (0, 1))
        block = self._once(("entries", seq_lens, str(size), str(tensor_of(y).shape[1])), entries)
        column = self._once(("column",), lambda: make.method("unsqueeze", rows, 1))
        make.method("index_put_", ring, (column, block), snapshots)
        return y

    # --- over a cache that is an input of the graph ---

    def _over_input(self, node: Node, state: Node, forms: Recurrence) -> None:
        final = next((user for user in node.users if user.args[1] == 1), None)
        write = self._write_back(node, state)
        if final is None or _uncast(write.args[1]) is not final:
            _refuse(node, f"is not what {write.name} writes back to its state")
        self._forget(write, state)
        make = DynamoInserter(self._gm.graph, node, node)
        given = call_arguments(node)
        if self._options.state_commit == "snapshot":
            pair = self._call(make, node, forms.snapshot, (state, None))
            y, snapshots = (make.call(operator.getitem, pair, i) for i in (0, 1))
            self._left.append(_Left("snapshots", pair, state, (snapshots,)))
            done = forms.snapshot
        else:
            rings = [
                make.call(torch.empty_like, given[name], dtype=dtype, memory_format=torch.contiguous_format)
                for name, dtype in forms.rings
            ]
            start = self._zero_lengths(make, node)
            where = (state, *rings, start, start, start, None)
            y = self._call(make, node, forms.replay, where, (BOUNDARY, bool(self._options.exact)))
            kept = (*rings, given["A"]) if forms.kind == "ssd" else tuple(rings)
            self._left.append(_Left(forms.kind, y, state, kept, given.get("l2norm", False)))
            done = forms.replay
        self._replace(node, y)
        self._sites.fired(node, f"recurrence leaves its state to a commit: {_name(done)}")

    def _convolution(self, node: Node) -> None:
        given = call_arguments(node)
        window, x = given["window"], given["x"]
        if x.target is conv_inputs.overload:
            return
        if window.op != "placeholder":
            _refuse(node, "starts from no cached window: read prompts without mode='verify'")
        write = self._write_back(node, window)
        source = write.args[1]
        both = joined(suffix_of(source)) if isinstance(source, Node) else None
        whole = both is not None and tensor_of(source).shape == tensor_of(window).shape
        if both is None or not whole or (both.window, both.x) != (window, x):
            _refuse(node, f"has its window changed by {write.name} in another way than its inputs do")
        self._forget(write, window)
        self._left.append(_Left("convolution", node, window, (x,)))
        self._sites.fired(node, "convolution leaves its window to a commit")

    def _write_back(self, node: Node, state: Node) -> Node:
        writes = [user for user in state.users if user.target == "copy_" and user.args[0] is state]
        if len(writes) != 1:
            _refuse(node, f"has its state written back {len(writes)} times, and not once")
        return writes[0]

    def _forget(self, write: Node, state: Node) -> None:
        """Erase what takes over the new state, which nothing may read."""
        memory = memory_of([state])
        node = write.next
        while node.op != "output":
            if memory & memory_of(node.all_input_nodes):
                _refuse(node, "reads a recurrent state that a commit is to write")
            node = node.next
        source = write.args[1]
        assert isinstance(source, Node)
        self._gm.graph.erase_node(write)
        erase_unused(source)

    def _zero_lengths(self, make: DynamoInserter, node: Node) -> Node:
        """int64 [B]: a state that is a row's own checkpoint, and rings that start with the block."""

        def zeros() -> Node:
            block = node.all_input_nodes[0]
            one = (slice(None), *[0] * (tensor_of(block).dim() - 1))
            return make.call(torch.zeros_like, make.call(operator.getitem, block, one), dtype=torch.int64)

        return self._once(("zeros", tensor_of(node.all_input_nodes[0]).device), zeros)

    # --- both ---

    def _call(
        self,
        make: DynamoInserter,
        node: Node,
        target: OpOverload,
        where: tuple[Any, ...],
        settings: tuple[Any, ...] = (),
    ) -> Node:
        """``target`` with ``where`` in the place of ``node``'s state."""
        given = call_arguments(node)
        place = list(given).index("state")
        arguments = list(given.values())
        return make.call(target, *arguments[:place], *where, *arguments[place + 1 :], *settings)

    def _replace(self, node: Node, y: Node) -> None:
        """Have ``y`` read in the place of ``node``'s outputs, and erase it. Nothing may read its state."""
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(y)
            elif user.users:
                _refuse(node, f"has the state behind its block read by {next(iter(user.users)).name}")
            self._gm.graph.erase_node(user)
        erase_unused(node)

    def _once(self, key: Any, build: Callable[[], Node]) -> Node:
        """What ``build`` makes; sites come in the graph's order, so it is there for all later ones."""
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]

    def _check_untouched(self) -> None:
        changes = Changes(self._gm.graph)
        # A replay operator may write its state by its schema; over a block alone it does not.
        readers = {each.node for each in self._left}
        for change, _ in changes.to(each.state for each in self._left):
            if change not in readers:
                _refuse(change, "changes a recurrent state that only a commit is to write")
        for each in self._left:
            for change, _ in changes.to(each.records, each.node.next):
                _refuse(change, "changes what a commit is to read")

    def _return_records(self) -> None:
        if not self._left:
            return
        output = self._gm.graph.output_node()
        (outputs,) = output.args
        assert isinstance(outputs, tuple | list)
        returned, states = list(outputs), []
        for each in self._left:
            numbers = tuple(range(len(returned), len(returned) + len(each.records)))
            states.append(StateRecords(each.kind, self._inputs.index(each.state), numbers, each.l2norm))
            returned += each.records
        output.args = (tuple(returned),)
        self._gm.meta[NAME] = GraphRecords(len(outputs), tuple(states))


def _refuse(node: Node, reason: str) -> NoReturn:
    raise UnsupportedError(f"mode='verify': {node.name} {reason} [{source_line(node)}]")


def _uncast(node: Any) -> Any:
    """What ``node`` casts to another dtype, if that is all it does."""
    return node.args[0] if isinstance(node, Node) and node.target == "to" else node


def _size(make: DynamoInserter, node: Node, dim: int) -> Any:
    size = tensor_of(node).shape[dim]
    return size if isinstance(size, int) else make.method("size", node, dim)


def _arange(make: DynamoInserter, node: Node, dim: int) -> Node:
    """0, 1, 2, ... for each index of a dimension."""
    return make.call(torch.arange, _size(make, node, dim), device=tensor_of(node).device)


def _name(overload: OpOverload) -> str:
    return f"specc::{overload._schema.name.removeprefix('specc::')}"


PASS = Pass(NAME, "dynamo", run)
