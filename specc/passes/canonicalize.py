"""Bring every spelling of a specc operator on the Dynamo graph to its one overload."""

from __future__ import annotations

from torch.fx import GraphModule

from specc.compat import OpOverloadPacket
from specc.lowerings.framework import REGISTRY
from specc.passes.framework import Pass, PassContext, PassResult, Sites

NAME = "canonicalize"


def run(gm: GraphModule, context: PassContext) -> PassResult:
    """Dynamo captures ``torch.ops.specc.x`` as a packet; later passes match its ``default`` overload."""
    sites = Sites(NAME)
    packets: dict[OpOverloadPacket, object] = {
        op.overload.overloadpacket: op.overload for op in REGISTRY.values()
    }
    for packet, overload in packets.items():
        for node in gm.graph.find_nodes(op="call_function", target=packet):
            node.target = overload
            sites.fired(node, f"{packet} is {overload}")
    return sites.result


PASS = Pass(NAME, "dynamo", run)
