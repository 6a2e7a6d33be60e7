"""Runs one ATen pass on small graphs: through Dynamo and AOT as the pipeline does, or on fake devices."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from specc import compat
from specc.options import Options
from specc.passes.framework import Pass, PassContext, PassResult, run_passes

CONTEXT = PassContext(Options())


@dataclasses.dataclass
class Run:
    """One graph before and after the pass, what the pass reports, and what the rewritten graph returns."""

    before: GraphModule
    after: GraphModule
    result: PassResult
    output: Any = None

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(remark.status, remark.reason) for remark in self.result.remarks]

    @property
    def unchanged(self) -> bool:
        return self.before.code == self.after.code


def apply(one: Pass, gm: GraphModule) -> Run:
    gm.graph.eliminate_dead_code()
    gm.recompile()
    before = GraphModule(gm, copy.deepcopy(gm.graph))
    (result,) = run_passes(gm, [one], CONTEXT)
    return Run(before, gm, result)


def compile_with(
    one: Pass, fn: Callable[..., Any], *args: Any, functionalize: bool = False, dynamic: bool | None = None
) -> Run:
    """Compile ``fn`` with this pass alone and run it once. Fake and real results must agree everywhere."""
    runs: list[Run] = []

    def inference(aten_gm: GraphModule, fake_inputs: list[Any]) -> Any:
        runs.append(apply(one, aten_gm))
        return compat.boxed(Checked(aten_gm).run)

    def training(aten_gm: GraphModule, fake_inputs: list[Any]) -> Any:
        raise AssertionError("these tests compile inference only")

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        return compat.aot_compile(
            gm, inputs, training=training, inference=inference, functionalize=functionalize
        )

    torch.compiler.reset()
    with torch.no_grad():
        output = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    (run,) = runs
    run.output = output
    return run


def trace_on(
    device: str, fn: Callable[..., Any], *shapes: tuple[int, ...], dtype: torch.dtype
) -> GraphModule:
    """The undecomposed ATen graph of ``fn`` on fake tensors of ``device``, which need not exist."""
    with FakeTensorMode():
        return make_fx(fn)(*[torch.empty(shape, device=device, dtype=dtype) for shape in shapes])


def count(gm: GraphModule, *targets: Any) -> int:
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for target in targets)


class Checked(Interpreter):
    """Runs a graph, and asserts that every tensor is what its node's fake value says."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, torch.Tensor):
            fake = n.meta["val"]
            assert (fake.dtype, fake.device, fake.dim()) == (result.dtype, result.device, result.dim()), n
            symbolic = any(isinstance(size, torch.SymInt) for size in fake.shape)
            assert symbolic or fake.shape == result.shape, n
        return result
