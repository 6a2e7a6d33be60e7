"""Short convolutions over a cache: what models compute over the window and the block is the block's alone.

A model convolves over ``cat([window, x])`` and drops the outputs of the window, or, over specc's cache, over
what ``specc::conv_inputs`` returns. Both become one operator that reads the window where it lies; over
specc's cache it also makes zeros of what comes of padding.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from specc.lowerings import causal_conv1d, causal_conv1d_replay, conv_inputs
from specc.passes.attention_sites import same_sizes
from specc.passes.framework import (
    DynamoInserter,
    Sites,
    call_arguments,
    erase_unused,
    fake_tensor,
    tensor_of,
)
from specc.passes.in_place import Changes, memory_of


@dataclasses.dataclass(frozen=True)
class Joined:
    """``node`` is cat([window, x], -1): window [B, C, Wc] is an input of the graph, x [B, C, q] the block."""

    node: Node
    window: Node
    x: Node


class UnfitError(Exception):
    """Why a convolution keeps its form."""


def rewrite_convolutions(gm: GraphModule, sites: Sites) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=causal_conv1d.overload):
        inputs = call_arguments(node)["x"]
        try:
            if inputs.target is conv_inputs.overload:
                _over_ring(gm, node, inputs, sites)
            elif inputs.target is torch.cat:
                _over_window(gm, node, inputs, sites)
        except UnfitError as refusal:
            sites.refused(node, f"convolution keeps its inputs: {refusal}")


def joined(node: object) -> Joined | None:
    """``node`` as a window and a block side by side, or None."""
    if not isinstance(node, Node) or node.target is not torch.cat:
        return None
    given: dict[str, Any] = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
    parts = given["tensors"]
    if given.get("dim") not in (-1, 2) or len(parts) != 2 or parts[0].op != "placeholder":
        return None
    dtypes = {tensor_of(each).dtype for each in (node, *parts)}
    return Joined(node, *parts) if len(dtypes) == 1 and tensor_of(node).dim() == 3 else None


def suffix_of(node: Node) -> Node | None:
    """The tensor [B, C, n] that ``node`` takes the last columns of, or None."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return None
    source, index = node.args
    assert isinstance(index, tuple)
    *before, last = index
    all_rows = before in ([...], [slice(None), slice(None)])
    ending = isinstance(last, slice) and last.stop is None and last.step is None
    return source if isinstance(source, Node) and all_rows and ending else None


def _over_ring(gm: GraphModule, node: Node, inputs: Node, sites: Sites) -> None:
    """conv_inputs, then a convolution from zeros, of which the block's outputs are read."""
    given, source = call_arguments(node), call_arguments(inputs)
    width = tensor_of(given["weight"]).shape[1]
    if source["width"] != width:
        raise UnfitError(f"it is {width} wide, and its inputs are for {source['width']}")
    # Its zeros are made like its inputs.
    if set(inputs.users) > {node, given["window"]}:
        raise UnfitError("something else reads them, too")
    outputs = _block_outputs(node, source["x"])
    _check_can_wait(gm, (inputs, node), source["ring"], [source["x"], source["seq_lens"]])
    operands = (source["x"], source["ring"], given["weight"], given["bias"], given["activation"])
    make = DynamoInserter(gm.graph, node, node)
    y = make.call(causal_conv1d_replay.overload, *operands, source["seq_lens"], source["slots"])
    _replace(outputs, y)
    # It writes the ring, so that it stays although nothing reads it.
    gm.graph.erase_node(inputs)
    sites.fired(y, "convolution over specc's ring is specc::causal_conv1d_replay")


def _over_window(gm: GraphModule, node: Node, inputs: Node, sites: Sites) -> None:
    """cat([window, x]), then a convolution from zeros, of which the block's outputs are read."""
    both = joined(inputs)
    if both is None:
        raise UnfitError("they are no window of a cache and a block")
    given = call_arguments(node)
    if tensor_of(both.window).shape[2] < tensor_of(given["weight"]).shape[1] - 1:
        raise UnfitError("the window before the block is too short")
    outputs = _block_outputs(node, both.x)
    early = [user for user in both.window.users if user.target == "copy_" and user in _between(inputs, node)]
    _check_can_wait(gm, (inputs, node), both.window, [both.x], early)
    make = DynamoInserter(gm.graph, node, node)
    operands = (both.x, both.window, given["weight"], given["bias"], given["activation"])
    y = make.call(causal_conv1d.overload, *operands)
    # The cache took over the new window before the convolution; now the convolution reads the old one.
    for change in reversed(early):
        y.append(change)
    _replace(outputs, y)
    sites.fired(y, "convolution over a cache's window is specc::causal_conv1d of the block")


def _block_outputs(node: Node, x: Node) -> list[Node]:
    """The users of a convolution, where all of them read its last outputs, as many as ``x`` [B, C, q] has."""
    users = list(node.users)
    if not users:
        raise UnfitError("nothing reads what comes of them")
    for user in users:
        shape = fake_tensor(user)
        if suffix_of(user) is not node or shape is None or not same_sizes(shape.shape, tensor_of(x).shape):
            raise UnfitError(f"{user.name} reads outputs that are not the block's alone")
    return users


def _replace(outputs: list[Node], y: Node) -> None:
    for output in outputs:
        output.replace_all_uses_with(y)
        erase_unused(output)


def _check_can_wait(
    gm: GraphModule,
    span: tuple[Node, Node],
    changed: Node,
    read: list[Node],
    changes: Sequence[Node] = (),
) -> None:
    """What is done to ``changed`` within ``span``, by ``changes``, may be done at its end, from ``read``."""
    first, last = span
    for change, _ in Changes(gm.graph).to([changed, *read], first.next, last):
        if change not in changes:
            raise UnfitError(f"what it is computed from is changed in place by {change.name}")
    memory = memory_of([changed])
    for node in _between(first, last):
        if node not in changes and memory & memory_of(node.all_input_nodes):
            raise UnfitError(f"{node.name} reads the cache between them and the convolution")


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next
