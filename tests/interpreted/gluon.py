"""Gluon in Triton's interpreter, which does not know it: values only, layouts are ignored.

Copies are asynchronous: memory is read, at the latest moment a device may read it, when they are waited for;
until then their destination holds NaN.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.experimental
import triton.language as tl
import triton.runtime.jit
from numpy.typing import NDArray
from triton.runtime.interpreter import TensorHandle

LAYOUTS = (
    "BlockedLayout", "DistributedLinearLayout", "DotOperandLayout", "NVMMADistributedLayout", "SliceLayout",
    "SwizzledSharedLayout",
)  # fmt: skip
KERNELS = "specc.lowerings.triton_kernels"
TF32 = -8192


def number(x: Any) -> int:
    x = getattr(x, "value", x)
    return int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x)


class Shared:
    """shared_memory_descriptor: a view of an array."""

    def __init__(self, values: NDArray[Any], dtype: tl.dtype) -> None:
        self.values, self.dtype, self.layout = values, dtype, None

    def index(self, i: Any) -> Shared:
        return Shared(self.values[number(i)], self.dtype)

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        place = [slice(None)] * number(dim) + [slice(number(start), number(start) + number(length))]
        return Shared(self.values[tuple(place)], self.dtype)

    def permute(self, order: Any) -> Shared:
        return Shared(self.values.transpose([number(i) for i in order]), self.dtype)

    def reinterpret(self, dtype: Any, shape: Any, layout: None) -> Shared:
        view = self.values.view()
        view.shape = tuple(map(number, shape))
        return Shared(view, self.dtype)

    def store(self, x: tl.tensor) -> None:
        assert x.dtype == self.dtype
        self.values[...] = x.handle.data

    def load(self, layout: None) -> tl.tensor:
        values = self.values.copy("C")
        kind = tl.block_type(self.dtype, list(values.shape))
        return tl.tensor(TensorHandle(values, self.dtype), kind)


def allocate_shared_memory(dtype: tl.dtype, shape: Any, layout: None) -> Shared:
    """Whatever was there before: NaN."""
    kind = {tl.float32: np.float32, tl.bfloat16: np.uint16}[dtype]
    poison = 0x7FC0 if dtype == tl.bfloat16 else np.nan
    return Shared(np.full(tuple(map(number, shape)), poison, kind), dtype)


class Copies:
    """nvidia.ampere.async_copy."""

    def __init__(self) -> None:
        self.fresh: list[Any] = []
        self.groups: list[list[Any]] = []

    def async_load(self, to: Shared, at: Any, mask: Any = None) -> None:
        to.values[...] = np.nan
        self.fresh.append((to, at, mask))

    async_copy_global_to_shared = async_load

    def assert_done(self) -> None:
        """A program that ends must have waited for all: what it copies to may be another's by then."""
        assert not self.fresh
        assert not self.groups

    def commit_group(self) -> None:
        self.groups.append(self.fresh)
        self.fresh = []

    def wait_group(self, left: int) -> None:
        while len(self.groups) > number(left):
            for to, at, mask in self.groups.pop(0):
                to.store(tl.load(at) if mask is None else tl.load(at, mask=mask, other=0.0))


def mma_v2(a: tl.tensor, b: tl.tensor, acc: tl.tensor, input_precision: Any = None) -> tl.tensor:
    if input_precision == "tf32":
        # The units ignore the other bits.
        a, b = ((x.to(tl.int32, bitcast=True) & TF32).to(tl.float32, bitcast=True) for x in (a, b))
    return tl.dot(a, b, acc)


class Language:
    """What is not here is Triton's, found when it is called: the interpreter puts its own there."""

    shared_memory_descriptor = Shared
    allocate_shared_memory = staticmethod(allocate_shared_memory)

    def __getattr__(self, name: str) -> Any:
        return (lambda *args, **kwargs: None) if name in LAYOUTS else getattr(tl, name)

    def arange(self, start: Any, end: Any, layout: None) -> tl.tensor:
        return tl.arange(start, end)

    def zeros(self, shape: Any, dtype: Any, layout: None) -> tl.tensor:
        return tl.zeros(shape, dtype)

    def full(self, shape: Any, value: Any, dtype: Any, layout: None) -> tl.tensor:
        return tl.zeros(shape, tl.int32) + value != 0

    def static_range(self, *bounds: Any) -> range:
        return range(*map(number, bounds))

    def convert_layout(self, x: tl.tensor, layout: None, assert_trivial: bool = False) -> tl.tensor:
        return x

    def barrier(self) -> None: ...


def interpreted(name: str) -> Any:
    """A module of Gluon kernels, with what it imports from here in the place of Gluon."""
    gluon = ModuleType("triton.experimental.gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = triton.jit, lambda f: f, Language()  # type: ignore[attr-defined]
    ampere = ModuleType("ampere")
    ampere.async_copy, ampere.mma_v2 = Copies(), mma_v2  # type: ignore[attr-defined]
    path = "triton.experimental.gluon"
    there = {path: gluon, f"{path}.language": gluon.language, f"{path}.language.nvidia.ampere": ampere}
    ours = [f"{KERNELS}.{each}" for each in ("gluon_names", "gluon_accumulators", name)]
    # Not to be loaded twice, as what is loaded below must be.
    importlib.import_module(f"{KERNELS}.gated_delta_rule")
    with (
        mock.patch.dict(sys.modules, there),
        mock.patch.object(triton.experimental, "gluon", gluon, create=True),
    ):
        modules = [importlib.import_module(each) for each in ours]
    for module in modules:
        # Where the interpreter looks for what it has to replace.
        module.__dict__["tl"] = tl
    return modules[-1]


def know_constants() -> None:
    """Has this process' interpreter know ``gl.constexpr``, once or again."""
    triton.runtime.jit._normalize_ty = _normalize


_normalize_triton = triton.runtime.jit._normalize_ty


def _normalize(kind: Any) -> str:
    return _normalize_triton("constexpr" if kind == "gl.constexpr" else kind)
