"""Compute only those rows of a linear product that are read: lm_head(h)[:, -1] becomes lm_head(h[:, -1]).

Between the product and the selection there may be reshapes of the rows and whatever treats all rows
alike, such as a cast or a soft cap. Reshapes and selections move to the hidden states; the rest follows
the smaller product. No size decides: any product qualifies, if some of its rows go unread.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from specc.compat import HigherOrderOperator, OpOverload
from specc.passes.framework import (
    Pass,
    PassContext,
    PassResult,
    Sites,
    call_arguments,
    fake_tensor,
    insert_call,
    overload_of,
    source_of,
    tensor_of,
)

NAME = "prune_logits"

aten = torch.ops.aten

# Products, and which operand holds the rows.
PRODUCTS: dict[Any, int] = {aten.mm.default: 0, aten.addmm.default: 1, aten.bmm.default: 0}
IDENTITIES = (aten.alias.default, aten.detach.default, aten.clone.default)
RESHAPES = (aten.view.default, aten._unsafe_view.default)
SELECTIONS = (aten.select.int, aten.slice.Tensor, aten.index_select.default, aten.index.Tensor)
UNHANDLED_SELECTIONS = (
    aten.gather.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
)

Role = Literal["identity", "reshape", "pointwise", "selection"]


class Step(NamedTuple):
    """One node on the way from a product to what is read of it."""

    node: Node
    source: Node
    role: Role


def run(gm: GraphModule, context: PassContext) -> PassResult:
    """Move selections of rows in front of the products they follow, where nothing else reads these."""
    gm.graph.eliminate_dead_code()  # Readers are counted below, and dead ones do not count.
    sites = Sites(NAME)
    for target in PRODUCTS:
        for product in gm.graph.find_nodes(op="call_function", target=target):
            _visit(product, sites)
    return sites.result


def _visit(product: Node, sites: Sites) -> None:
    steps = _steps(product)
    pruning = [number for number, step in enumerate(steps) if _prunes(step.node, step.source)]
    until_last = steps[: pruning[-1] + 1] if pruning else []
    refusals = _refusals(product, until_last) if pruning else _misses(product, steps)
    refusal = next((reason for applies, reason in refusals if applies), None)
    if refusal is not None:
        sites.refused(product, refusal)
    elif pruning:
        last = until_last[-1].node
        sites.fired(product, f"{_rows(last)} of {_rows(product)} rows are read, by {last.target}")
        _rewrite(product, until_last)


def _steps(product: Node) -> list[Step]:
    """The chain of single readers below ``product``, as far as each treats the rows in a known way."""
    steps: list[Step] = []
    source = product
    while len(source.users) == 1:
        (node,) = source.users
        role = _role(node, source)
        if role is None:
            break
        steps.append(Step(node, source, role))
        source = node
    return steps


def _refusals(product: Node, steps: list[Step]) -> Iterator[tuple[bool, str]]:
    several = product.target == aten.bmm.default and not _has_one_matrix(product)
    yield several, "bmm has a matrix for each batch entry"
    added = product.target == aten.addmm.default and tensor_of(source_of(product)).dim() > 1
    yield added, "addmm adds a matrix here, whose rows are not moved"
    writer = _in_place_between(product, steps[-1].node)
    yield writer is not None, f"{writer} writes in place between the product and the selection"


def _misses(product: Node, steps: list[Step]) -> Iterator[tuple[bool, str]]:
    """Why nothing is moved, where something in reach of the product selects rows, or nearly does."""
    end = steps[-1].node if steps else product
    selecting = [reader for reader in end.users if _prunes(reader, end)]
    others = [reader.name for reader in end.users if reader not in selecting[:1]]
    yield bool(selecting), f"the product has another reader: {', '.join(others)}"
    for reader in end.users:
        yield from ((True, reason) for reason in [_objection(reader, end)] if reason)
        blocked = next((each for each in reader.users if _prunes(each, reader)), None)
        yield blocked is not None, f"{reader.target} is not moved past the selection {blocked}"
    kept = [str(step.node) for step in steps if step.node.target in SELECTIONS]
    yield bool(kept), f"every row is kept by {', '.join(kept)}"


def _prunes(node: Node, source: Node) -> bool:
    """Whether ``node`` takes fewer rows than ``source`` has; in doubt about symbolic sizes, yes."""
    return _role(node, source) == "selection" and not statically_known_true(_rows(node) >= _rows(source))


def _role(node: Node, source: Node) -> Role | None:
    result, entering = fake_tensor(node), fake_tensor(source)
    if result is None or entering is None:
        return None
    same_shape = _same(result.shape, entering.shape)
    if node.args[:1] == (source,):
        if node.target in IDENTITIES or (same_shape and node.target in (aten.slice.Tensor, *RESHAPES)):
            return "identity"
        if node.target in RESHAPES and _same(result.shape[-1:], entering.shape[-1:]):
            return "reshape"
        if node.target in SELECTIONS and _objection(node, source) is None:
            return "selection"
    if same_shape and result.device == entering.device and _is_pointwise(node, source):
        return "pointwise"
    return None


def _objection(node: Node, source: Node) -> str | None:
    """Why this selection cannot move to the hidden states. None where it can, or is no selection of them."""
    if node.target not in (*SELECTIONS, *UNHANDLED_SELECTIONS) or node.args[:1] != (source,):
        return None
    arguments = call_arguments(node)
    indices = {dim: index for dim, index in enumerate(arguments.get("indices", ())) if index is not None}
    if any(tensor_of(index).dtype in (torch.bool, torch.uint8) for index in indices.values()):
        return f"{node} selects by a mask, which does not say how many rows it keeps"
    rank = max(tensor_of(source).dim(), 1)
    by_rows = rank - 1 not in (indices or {arguments["dim"] % rank})
    if node.target in SELECTIONS and not by_rows:
        return f"{node} selects in the last dim, the vocabulary, and not rows"
    if node.target in UNHANDLED_SELECTIONS and by_rows:
        return f"{node.target} is not handled; select, slice, index_select and indexing are"
    return None


def _is_pointwise(node: Node, source: Node) -> bool:
    """Whether each row of the result depends on the same row of ``source`` alone, and all in one way."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return False
    others = [fake_tensor(each) for each in node.all_input_nodes if each is not source]
    by_row = target == aten._to_copy.default or torch.Tag.pointwise in target.tags
    return by_row and all(other is None or other.dim() <= 1 for other in others)


def _in_place_between(first: Node, last: Node) -> Node | None:
    node = first.next
    while node is not last:
        if isinstance(node.target, HigherOrderOperator):
            return node
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            return node
        node = node.next
    return None


def _has_one_matrix(bmm: Node) -> bool:
    """Whether this is a linear layer that kept its batch dim, with one matrix expanded over it."""
    matrices = tensor_of(source_of(bmm, 1))
    return statically_known_true(matrices.stride(0) == 0)


def _rewrite(product: Node, steps: list[Step]) -> None:
    last = steps[-1].node
    with product.graph.inserting_before(last):
        hidden = source_of(product, PRODUCTS[product.target])
        # Rows of a matrix can be split by a view; those of a batch or of a selection may need a copy.
        viewable = product.target != aten.bmm.default
        for node, source, role in steps:
            if role == "reshape":
                sizes = [*call_arguments(node)["size"][:-1], _size(hidden, -1)]
                hidden, viewable = _reshaped(hidden, sizes, viewable, like=node), True
            elif role == "selection":
                hidden, viewable = _like(node, source, hidden), False
        logits = _product_of(product, hidden)
        for node, source, role in steps:
            if role == "pointwise":
                logits = _like(node, source, logits)
    last.replace_all_uses_with(logits)


def _product_of(product: Node, hidden: Node) -> Node:
    """The same product, of the rows [..., K] of ``hidden``: [..., V]."""
    graph, rank = product.graph, tensor_of(hidden).dim()
    matrix = hidden if rank == 2 else _reshaped(hidden, [-1, _size(hidden, -1)], False, like=product)
    if product.target == aten.bmm.default:
        shared = insert_call(graph, aten.select.int, (source_of(product, 1), 0, 0), like=product)
        logits = insert_call(graph, aten.mm.default, (matrix, shared), like=product)
    else:
        args = list(product.args)
        args[PRODUCTS[product.target]] = matrix
        logits = insert_call(graph, overload_of(product), tuple(args), product.kwargs, like=product)
    if rank == 2:
        return logits
    sizes = [*(_size(hidden, dim) for dim in range(rank - 1)), _size(logits, -1)]
    return insert_call(graph, aten.view.default, (logits, sizes), like=product)


def _reshaped(node: Node, sizes: list[Any], viewable: bool, *, like: Node) -> Node:
    if not viewable:
        layout = {"memory_format": torch.contiguous_format}
        node = insert_call(node.graph, aten.clone.default, (node,), layout, like=like)
    return insert_call(node.graph, aten.view.default, (node, sizes), like=like)


def _like(node: Node, source: Node, replacement: Node) -> Node:
    """A call like ``node`` that reads ``replacement`` instead of ``source``."""
    args, kwargs = map_arg((node.args, node.kwargs), lambda each: replacement if each is source else each)
    return insert_call(node.graph, overload_of(node), args, kwargs, like=node)


def _size(node: Node, dim: int) -> int | Node:
    size = tensor_of(node).shape[dim]
    if isinstance(size, int):
        return size
    return insert_call(node.graph, aten.sym_size.int, (node, dim), like=node)


def _rows(node: Node) -> Any:
    return math.prod(tensor_of(node).shape[:-1])


def _same(shape: torch.Size, other: torch.Size) -> bool:
    pairs = zip(shape, other, strict=False)
    return len(shape) == len(other) and all(statically_known_true(a == b) for a, b in pairs)


PASS = Pass(NAME, "aten", run)
