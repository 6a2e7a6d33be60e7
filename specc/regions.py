"""Layers that are alike are compiled once: a captured graph is cut between them, and equal pieces share code.

What PyTorch calls regional compilation, on the graph instead of the model. A cut lies before a layer's
first product: behind its norm, which Inductor fuses with the sum that ends the layer before, so that no
fusion is lost. Pieces are compiled by the same pipeline as whole graphs, one after another, and run in turn.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from specc import compat
from specc.passes.framework import fake_value

log = logging.getLogger(__name__)

Compiled = Callable[..., Any]
PRODUCTS = (torch._C._nn.linear, torch.nn.functional.linear)
# The first number in a module's path tells which layer of a list it belongs to.
LAYER = re.compile(r"^(.*?)[.\[](\d+)")
SYMBOL = re.compile(r"\b[a-z]+\d+\b")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a graph: what it reads and what others read of it, and the same as a module.

    ``key``: two pieces with equal keys compute the same of inputs of the same kind, sizes that are symbols
    apart; ``symbols``: which these are, in order.
    """

    module: GraphModule
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: tuple[str, ...]
    symbols: tuple[str, ...]


def pieces_of(gm: GraphModule) -> list[Piece] | None:
    """The graph cut between its layers; None where no two pieces are alike or a value cannot cross a cut."""
    cuts = _cuts(gm.graph)
    if len(cuts) < 2:
        return None
    nodes = [node for node in gm.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    starts = [0, *(nodes.index(cut) for cut in cuts), len(nodes)]
    stretches = [nodes[start:stop] for start, stop in itertools.pairwise(starts) if start < stop]
    home = {node: number for number, stretch in enumerate(stretches) for node in stretch}
    pieces = [_piece(gm, stretch, number, home) for number, stretch in enumerate(stretches)]
    if any(not _crosses(fake_value(node)) for piece in pieces for node in piece.outputs):
        return None
    return pieces if len({piece.key for piece in pieces}) < len(pieces) else None


def compile_pieces(
    gm: GraphModule, pieces: Sequence[Piece], compile_one: Callable[[GraphModule, list[Any]], Compiled]
) -> Compiled:
    """A function of the graph's arguments that runs the pieces in turn. Equal pieces are compiled once."""
    code = _shared_code(pieces, compile_one)
    placeholders = gm.graph.find_nodes(op="placeholder")
    (results,) = gm.graph.output_node().args
    slots = {node: slot for slot, node in enumerate(placeholders)}
    for piece in pieces:
        for node in piece.outputs:
            slots[node] = len(slots)
    last_use = {node: number for number, piece in enumerate(pieces) for node in piece.inputs}
    kept = set(gm.graph.output_node().all_input_nodes)
    calls = [
        (
            compiled,
            [slots[node] for node in piece.inputs],
            [slots[node] for node in piece.outputs],
            [slots[node] for node in piece.inputs if last_use[node] == number and node not in kept],
        )
        for number, (piece, compiled) in enumerate(zip(pieces, code, strict=True))
    ]
    count = len(slots)

    def run(*arguments: Any) -> Any:
        values: list[Any] = [*arguments, *[None] * (count - len(arguments))]
        for compiled, inputs, outputs, done in calls:
            made = compiled(*[values[slot] for slot in inputs])
            for slot, value in zip(outputs, made, strict=True):
                values[slot] = value
            for slot in done:
                values[slot] = None
        return map_aggregate(results, lambda each: values[slots[each]] if isinstance(each, Node) else each)

    return run


def _shared_code(
    pieces: Sequence[Piece], compile_one: Callable[[GraphModule, list[Any]], Compiled]
) -> list[Compiled]:
    """Code for each piece. That of an equal piece serves, unless compiling it settled something of its sizes.

    Such conditions are guards on that piece's symbols, and nobody would check them for others.
    """
    kinds: dict[tuple[Any, ...], Compiled] = {}
    code = []
    for piece in pieces:
        as_it_is = (piece.key, piece.symbols)
        compiled = kinds.get(piece.key) or kinds.get(as_it_is)
        if compiled is None:
            values = [fake_value(node) for node in piece.inputs]
            before = compat.settled_sizes(values)
            compiled = compile_one(piece.module, values)
            free = compat.settled_sizes(values) == before
            kinds[piece.key if free else as_it_is] = compiled
        code.append(compiled)
    log.info("%d pieces share %d compiled functions", len(pieces), len(kinds))
    return code


def _cuts(graph: Graph) -> list[Node]:
    """The first product of each layer, in order, and the first behind them all, which is the head's."""
    products = [node for node in graph.nodes if node.op == "call_function" and node.target in PRODUCTS]
    layers = [_layer(node) for node in products]
    lists = [layer[0] for layer in dict.fromkeys(layers) if layer is not None]
    longest = max(lists, key=lists.count, default=None)
    first: dict[tuple[str, str] | None, Node] = {}
    for node, layer in zip(products, layers, strict=True):
        if layer is not None and layer[0] == longest:
            first.setdefault(layer, node)
        elif first:
            first.setdefault(None, node)
    return list(first.values())


def _layer(node: Node) -> tuple[str, str] | None:
    """The list of layers that a node's module is in, and which of them it is."""
    stack = node.meta.get("nn_module_stack") or {}
    for path, _ in reversed(stack.values()):
        match = LAYER.match(path)
        if match:
            return match.group(1), match.group(2)
    return None


def _piece(gm: GraphModule, stretch: list[Node], number: int, home: dict[Node, int]) -> Piece:
    graph = Graph()
    inputs: dict[Node, Node] = {}
    copies: dict[Node, Node] = {}
    key: list[str] = []
    names: dict[Node, str] = {}
    needed = [node for each in stretch for node in each.all_input_nodes if home.get(node) != number]
    for node in dict.fromkeys([*needed, *_sources_of_sizes(gm.graph, needed)]):
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
            names[node] = f"attribute {node.target}"
        else:
            inputs[node] = copies[node] = graph.placeholder(node.name)
            copies[node].meta.update(node.meta)
            names[node] = f"%{len(names)}"
    symbols: dict[str, str] = {}
    key += _described([fake_value(node) for node in inputs], symbols)
    for node in stretch:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        arguments = map_aggregate(
            (node.args, node.kwargs), lambda each: _Name(names[each]) if isinstance(each, Node) else each
        )
        names[node] = f"%{len(names)}"
        key.append(f"{node.op} {_called(node.target)} {arguments!r}")
    outputs = [node for node in stretch if any(home.get(user) != number for user in node.users)]
    graph.output(tuple(copies[node] for node in outputs))
    key.append(" ".join(names[node] for node in outputs))
    return Piece(GraphModule(gm, graph), tuple(inputs), tuple(outputs), tuple(key), tuple(symbols))


def _called(target: Any) -> str:
    # Operators have names of their own, though not always one object each; functions may share theirs.
    return str(target) if isinstance(target, str | compat.OpOverload) else f"{target} {id(target)}"


def _sources_of_sizes(graph: Graph, inputs: list[Node]) -> list[Node]:
    """Arguments of the graph that have, plain, the sizes that the inputs' sizes are made of.

    Code for a piece takes such a number from an argument's shape, and cannot from a multiple of it.
    """
    values = [fake_value(node) for node in inputs]
    missing = compat.symbols_in(values) - compat.plain_symbols_in(values)
    sources = []
    for node in graph.find_nodes(op="placeholder"):
        found = compat.plain_symbols_in([fake_value(node)]) & missing
        if found:
            sources.append(node)
            missing -= found
    return sources


class _Name(str):
    """The name of a value within a piece, which no string among the arguments is taken for."""

    def __repr__(self) -> str:
        return f"<{self}>"


def _crosses(value: Any) -> bool:
    return isinstance(value, Tensor | torch.SymInt | int)


def _described(values: list[Any], symbols: dict[str, str]) -> Iterator[str]:
    """All that compiled code may depend on: kinds, sizes, and which inputs share their memory.

    Symbols among the sizes get names by the order in which they come, and are added to ``symbols``.
    """
    storages: dict[int, int] = {}

    def renamed(sizes: Any) -> str:
        return SYMBOL.sub(lambda found: symbols.setdefault(found[0], f"size{len(symbols)}"), str(sizes))

    for value in values:
        if isinstance(value, Tensor):
            shared = storages.setdefault(value.untyped_storage()._cdata, len(storages))
            layout = renamed((tuple(value.shape), value.stride(), value.storage_offset()))
            yield f"{value.dtype} {value.device} {layout} storage {shared}"
        else:
            yield f"{type(value).__name__} {renamed(value)}"
