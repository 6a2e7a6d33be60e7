"""What a pass is, what it reports, and the one way passes are run and cleaned up after."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from specc.compat import HigherOrderOperator, OpOverload, OpOverloadPacket
from specc.errors import PassError, SpeccError
from specc.options import Options

log = logging.getLogger(__name__)

Level = Literal["dynamo", "aten"]
Status = Literal["fired", "refused"]


# Python's own spellings of in-place operators, as FX names them.
IN_PLACE_OPERATORS = frozenset(
    {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}
)

# Files that stand between a line of the user's model and the operator it led to.
PLUMBING = (
    str(Path(__file__).parents[1] / "lowerings"),
    str(Path(__file__).parents[1] / "leaves.py"),
    str(Path(__file__).parents[1] / "runtime" / "cache.py"),
    str(Path(__file__).parents[1] / "runtime" / "recurrent.py"),
    str(Path("transformers", "cache_utils.py")),
    str(Path("transformers", "integrations", "sdpa_attention.py")),
)


@dataclasses.dataclass(frozen=True)
class Remark:
    """Why a pass did or did not rewrite one site. ``source`` is the line of the user's model."""

    pass_name: str
    node: str
    status: Status
    reason: str
    source: str

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.status} at {self.node}: {self.reason} [{self.source}]"


@dataclasses.dataclass(frozen=True)
class PassContext:
    """What a pass may know besides the graph: the options, and every fact that changes its output."""

    options: Options


@dataclasses.dataclass
class PassResult:
    """``matched`` counts the sites a pass rewrote; ``remarks`` names these and those it refused."""

    matched: int = 0
    remarks: list[Remark] = dataclasses.field(default_factory=list)

    @property
    def refused(self) -> int:
        return sum(remark.status == "refused" for remark in self.remarks)


class Sites:
    """Collects a pass's findings while it walks a graph."""

    def __init__(self, pass_name: str) -> None:
        self._name = pass_name
        self.result = PassResult()

    def fired(self, node: Node, reason: str) -> None:
        self.result.matched += 1
        self._add(node, "fired", reason)

    def refused(self, node: Node, reason: str) -> None:
        self._add(node, "refused", reason)

    def _add(self, node: Node, status: Status, reason: str) -> None:
        self.result.remarks.append(Remark(self._name, node.name, status, reason, source_line(node)))


@dataclasses.dataclass(frozen=True)
class Pass:
    """One rewrite at one graph level. ``run`` edits the graph module in place."""

    name: str
    level: Level
    run: Callable[[GraphModule, PassContext], PassResult]


class Observer(Protocol):
    """Sees every pass: called with the graph before the first pass and after each one."""

    def graph(self, level: Level, gm: GraphModule) -> None: ...

    def after_pass(self, run: Pass, gm: GraphModule, result: PassResult) -> None: ...


def source_line(node: Node) -> str:
    """The innermost line of the user's model behind a node, as ``file:line: code``."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not frames:
        return "unknown source"
    own = [i for i in frames if any(place in lines[i] for place in PLUMBING)]
    frame = next((i for i in reversed(frames) if i not in own), frames[-1])
    file, line = lines[frame].split(", ")[:2]
    code = lines[frame + 1] if frame + 1 < len(lines) else ""
    where = file.removeprefix('File "').removesuffix('"') + ":" + line.removeprefix("line ")
    return f"{where}: {code}" if code else where


def clean_up(gm: GraphModule, level: Level) -> None:
    """Drop what became dead, check the graph and regenerate its code.

    On a Dynamo graph nothing is dropped: there, mutation hides in method calls (``copy_``) and in
    ``operator.setitem``, which FX takes for pure. Passes at that level erase what they replace.
    """
    if level == "aten":
        gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()


def run_passes(
    gm: GraphModule,
    passes: Iterable[Pass],
    context: PassContext,
    observers: Sequence[Observer] = (),
) -> list[PassResult]:
    """Run ``passes`` over ``gm`` in order, in place. A pass that raises ends the compile: PassError."""
    results = []
    for each in passes:
        if each.name in context.options.disable_passes:
            log.debug("%s: left out by disable_passes", each.name)
            continue
        try:
            result = each.run(gm, context)
            clean_up(gm, each.level)
        except SpeccError:
            raise
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise PassError(
                f"pass {each.name} failed ({type(error).__name__}: {error}); nothing was compiled. "
                f"options={{'disable_passes': ['{each.name}']}} compiles without it."
            ) from error
        for remark in result.remarks:
            log.info("%s", remark)
        log.debug("%s: %d matched, %d refused", each.name, result.matched, result.refused)
        for observer in observers:
            observer.after_pass(each, gm, result)
        results.append(result)
    return results


def mutates(node: Node, tensor: Node) -> bool:
    """Whether a call on a Dynamo graph changes ``tensor`` in place."""
    return tensor in changed_by(node)


def changed_by(node: Node) -> list[Node]:
    """The arguments that a call on a Dynamo graph changes in place, or may change."""
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(target, OpOverload):
        given = [*zip(target._schema.arguments, node.args, strict=False)]
        given += [(each, node.kwargs.get(each.name)) for each in target._schema.arguments]
        return _nodes([value for each, value in given if each.alias_info and each.alias_info.is_write])
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(target, OpOverloadPacket):
        overloads = (getattr(target, name) for name in target.overloads())
        return node.all_input_nodes if any(each._schema.is_mutable for each in overloads) else []
    outputs = _nodes([node.kwargs.get("out")])
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if getattr(target, "__module__", "") == "_operator" or name.endswith("__"):
        in_place = name.removeprefix("__").removesuffix("__") in IN_PLACE_OPERATORS
    else:
        in_place = name.endswith("_")
    if in_place or node.kwargs.get("inplace"):
        return outputs + (_nodes([node.args[0]]) if node.args else node.all_input_nodes)
    return outputs


def _nodes(values: Any) -> list[Node]:
    found: list[Node] = []
    map_arg(values, found.append)
    return found


def erase_unused(node: Node) -> None:
    """Erase ``node`` and what only it needed, as far as nothing else reads them and they change nothing.

    For Dynamo graphs, which are never cleaned of dead code as a whole.
    """
    pending = [node]
    while pending:
        current = pending.pop()
        computed = current.op in ("call_function", "call_method")
        if current.users or not computed or current._erased or current.is_impure():
            continue
        if changed_by(current):
            continue
        inputs = current.all_input_nodes
        current.graph.erase_node(current)
        pending.extend(inputs)


def fake_value(node: Node) -> object:
    """The fake tensor a node stands for: ``val`` at ATen level, ``example_value`` at Dynamo level."""
    return node.meta.get("val", node.meta.get("example_value"))


def fake_tensor(node: object) -> torch.Tensor | None:
    """The fake tensor behind a graph argument, or None where it is no tensor."""
    value = fake_value(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def tensor_of(node: object) -> torch.Tensor:
    """The fake tensor of a node that must have one."""
    value = fake_tensor(node)
    assert value is not None, f"{node} has no fake tensor"
    return value


def source_of(node: Node, position: int = 0) -> Node:
    """The node that a call reads as its argument number ``position``."""
    source = node.args[position]
    assert isinstance(source, Node)
    return source


def overload_of(node: Node) -> OpOverload:
    """What a node of an ATen graph calls."""
    assert isinstance(node.target, OpOverload)
    return node.target


def call_arguments(node: Node) -> dict[str, Any]:
    """The arguments of an ATen call by their names in its schema, defaults filled in."""
    schema = overload_of(node)._schema.arguments
    given = {each.name: value for each, value in zip(schema, node.args, strict=False)} | node.kwargs
    return {each.name: given.get(each.name, each.default_value) for each in schema}


def insert_call(
    graph: Graph,
    target: OpOverload,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: Node,
) -> Node:
    """Add an ATen call where ``graph`` inserts, with its fake value and ``like``'s line of user code."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    return _with_fake_value(node, "val", like)


class DynamoInserter:
    """Adds nodes to a Dynamo graph before ``place``, with their fake values and ``like``'s line of code."""

    def __init__(self, graph: Graph, place: Node, like: Node) -> None:
        self._graph = graph
        self._place = place
        self._like = like

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        with self._graph.inserting_before(self._place):
            node = self._graph.call_function(target, args, kwargs)
        return _with_fake_value(node, "example_value", self._like)

    def method(self, name: str, *args: Any) -> Node:
        with self._graph.inserting_before(self._place):
            node = self._graph.call_method(name, args)
        return _with_fake_value(node, "example_value", self._like)


def _with_fake_value(node: Node, key: str, like: Node) -> Node:
    if "stack_trace" in like.meta:
        node.meta["stack_trace"] = like.meta["stack_trace"]
    # A factory call has no inputs to take the mode from.
    values = (each.meta.get(key) for each in (*node.all_input_nodes, *node.graph.nodes))
    mode = next((mode for value in values if (mode := getattr(value, "fake_mode", None))), None)
    with mode if mode is not None else contextlib.nullcontext():
        args, kwargs = map_arg((node.args, node.kwargs), lambda each: each.meta[key])
        if node.op == "call_method":
            node.meta[key] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            node.meta[key] = node.target(*args, **kwargs)
    return node
