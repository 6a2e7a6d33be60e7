"""Bring every spelling of a specc operator on the Dynamo graph to its one form.

``torch.ops.specc.x`` becomes its overload. The attention of a stock model over its cache, however it is
spelled, becomes ``specc::verify_attention`` over ragged token slots, and what a static cache appends
becomes ``specc::kv_write``. A static cache is read and written as pages through views, without a copy.
Short convolutions over a cache and a block become one operator over both (``convolution_sites``).
"""

from __future__ import annotations

from torch.fx import GraphModule

from specc.compat import OpOverload, OpOverloadPacket
from specc.lowerings import recurrent_state
from specc.lowerings.framework import REGISTRY
from specc.passes.attention_sites import Unknown, find_sites
from specc.passes.causal_masks import NotAChainError
from specc.passes.convolution_sites import rewrite_convolutions
from specc.passes.framework import Pass, PassContext, PassResult, Sites, erase_unused
from specc.passes.kv_sources import NoCacheError
from specc.passes.paged_attention import PagedRewriter

NAME = "canonicalize"


def run(gm: GraphModule, context: PassContext) -> PassResult:
    sites = Sites(NAME)
    _settle_overloads(gm, sites)
    rewrite_convolutions(gm, sites)
    _rewrite_attention(gm, sites)
    return sites.result


def _settle_overloads(gm: GraphModule, sites: Sites) -> None:
    """Dynamo captures ``torch.ops.specc.x`` as a packet; later passes match its ``default`` overload."""
    overloads = [*(op.overload for op in REGISTRY.values()), recurrent_state]
    packets: dict[OpOverloadPacket, OpOverload] = {each.overloadpacket: each for each in overloads}
    for packet, overload in packets.items():
        for node in gm.graph.find_nodes(op="call_function", target=packet):
            node.target = overload
            sites.fired(node, f"{packet} is {overload}")


def _rewrite_attention(gm: GraphModule, sites: Sites) -> None:
    rewriter = PagedRewriter(gm)
    for site in find_sites(gm):
        if isinstance(site, Unknown):
            sites.refused(site.node, f"attention keeps its form: {site.reason}")
            continue
        try:
            reason = rewriter.rewrite(site)
        except (NoCacheError, NotAChainError) as refusal:
            sites.refused(site.node, f"attention keeps its mask: {refusal}")
        else:
            sites.fired(site.node, reason)
            erase_unused(site.node)
    for node, outcome in rewriter.rewrite_appends():
        sites.fired(node, outcome)


PASS = Pass(NAME, "dynamo", run)
