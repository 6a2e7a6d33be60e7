"""Settle which provider each specc operator takes, say so, and write it into the graph.

An inline provider's body takes the place of the call, so that Inductor can fuse it; any other choice
becomes a call of that provider's own overload (``torch.ops.specc.<op>.<provider>``). Mutating calls
are settled on the Dynamo graph, because at ATen level functionalization has wrapped them; the others
on the ATen graph, where passes may have inserted them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from specc.lowerings.framework import REGISTRY, Decision, Op
from specc.passes.framework import Pass, PassContext, PassResult, Sites, fake_value

NAME = "choose_providers"


def _run_on_dynamo(gm: GraphModule, context: PassContext) -> PassResult:
    sites = Sites(NAME)
    for node, op in _calls(gm, mutating=True):
        decision = _decide(op, node, context)
        sites.fired(node, f"{op.name} takes {decision.describe()}")
        # AOT traces into a plain Python function that is a node's target.
        node.target = (
            decision.provider.run if decision.provider.inline else op.provider_overload(decision.provider)
        )
    return sites.result


def _run_on_aten(gm: GraphModule, context: PassContext) -> PassResult:
    sites = Sites(NAME)
    for node, op in _calls(gm, mutating=False):
        decision = _decide(op, node, context)
        sites.fired(node, f"{op.name} takes {decision.describe()}")
        if not decision.provider.inline:
            node.target = op.provider_overload(decision.provider)
    return sites.result


def _calls(gm: GraphModule, mutating: bool) -> list[tuple[Node, Op]]:
    return [
        (node, op)
        for op in REGISTRY.values()
        if op.mutates == mutating
        for node in gm.graph.find_nodes(op="call_function", target=op.overload)
    ]


def _decide(op: Op, node: Node, context: PassContext) -> Decision:
    arguments = map_aggregate(node.args, _fake_argument)
    return op.choose(*arguments, forced=dict(context.options.providers).get(op.name))


def _fake_argument(argument: Any) -> Any:
    return fake_value(argument) if isinstance(argument, Node) else argument


def inline_table(context: PassContext) -> dict[Any, Callable[..., Any]]:
    """For the retrace: specc operators that still have their own name take an inline provider."""
    forced = dict(context.options.providers)

    def entry(op: Op) -> Callable[..., Any]:
        return lambda *args: op.choose(*args, forced=forced.get(op.name)).provider.run(*args)

    return {op.overload: entry(op) for op in REGISTRY.values() if not op.mutates}


ON_DYNAMO = Pass(NAME, "dynamo", _run_on_dynamo)
ON_ATEN = Pass(NAME, "aten", _run_on_aten)
