"""Give products with a transposed weight to ``specc::linear``, where something beats ``aten::mm``.

Or where ``exact`` is asked for, and a library would take another kernel for more rows.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from specc.lowerings import linear
from specc.lowerings.framework import Provider
from specc.passes.framework import Pass, PassContext, PassResult, Sites, fake_tensor

NAME = "lower_linear"

aten = torch.ops.aten

IN_SLICES: Provider = next(each for each in linear.providers if each.name == "in_slices")

# Product -> positions of (x, transposed weight, bias) among its arguments.
PRODUCTS = {aten.mm.default: (0, 1, None), aten.addmm.default: (1, 2, 0)}


def run(gm: GraphModule, context: PassContext) -> PassResult:
    """Rewrite ``mm(x, t(w))`` and ``addmm(bias, x, t(w))``, unless the reference is all there is."""
    sites = Sites(NAME)
    forced = dict(context.options.providers).get(linear.name)
    exact = context.options.exact and forced is None
    for target, (x_at, weight_at, bias_at) in PRODUCTS.items():
        for node in gm.graph.find_nodes(op="call_function", target=target):
            weight = _untransposed(node.args[weight_at])
            if weight is None or node.kwargs:
                continue
            bias = None if bias_at is None else node.args[bias_at]
            if bias is not None and not _is_row(bias, weight):
                sites.refused(node, f"{bias} is added, which is no bias of one entry per output")
                continue
            operands = (node.args[x_at], weight, bias)
            values = tuple(map(fake_tensor, operands))
            if exact and IN_SLICES.supports(*values) is None:
                node.target, node.args = linear.provider_overload(IN_SLICES), operands
                sites.fired(
                    node, f"{target} takes its rows in slices, whose sums do not depend on their number"
                )
                continue
            decision = linear.choose(*values, forced=forced)
            if decision.provider.run is linear.reference:
                sites.refused(node, f"nothing beats {target} here ({decision.describe()})")
                continue
            node.target, node.args = linear.overload, operands
            sites.fired(node, f"{target} of a weight becomes specc::linear")
    return sites.result


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
