"""Finds the attention of stock models on a Dynamo graph: one description for all of its spellings."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from specc import compat
from specc.passes.framework import fake_tensor, source_of, tensor_of

SDPA = torch.nn.functional.scaled_dot_product_attention
SOFTMAX = (torch.softmax, torch.nn.functional.softmax)
MATMUL = (torch.matmul, operator.matmul)
ADD = (operator.add, torch.add, operator.iadd)
MULTIPLY = (operator.mul, torch.mul, operator.imul)
DIVIDE = (operator.truediv, torch.div)
SUBTRACT = (operator.sub, torch.sub)
TANH = (torch.tanh, torch.nn.functional.tanh)
DROPOUT = (torch.nn.functional.dropout, torch.dropout)


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """``node`` computes attention [B, Hq, q, Dv] of q [B, Hq, q, Dk] over k, v [B, Hkv, S, D].

    mask: added or boolean, [B or 1, 1, q, S], or None; ``causal``: the mask is the upper left triangle.
    sinks: the tensor [Hq] behind the softmax's extra column, or None. Other fields as in
    lowerings.dense_attention.Scoring.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    causal: bool
    scale: float
    softcap: float
    sinks: Node | None


@dataclasses.dataclass(frozen=True)
class Unknown:
    """Something like attention at ``node`` that is not in a form known here."""

    node: Node
    reason: str


def find_sites(gm: GraphModule) -> Iterator[AttentionSite | Unknown]:
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and node.target is SDPA:
            yield _fused_site(node)
        elif _softmax_input(node) is not None:
            site = _spelled_out_site(node)
            if site is not None:
                yield site


def _fused_site(node: Node) -> AttentionSite | Unknown:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    q, k, v = (given[name] for name in names[:3])
    if given.get("dropout_p"):
        return Unknown(node, "it drops out weights")
    if tensor_of(q).dim() != 4:
        return Unknown(node, f"its query has {tensor_of(q).dim()} dimensions, not 4")
    scale, dim = given.get("scale"), tensor_of(q).shape[-1]
    if isinstance(scale, Node) or not (isinstance(dim, int) or scale is not None):
        return Unknown(node, "its scale is not a constant of the graph")
    if scale is None:
        scale = 1 / math.sqrt(dim)
    mask = given.get("attn_mask")
    causal = bool(given.get("is_causal"))
    return AttentionSite(node, q, _unrepeated(k), _unrepeated(v), mask, causal, float(scale), 0.0, None)


def _spelled_out_site(softmax: Node) -> AttentionSite | Unknown | None:
    """softmax(scale * q k^T [capped] [+ mask] [, sinks]) v; None where this softmax is no attention."""
    weighed = _weighed_values(softmax)
    if weighed is None:
        return None
    node, v, cut = weighed.product, weighed.values, weighed.cut
    scores = _softmax_input(softmax)
    assert scores is not None
    if weighed.dropped:
        return Unknown(node, "it drops out weights")
    if not _is_last_dimension(softmax):
        return Unknown(node, "its softmax is not over the last dimension")
    sinks = None
    if cut:
        scores, sinks = _without_sinks(scores)
        if sinks is None:
            return Unknown(node, "its softmax has a column more than there are keys, and no sinks are seen")
    scores, mask = _without_mask(scores)
    scores, softcap = _without_softcap(scores)
    scores, scale = _without_scale(scores)
    product = _operands(scores, MATMUL)
    keys = None if product is None else _transposed(product[1])
    if product is None or keys is None or fake_tensor(product[0]) is None:
        return Unknown(node, f"its scores come from {scores.name}, which is no product of queries and keys")
    q = product[0]
    if tensor_of(q).dim() != 4:
        return Unknown(node, f"its query has {tensor_of(q).dim()} dimensions, not 4")
    return AttentionSite(node, q, _unrepeated(keys), _unrepeated(v), mask, False, scale, softcap, sinks)


def _softmax_input(node: Node) -> Node | None:
    is_softmax = (node.op == "call_function" and node.target in SOFTMAX) or (
        node.op == "call_method" and node.target == "softmax"
    )
    source = node.args[0] if is_softmax and node.args else None
    return source if isinstance(source, Node) else None


def _is_last_dimension(softmax: Node) -> bool:
    dim = softmax.kwargs.get("dim", softmax.args[1] if len(softmax.args) > 1 else None)
    return dim in (-1, tensor_of(softmax).dim() - 1)


@dataclasses.dataclass(frozen=True)
class _Weighed:
    """``product`` = probabilities @ ``values``; ``cut``: their last column was cut off before."""

    product: Node
    values: Node
    cut: bool
    dropped: bool


def _weighed_values(softmax: Node) -> _Weighed | None:
    """Follow the probabilities to their product with values."""
    node, cut, dropped = softmax, False, False
    while len(node.users) == 1:
        (user,) = node.users
        if (operands := _operands(user, MATMUL)) is not None:
            left, values = operands
            one_sided = left is node and values is not node and fake_tensor(values) is not None
            return _Weighed(user, values, cut, dropped) if one_sided else None
        if user.op == "call_function" and user.target in DROPOUT:
            dropped = dropped or not _is_idle_dropout(user)
            node = user
        elif _is_cast(user) or _is_method(user, "contiguous"):
            node = user
        elif user.target is operator.getitem and user.args[1] == (Ellipsis, slice(None, -1, None)):
            node, cut = user, True
        else:
            return None
    return None


def _without_sinks(scores: Node) -> tuple[Node, Node | None]:
    """Undo cat([scores, sinks], -1), from which the row's maximum may have been subtracted."""
    shifted = _operands(scores, SUBTRACT)
    if shifted is not None and _is_row_maximum(shifted[1], of=shifted[0]):
        scores = shifted[0]
    if scores.target is not torch.cat or not isinstance(scores.args[0], list | tuple):
        return scores, None
    parts = list(scores.args[0])
    dim = scores.kwargs.get("dim", scores.args[1] if len(scores.args) > 1 else 0)
    if len(parts) != 2 or dim not in (-1, 3) or tensor_of(parts[1]).shape[-1] != 1:
        return scores, None
    sinks = _one_per_head(parts[1], tensor_of(parts[0]).shape)
    return (scores, None) if sinks is None else (parts[0], sinks)


def _one_per_head(column: Node, scores: torch.Size) -> Node | None:
    """sinks, [Hq], where ``column`` is sinks[h] in each entry (b, h, i) of [B, Hq, q, 1]."""
    heads = scores[1]
    node = column
    while _is_method(node, "expand") or (_is_method(node, "to") and tensor_of(node).dim() == 4):
        node = source_of(node)
    if len(scores) != 4 or tuple(tensor_of(node).shape) != (1, heads, 1, 1):
        return None
    # Of Hq numbers in a row, no view is in another order.
    while node.op == "call_method" and node.target in ("reshape", "view", "to", "unsqueeze"):
        node = source_of(node)
    return node if tuple(tensor_of(node).shape) == (heads,) else None


def _is_row_maximum(node: Any, of: Node) -> bool:
    """max(dim=-1, keepdim=True).values, or amax: one number for all that a softmax weighs."""
    if not isinstance(node, Node) or fake_tensor(node) is None or tensor_of(node).shape[-1:] != (1,):
        return False
    if node.target in (operator.getitem, getattr) and node.args[1] in (0, "values"):
        node = source_of(node)
    named = _is_method(node, "max") or _is_method(node, "amax") or node.target in (torch.max, torch.amax)
    return named and node.args[0] is of


def _without_mask(scores: Node) -> tuple[Node, Node | None]:
    """Undo scores + mask: the mask is the operand that every head shares."""
    operands = _operands(scores, ADD)
    if operands is None or fake_tensor(operands[0]) is None or fake_tensor(operands[1]) is None:
        return scores, None
    mask = operands[1]
    added = tensor_of(mask).is_floating_point() and tensor_of(mask).dim() == 4
    return (operands[0], mask) if added and tensor_of(mask).shape[1] == 1 else (scores, None)


def _without_softcap(scores: Node) -> tuple[Node, float]:
    """Undo softcap * tanh(scores / softcap)."""
    outer = _scaled(scores, MULTIPLY)
    if outer is None:
        return scores, 0.0
    tanh, softcap = outer
    if not (tanh.target in TANH or _is_method(tanh, "tanh")):
        return scores, 0.0
    inner = _scaled(tanh.args[0], DIVIDE)
    if inner is None or inner[1] != softcap:
        return scores, 0.0
    return inner[0], softcap


def _without_scale(scores: Node) -> tuple[Node, float]:
    scale = 1.0
    while True:
        for targets, undo in ((MULTIPLY, lambda s: s), (DIVIDE, lambda s: 1 / s)):
            scaled = _scaled(scores, targets)
            if scaled is not None:
                scores, scale = scaled[0], scale * undo(scaled[1])
                break
        else:
            return scores, scale


def _scaled(node: Any, targets: tuple[Callable[..., Any], ...]) -> tuple[Node, float] | None:
    """(x, c) where ``node`` is x times, or over, the number c."""
    operands = _operands(node, targets)
    if operands is None or isinstance(operands[1], bool) or not isinstance(operands[1], int | float):
        return None
    if targets is DIVIDE and not operands[1]:
        return None
    return operands[0], float(operands[1])


def _operands(node: Any, targets: tuple[Callable[..., Any], ...]) -> tuple[Any, Any] | None:
    """Both operands of a call, as a function or as the method of that name; the first is a node.

    None where there is more to it, such as the alpha of torch.add or a rounding mode.
    """
    if not isinstance(node, Node) or node.kwargs or len(node.args) != 2 or not isinstance(node.args[0], Node):
        return None
    named = {getattr(target, "__name__", "") for target in targets}
    if node.op == "call_function" and node.target in targets:
        return node.args[0], node.args[1]
    if node.op == "call_method" and node.target in named:
        return node.args[0], node.args[1]
    return None


def _transposed(node: Any) -> Node | None:
    """k where ``node`` is k with its last two dimensions swapped."""
    if not isinstance(node, Node):
        return None
    if _is_method(node, "transpose") or node.target is torch.transpose:
        dims = {d % 4 for d in node.args[1:3]}  # type: ignore[operator]
        source = node.args[0]
        return source if dims == {2, 3} and isinstance(source, Node) else None
    return None


def _unrepeated(node: Node) -> Node:
    """The keys or values before ``repeat_kv``: [B, H, S, D] -> [:, :, None] -> expand -> reshape."""
    reshape = node
    if not (_is_method(reshape, "reshape") and isinstance(reshape.args[0], Node)):
        return node
    expand = reshape.args[0]
    if not (_is_method(expand, "expand") and isinstance(expand.args[0], Node)):
        return node
    inserted = expand.args[0]
    everything = slice(None, None, None)
    index = (everything, everything, None, everything, everything)
    if inserted.target is not operator.getitem or inserted.args[1] != index:
        return node
    source = inserted.args[0]
    assert isinstance(source, Node)
    rows, heads, *rest = tensor_of(source).shape
    repeats = tensor_of(expand).shape[2]
    if not (isinstance(heads, int) and isinstance(repeats, int)):
        return node
    grouped = same_sizes(tensor_of(expand).shape, (rows, heads, repeats, *rest))
    return source if grouped and same_sizes(tensor_of(node).shape, (rows, heads * repeats, *rest)) else node


def same_sizes(shape: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two shapes are the same for all sizes that a graph is used with."""
    return len(shape) == len(other) and all(map(_same_size, shape, other))


def _same_size(size: Any, other: Any) -> bool:
    if isinstance(size, int) and isinstance(other, int):
        return size == other
    return isinstance(size, torch.SymInt) and compat.is_size(size, other)


def _is_method(node: Node, name: str) -> bool:
    return node.op == "call_method" and node.target == name


def _is_cast(node: Node) -> bool:
    named = node.op == "call_method" and node.target in ("to", "type_as", "float", "half", "bfloat16")
    return named and tensor_of(node).is_floating_point()


def _is_idle_dropout(node: Node) -> bool:
    p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
    given = node.kwargs.get("training", node.kwargs.get("train", True))
    training = node.args[2] if len(node.args) > 2 else given
    return bool(p == 0) or training is False
