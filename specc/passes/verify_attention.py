"""A block's attention by ragged slots becomes unified attention by a page table, built once per graph.

The table depends on the rows' slots and lengths alone, so one ``scatter`` before the first layer serves
every layer that shares them; a pool with slots of its own, such as a sliding window's, gets its own
table. Attention that kept its mask (a tree of drafts, latent attention) never got here: canonicalize
says why. After SGLang's unified verify attention for aiter (sgl-project/sglang#23146).
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from specc.lowerings import (
    ragged_kv,
    scatter_ragged_to_page_table,
    scatter_req_to_token_to_page_table,
    unified_attention,
    verify_attention,
)
from specc.passes.framework import (
    DynamoInserter,
    Pass,
    PassContext,
    PassResult,
    Sites,
    call_arguments,
    erase_unused,
    tensor_of,
)
from specc.passes.in_place import Changes

NAME = "verify_attention"


def run(gm: GraphModule, context: PassContext) -> PassResult:
    sites = Sites(NAME)
    tables: dict[Any, tuple[Node, Node]] = {}
    changes = Changes(gm.graph)
    for node in gm.graph.find_nodes(op="call_function", target=verify_attention.overload):
        arguments = call_arguments(node)
        page_size = tensor_of(arguments["k_pages"]).shape[1]
        if not isinstance(page_size, int):
            sites.refused(node, "its page size is not known when compiling")
            continue
        changed = _changed_slots(changes, node, arguments)
        if changed is not None:
            sites.refused(node, f"its slots are changed in place by {changed.name}")
            continue
        key = (arguments["kv_indptr"], arguments["kv_indices"], arguments["max_seqlen_k"], page_size)
        shared = key in tables
        if not shared:
            tables[key] = _page_table(gm, node, arguments, page_size)
        _unify(gm, node, arguments, *tables[key])
        sites.fired(node, f"unified attention by {'the same' if shared else 'a'} page table of {page_size}s")
        erase_unused(node)
    return sites.result


def _changed_slots(changes: Changes, node: Node, arguments: dict[str, Any]) -> Node | None:
    """What changes the slots that ``node`` reads, or what they are made from, before it reads them."""
    source = _ragged(arguments["kv_indices"])
    made_from = [] if source is None else source.all_input_nodes
    slots = [arguments["kv_indptr"], arguments["kv_indices"], *made_from]
    return next((change for change, _ in changes.to(slots, source, node)), None)


def _ragged(kv_indices: Node) -> Node | None:
    """The specc::ragged_kv that made these slots."""
    source = kv_indices.args[0] if kv_indices.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target is ragged_kv.overload else None


def _page_table(gm: GraphModule, node: Node, arguments: dict[str, Any], page_size: int) -> tuple[Node, Node]:
    """The table [B, width] and the lengths, int64 [B], right behind the slots they are made from."""
    kv_indptr, kv_indices = arguments["kv_indptr"], arguments["kv_indices"]
    needed = [kv_indptr, kv_indices, arguments["max_seqlen_k"]]
    make = DynamoInserter(gm.graph, _behind(gm, [each for each in needed if isinstance(each, Node)]), node)
    width = _pages(make, arguments["max_seqlen_k"], page_size)
    source = _ragged(kv_indices)
    if source is not None and _ragged(kv_indptr) is source:
        req_to_token, kv_lens = source.args
        table = make.call(
            scatter_req_to_token_to_page_table.overload, req_to_token, None, kv_lens, page_size, width
        )
        assert isinstance(kv_lens, Node)
        return table, kv_lens
    table = make.call(scatter_ragged_to_page_table.overload, kv_indices, kv_indptr, page_size, width)
    behind = make.call(operator.getitem, kv_indptr, slice(1, None))
    before = make.call(operator.getitem, kv_indptr, slice(None, -1))
    return table, make.method("long", make.call(operator.sub, behind, before))


def _behind(gm: GraphModule, nodes: list[Node]) -> Node:
    """The first node behind all of ``nodes`` and all inputs."""
    place = max(nodes, key=list(gm.graph.nodes).index).next
    while place.op in ("placeholder", "get_attr"):
        place = place.next
    return place


def _pages(make: DynamoInserter, tokens: Any, page_size: int) -> Any:
    """ceil(tokens / page_size), for a number or a symbolic size."""
    if isinstance(tokens, int):
        return -(-tokens // page_size)
    rounded = make.call(operator.add, tokens, page_size - 1)
    return make.call(operator.floordiv, rounded, page_size)


def _unify(gm: GraphModule, node: Node, arguments: dict[str, Any], page_table: Node, seqused_k: Node) -> None:
    operands = (arguments["q"], arguments["k_pages"], arguments["v_pages"], page_table)
    lengths = (arguments["cu_seqlens_q"], seqused_k, arguments["max_seqlen_q"])
    rest = ("scale", "window", "softcap", "sinks", "k_scale", "v_scale")
    make = DynamoInserter(gm.graph, node, node)
    scoring = (arguments[name] for name in rest)
    node.replace_all_uses_with(make.call(unified_attention.overload, *operands, *lengths, *scoring))


PASS = Pass(NAME, "dynamo", run)
