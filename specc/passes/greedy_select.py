"""Choose the most likely token from the logits, without the probabilities: topk(softmax(x), k=1) and its kin.

This works on ATen before decompositions, where every spelling of softmax and of topk is one call. Softmax,
a positive scale and a wider dtype keep the order of a row, so ``specc::greedy_select`` reads the logits
below all of them. It thereby tells apart logits that would round to one probability.

Everything new is placed where the graph read the logits, so that a later write to them changes nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from specc.compat import OpOverload
from specc.lowerings import greedy_select
from specc.lowerings.devices import device_kind
from specc.passes.framework import (
    Pass,
    PassContext,
    PassResult,
    Sites,
    call_arguments,
    insert_call,
    source_of,
    tensor_of,
)

NAME = "greedy_select"

aten = torch.ops.aten

SORTS = (aten.sort.default, aten.sort.stable)
REDUCTIONS = (aten.topk.default, aten.max.dim, aten.argmax.default, *SORTS)
# What turns a row's sum(exp(x - max)) into the value of its largest entry.
LARGEST_FROM_SUM: dict[Any, tuple[OpOverload, ...]] = {
    aten._softmax.default: (aten.reciprocal.default,),
    aten._log_softmax.default: (aten.log.default, aten.neg.default),
}
SCALES = (aten.div.Tensor, aten.div.Scalar, aten.mul.Tensor, aten.mul.Scalar)
ROW_SELECTIONS = (aten.select.int, aten.slice.Tensor)
CAST = aten._to_copy.default


class Platform(NamedTuple):
    """Whether a kind of device takes this rewrite, and why."""

    allowed: bool
    reason: str


PLATFORMS = {
    "cpu": Platform(True, "cpu has the operator's reference"),
    "cuda": Platform(True, "cuda has a masked, NaN-safe argmax"),
    "hip": Platform(True, "hip takes the masked, NaN-safe operator, not a vendor's argmax"),
    "npu": Platform(True, "npu has the operator's reference, which is NaN-safe"),
}


def platform(device: torch.device) -> Platform:
    """The row of ``PLATFORMS`` for ``device``; kinds that are not listed are not allowed."""
    kind = device_kind(device)
    return PLATFORMS.get(kind, Platform(False, f"greedy_select is not vouched for on {kind}"))


@dataclasses.dataclass(frozen=True)
class Site:
    """One reduction of probabilities: softmax -> steps (casts, row selections) -> reduction -> outputs."""

    softmax: Node
    steps: tuple[Node, ...]
    reduction: Node
    index: Node | None
    value: Node | None

    @property
    def scores(self) -> Node:
        """What the softmax reads."""
        return source_of(self.softmax)

    @property
    def links(self) -> list[tuple[Node, Node]]:
        """Each node from the softmax on, with the one that should be its only reader."""
        return list(itertools.pairwise((self.softmax, *self.steps, self.reduction)))


def run(gm: GraphModule, context: PassContext) -> PassResult:
    """Rewrite each reduction whose probabilities nobody else reads; a remark says why the others stay."""
    gm.graph.eliminate_dead_code()  # Readers are counted below, and dead ones do not count.
    sites = Sites(NAME)
    for target in REDUCTIONS:
        for reduction in gm.graph.find_nodes(op="call_function", target=target):
            site = _site(reduction)
            if site is not None:
                _visit(site, sites)
    return sites.result


def _site(reduction: Node) -> Site | None:
    steps: list[Node] = []
    source = call_arguments(reduction)["self"]
    while source.target == CAST or source.target in ROW_SELECTIONS:
        steps.insert(0, source)
        source = source_of(source)
    if source.target not in LARGEST_FROM_SUM:
        return None
    if reduction.target == aten.argmax.default:
        return Site(source, tuple(steps), reduction, index=reduction, value=None)
    outputs = {user.args[1]: user for user in reduction.users if user.target is operator.getitem}
    return Site(source, tuple(steps), reduction, index=outputs.get(1), value=outputs.get(0))


def _visit(site: Site, sites: Sites) -> None:
    refusal = next((reason for applies, reason in _refusals(site) if applies), None)
    if refusal is not None:
        sites.refused(site.reduction, refusal)
        return
    _rewrite(site)
    read = "index" if site.value is None else "index and value"
    why = platform(tensor_of(site.softmax).device).reason
    sites.fired(site.reduction, f"{site.reduction.target} of {site.softmax} for its {read}; {why}")


def _refusals(site: Site) -> Iterator[tuple[bool, str]]:
    arguments = call_arguments(site.reduction)
    k, dim, softmax_dim = arguments.get("k", 1), arguments["dim"], site.softmax.args[1]
    yield site.reduction.target in SORTS, "sort orders whole rows; topk(1), max and argmax select"
    yield k != 1, f"k is {k}, not 1"
    yield not arguments.get("largest", True), "largest=False selects the least likely entry"
    yield not _is_last(softmax_dim, site.softmax), f"softmax runs over dim {softmax_dim}, not the last"
    yield not _is_last(dim, site.links[-1][0]), f"the selection runs over dim {dim}, not the last"
    others = [user.name for node, reader in site.links for user in node.users if user is not reader]
    yield bool(others), f"the probabilities have another reader: {', '.join(others)}"
    yield site.index is None, "only the value is read, so no token is selected here"
    for source, step in site.links[:-1]:
        if step.target == CAST:
            yield not _stays_float(step), f"{step} is a cast to another device or kind of number"
            continue
        yield _is_last(call_arguments(step)["dim"], source), f"{step} selects in the vocabulary dim"
        late = any(_logits(site)[0] < node for node in step.all_input_nodes if node is not source)
        yield late, f"{step} selects rows by a size that is computed after the logits are read"
    allowed, reason = platform(tensor_of(site.softmax).device)
    yield not allowed, f"platform: {reason}"


def _rewrite(site: Site) -> None:
    keepdim = call_arguments(site.reduction).get("keepdim", True)
    reader, logits = _logits(site)
    with reader.graph.inserting_before(reader):
        args = (_selected(logits, site),)
        index = insert_call(reader.graph, greedy_select.overload, args, like=site.reduction)
        column = insert_call(reader.graph, aten.unsqueeze.default, (index, -1), like=site.reduction)
    if site.value is not None:
        site.value.replace_all_uses_with(_insert_value(site, column, keepdim))
    assert site.index is not None
    site.index.replace_all_uses_with(column if keepdim else index)


def _logits(site: Site) -> tuple[Node, Node]:
    """The node that first reads the logits on their way to softmax, and the logits."""
    reader, logits = site.softmax, site.scores
    # With another reader, say a view that is written to, softmax may not read what the scaling left.
    while (_is_scale(logits) or _is_widening(logits)) and len(logits.users) == 1:
        reader, logits = logits, source_of(logits)
    return reader, logits


def _insert_value(site: Site, column: Node, keepdim: bool) -> Node:
    """The largest probability, 1 / sum(exp(x - max)), or its logarithm, with softmax's own roundings."""
    graph = site.softmax.graph

    def call(target: OpOverload, *args: Any, **kwargs: Any) -> Node:
        return insert_call(graph, target, args, kwargs, like=site.reduction)

    def cast(node: Node, dtype: torch.dtype) -> Node:
        return node if tensor_of(node).dtype == dtype else call(CAST, node, dtype=dtype)

    with graph.inserting_before(site.softmax):
        rows = _selected(site.scores, site)
        # Softmax, too, computes in float32 at least and rounds once.
        rows = cast(rows, torch.promote_types(tensor_of(rows).dtype, torch.float32))
        largest = call(aten.gather.default, rows, -1, column)
        terms = call(aten.exp.default, call(aten.sub.Tensor, rows, largest))
        value = call(aten.sum.dim_IntList, terms, [-1], keepdim)
        for target in LARGEST_FROM_SUM[site.softmax.target]:
            value = call(target, value)
        for node, _ in site.links:
            value = cast(value, tensor_of(node).dtype)
    return value


def _selected(rows: Node, site: Site) -> Node:
    for step in site.steps:
        if step.target in ROW_SELECTIONS:
            rows = insert_call(step.graph, step.target, (rows, *step.args[1:]), step.kwargs, like=step)
    return rows


def _is_scale(node: Node) -> bool:
    factor = node.args[1] if node.target in SCALES else None
    return isinstance(factor, int | float) and 0 < factor < math.inf and _stays_float(node)


def _is_widening(node: Node) -> bool:
    if node.target != CAST or not _stays_float(node):
        return False
    source, result = tensor_of(source_of(node)).dtype, tensor_of(node).dtype
    return torch.promote_types(source, result) == result


def _stays_float(node: Node) -> bool:
    source, result = tensor_of(source_of(node)), tensor_of(node)
    return source.is_floating_point() and result.is_floating_point() and source.device == result.device


def _is_last(dim: Any, node: Node) -> bool:
    rank = tensor_of(node).dim()
    return rank > 0 and dim in (-1, rank - 1)


PASS = Pass(NAME, "aten", run)
