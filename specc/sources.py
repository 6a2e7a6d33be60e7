"""Which operator of a captured graph an error comes from, and which line of a model that operator is.

Compiled code does not know. A graph's own ``forward`` names a node on each line, whose stack trace has the
model's. Inductor's code has a comment over each call with the nodes and operators it comes from, whose lines
are kept here from when their graph was compiled; from torch's cache comes code without its graph, and so only
the lines of operators that the model calls by name.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from types import TracebackType

from torch.fx import GraphModule, Node

from specc import compat
from specc.compat import OpOverload, OpOverloadPacket
from specc.passes.framework import source_line

# (operator, node) of Inductor's graphs, and operators of models, -> their lines, of any graph.
_LINES: dict[tuple[str, str] | str, dict[str, None]] = {}

_COMMENT = re.compile(r"# .*Source Nodes: \[(.*?)\], Original ATen: \[(.*?)\]")
# A comment stands over a call and what makes room for its result.
_COMMENT_WITHIN = 12
# More lines than this that an operator may come from say nothing.
MOST_LINES = 3


def remember(gm: GraphModule) -> None:
    """Keep the lines that ``gm``'s operators come from."""
    for node in gm.graph.nodes:
        operator = _operator(node)
        if operator is not None and node.stack_trace:
            for key in (operator, (operator, node.name)):
                _LINES.setdefault(key, {})[source_line(node)] = None


def origin(error: BaseException) -> str:
    """Where an error came up: the operator, the model's line that calls it, the innermost line."""
    innermost = compat.innermost_line(error)
    innermost_first = reversed(list(_frames(error.__traceback__)))
    found = next(filter(None, map(_origin_of, innermost_first)), None)
    if found is None:
        return innermost
    operator, lines = found
    return ", ".join([operator, *([f"called at {' or '.join(lines)}"] if lines else []), f"in {innermost}"])


def _operator(node: Node) -> str | None:
    """As in ``aten.mul``, whatever the overload."""
    if not isinstance(node.target, OpOverload | OpOverloadPacket):
        return None
    return ".".join(str(node.target).split(".")[:2])


def _frames(trace: TracebackType | None) -> Iterator[TracebackType]:
    while trace is not None:
        yield trace
        trace = trace.tb_next


def _origin_of(trace: TracebackType) -> tuple[str, list[str]] | None:
    """Operator and lines of a model, of a frame of generated code; None for other frames."""
    frame, number = trace.tb_frame, trace.tb_lineno
    owner = frame.f_locals.get("self")
    if isinstance(owner, GraphModule):
        return _origin_in_graph(owner, linecache.getline(frame.f_code.co_filename, number))
    lines = linecache.getlines(frame.f_code.co_filename)[max(0, number - _COMMENT_WITHIN) : number]
    comments = [match for match in map(_COMMENT.search, lines) if match]
    if not comments:
        return None
    # Of what is fused, the last is what is called.
    node, operator = (names.split(", ")[-1] for names in comments[-1].groups())
    known = list(_LINES.get((operator, node)) or _LINES.get(operator) or ())
    return operator, known if len(known) <= MOST_LINES else []


def _origin_in_graph(gm: GraphModule, line: str) -> tuple[str, list[str]] | None:
    name = line.split("=")[0].split(":")[0].strip()
    node = next((each for each in gm.graph.nodes if each.name == name), None)
    if node is None or node.op != "call_function":
        return None
    return _operator(node) or str(node.target), [source_line(node)] if node.stack_trace else []
