"""Settle which provider each specc operator takes, say so, and write it into the graph.

An inline provider is plain PyTorch: its function takes the operator's place, and whatever traces or
runs the graph next goes through it, so that Inductor can fuse it. Any other choice becomes a call of
that provider's own overload (``torch.ops.specc.<op>.<provider>``). Mutating calls are settled on the
Dynamo graph, because at ATen level functionalization has wrapped them; the others on the ATen graph,
where passes may have inserted them.
"""

from __future__ import annotations

import functools
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from specc.lowerings.framework import REGISTRY, Op
from specc.passes.framework import Pass, PassContext, PassResult, Sites, fake_value

NAME = "choose_providers"


def run(gm: GraphModule, context: PassContext, *, mutating: bool) -> PassResult:
    sites = Sites(NAME)
    forced = dict(context.options.providers)
    for node, op in _calls(gm, mutating):
        arguments: Any = map_aggregate(node.args, _fake_argument)
        decision = op.choose(*arguments, forced=forced.get(op.name))
        sites.fired(node, f"{op.name} takes {decision.describe()}")
        provider = decision.provider
        node.target = provider.run if provider.inline else op.provider_overload(provider)
    return sites.result


def _calls(gm: GraphModule, mutating: bool) -> list[tuple[Node, Op]]:
    return [
        (node, op)
        for op in REGISTRY.values()
        if op.mutates == mutating
        for node in gm.graph.find_nodes(op="call_function", target=op.overload)
    ]


def _fake_argument(argument: Any) -> Any:
    return fake_value(argument) if isinstance(argument, Node) else argument


ON_DYNAMO = Pass(NAME, "dynamo", functools.partial(run, mutating=True))
ON_ATEN = Pass(NAME, "aten", functools.partial(run, mutating=False))
