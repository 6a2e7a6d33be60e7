"""What a pass is, what it reports, and the one way passes are run and cleaned up after."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch.fx import GraphModule, Node

from specc.errors import PassError, SpeccError
from specc.options import Options

log = logging.getLogger(__name__)

Level = Literal["dynamo", "aten"]
Status = Literal["fired", "refused"]


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
    """The innermost line of user code behind a node, as ``file:line: code``."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not frames:
        return "unknown source"
    file, line = lines[frames[-1]].split(", ")[:2]
    code = lines[frames[-1] + 1] if frames[-1] + 1 < len(lines) else ""
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
        except SpeccError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise PassError(
                f"pass {each.name} failed ({type(error).__name__}: {error}); nothing was compiled. "
                f"options={{'disable_passes': ['{each.name}']}} compiles without it."
            ) from error
        clean_up(gm, each.level)
        for remark in result.remarks:
            log.info("%s", remark)
        log.debug("%s: %d matched, %d refused", each.name, result.matched, _refusals(result))
        for observer in observers:
            observer.after_pass(each, gm, result)
        results.append(result)
    return results


def _refusals(result: PassResult) -> int:
    return sum(remark.status == "refused" for remark in result.remarks)


def fake_value(node: Node) -> object:
    """The fake tensor a node stands for: ``val`` at ATen level, ``example_value`` at Dynamo level."""
    return node.meta.get("val", node.meta.get("example_value"))


def fake_tensor(node: object) -> torch.Tensor | None:
    """The fake tensor behind a graph argument, or None where it is no tensor."""
    value = fake_value(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None
