"""Give products with a transposed weight to ``specc::linear``, where something beats ``aten::mm``.

Products of the same rows become one ``specc::linears`` where a kernel takes them in one launch. Where
``exact`` is asked for and the number of rows is known, products go to a provider whose sums do not depend on
it, if there is one for their dtype and device.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import Graph, GraphModule, Node

from specc.compat import OpOverload
from specc.lowerings import linear, linears
from specc.lowerings.framework import Op, Provider
from specc.lowerings.linear import MOST, kernel_unfit
from specc.passes.framework import (
    Pass,
    PassContext,
    PassResult,
    Sites,
    changed_by,
    fake_tensor,
    insert_call,
    overload_of,
    source_of,
    tensor_of,
)

NAME = "lower_linear"

aten = torch.ops.aten


def _provider(op: Op, name: str) -> Provider:
    return next(each for each in op.providers if each.name == name)


IN_SLICES = _provider(linear, "in_slices")
ONE, SEVERAL = _provider(linear, "triton"), _provider(linears, "triton")

# Product -> positions of (x, transposed weight, bias) among its arguments.
PRODUCTS = {aten.mm.default: (0, 1, None), aten.addmm.default: (1, 2, 0)}
VIEWS = (aten.view.default, aten._unsafe_view.default)


@dataclasses.dataclass(frozen=True)
class Site:
    """One product. What it multiplies is read from the node, for other rewrites may replace that."""

    node: Node

    @property
    def x(self) -> Node:
        return source_of(self.node, self._positions[0])

    @property
    def weight(self) -> Node:
        return source_of(source_of(self.node, self._positions[1]))

    @property
    def bias(self) -> Node | None:
        return None if self._positions[2] is None else source_of(self.node, self._positions[2])

    @property
    def operands(self) -> tuple[Node, Node, Node | None]:
        return self.x, self.weight, self.bias

    @property
    def _positions(self) -> tuple[int, int, int | None]:
        return PRODUCTS[overload_of(self.node)]


def run(gm: GraphModule, context: PassContext) -> PassResult:
    """Rewrite ``mm(x, t(w))`` and ``addmm(bias, x, t(w))``, unless the reference is all there is."""
    sites = Sites(NAME)
    forced = dict(context.options.providers)
    exact = bool(context.options.exact) and linear.name not in forced
    found = list(_products(gm, sites))
    merged: set[Site] = set()
    for group in _groups(gm, found):
        place, target = _place(group), _launch(group, forced, exact)
        if place is not None and target is not None:
            _merge(group, place, target, sites)
            merged.update(group)
    for site in found:
        if site not in merged:
            _lower(site, forced.get(linear.name), exact, sites)
    return sites.result


def _products(gm: GraphModule, sites: Sites) -> Iterator[Site]:
    for target, (x_at, weight_at, bias_at) in PRODUCTS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            weight = _untransposed(node.args[weight_at])
            if weight is None or node.kwargs or not isinstance(node.args[x_at], Node):
                continue
            if bias_at is None or _is_row(node.args[bias_at], weight):
                yield Site(node)
            else:
                sites.refused(
                    node, f"{node.args[bias_at]} is added, which is no bias of one entry per output"
                )


def _groups(gm: GraphModule, found: list[Site]) -> list[list[Site]]:
    """Products of the same rows, in the order of the graph."""
    order = _order(gm.graph)
    alike: dict[object, list[Site]] = {}
    for site in sorted(found, key=lambda site: order[site.node]):
        alike.setdefault((*_rows(site.x), site.bias is None), []).append(site)
    groups = [sites[at : at + MOST] for sites in alike.values() for at in range(0, len(sites), MOST)]
    return [group for group in groups if len(group) > 1]


def _order(graph: Graph) -> dict[Node, int]:
    return {node: at for at, node in enumerate(graph.nodes)}


def _rows(x: Node) -> tuple[Node, str]:
    """What ``x`` views, and as what: each projection of a model takes a view of its own."""
    shape = str(tuple(tensor_of(x).shape))
    while x.target in VIEWS:
        x = source_of(x)
    return x, shape


def _place(group: list[Site]) -> Node | None:
    """Behind which node all products of a group can be computed, or None.

    Graphs may change tensors in place; between the products, nothing may do so.
    """
    first, last = group[0].node, group[-1].node
    order = _order(first.graph)
    operands = [each for site in group for each in (first, group[0].x, site.weight, site.bias) if each]
    place = max(operands, key=order.__getitem__)
    if any(order[user] <= order[place] for site in group for user in site.node.users):
        return None
    node = first
    while node is not last:
        if changed_by(node):
            return None
        node = node.next
    return place


def _launch(group: list[Site], forced: dict[str, str], exact: bool) -> OpOverload | None:
    """The operator that takes a group in one launch, or None."""
    weights, biases = [tensor_of(site.weight) for site in group], [fake_tensor(site.bias) for site in group]
    values = tensor_of(group[0].x), weights, biases
    if forced.get(linears.name, SEVERAL.name) != SEVERAL.name:
        return None
    if exact and _is_known(values[0]):
        return None if kernel_unfit(*values) else linears.provider_overload(SEVERAL)
    if forced.get(linear.name, SEVERAL.name) != SEVERAL.name:
        return None
    decision = linears.choose(*values, forced=forced.get(linears.name))
    return linears.overload if decision.provider is SEVERAL else None


def _merge(group: list[Site], place: Node, target: OpOverload, sites: Sites) -> None:
    graph, nodes = place.graph, [site.node for site in group]
    operands = group[0].x, [site.weight for site in group], [site.bias for site in group]
    with graph.inserting_after(place):
        launch = insert_call(graph, target, operands, like=nodes[0])
    place = launch
    for position, node in enumerate(nodes):
        others = ", ".join(str(other) for other in nodes if other is not node)
        sites.fired(node, f"{node.target} shares one launch with {others}")
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (launch, position))
        place.meta = dict(node.meta)
        node.replace_all_uses_with(place)
    for node in nodes:
        graph.erase_node(node)


def _lower(site: Site, forced: str | None, exact: bool, sites: Sites) -> None:
    node, target = site.node, site.node.target
    operands = site.operands
    values = x, weight, bias = tensor_of(site.x), tensor_of(site.weight), fake_tensor(site.bias)
    if exact and _is_known(x) and kernel_unfit(x, [weight], [bias]) is None:
        node.target, node.args = linear.provider_overload(ONE), operands
        sites.fired(node, f"{target} takes a kernel whose sums do not depend on the number of rows")
        return
    if exact and IN_SLICES.supports(*values) is None:
        node.target, node.args = linear.provider_overload(IN_SLICES), operands
        sites.fired(node, f"{target} takes its rows in slices, whose sums do not depend on their number")
        return
    decision = linear.choose(*values, forced=forced)
    if decision.provider.run is linear.reference:
        sites.refused(node, f"nothing beats {target} here ({decision.describe()})")
        return
    node.target, node.args = linear.overload, operands
    sites.fired(node, f"{target} of a weight becomes specc::linear")


def _is_known(x: torch.Tensor) -> bool:
    """Whether the number of rows is: graphs for prompts of any length are the same without drafts."""
    return isinstance(x.shape[0], int)


def _untransposed(node: object) -> Node | None:
    """The [N, K] weight behind its transpose, if rows of it lie in memory one behind the other."""
    if not isinstance(node, Node) or node.target is not aten.t.default:
        return None
    weight = node.args[0]
    value = fake_tensor(weight)
    if not isinstance(weight, Node) or value is None or not value.is_contiguous():
        return None
    return weight


def _is_row(bias: object, weight: Node) -> bool:
    value, outputs = fake_tensor(bias), fake_tensor(weight)
    return value is not None and outputs is not None and value.shape == outputs.shape[:1]


PASS = Pass(NAME, "aten", run)
