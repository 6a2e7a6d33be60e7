"""Makes bfloat16 right in Triton's CPU interpreter, versions 3.6 and 3.9.

The interpreter keeps bfloat16 as the uint16 of its bits and lets numpy compute on those, and it cuts
float32 off instead of rounding it. Repaired, bfloat16 is widened to float32 before arithmetic,
comparisons, dots, reductions and scans, and rounded to nearest even after them and in casts. A reduction
or scan rounds only its result, which is kinder than a GPU. Atomics stay broken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

WIDE = (tl.float16, tl.float32, tl.float64)
# What all arithmetic goes through. Each gives its result the type of its last operand.
COMPUTES = ("unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt", "create_dot")


def widen(bits: NDArray[Any]) -> NDArray[Any]:
    """bfloat16's bits (uint16) -> the same values in float32."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def narrow(values: NDArray[Any]) -> NDArray[Any]:
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    bits = np.array(values, np.float32).view(np.uint32)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _is_bf16(operand: Any) -> bool:
    # The result of a comparison keeps the type of what was compared, with booleans for data.
    return (
        isinstance(operand, TensorHandle)
        and operand.dtype.scalar == tl.bfloat16
        and operand.data.dtype == np.uint16
    )


def _wide(operand: Any) -> Any:
    return TensorHandle(widen(operand.data), tl.float32) if _is_bf16(operand) else operand


def _narrow_handle(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data), tl.bfloat16) if handle.data.dtype == np.float32 else handle


def _computing_wide(compute: Callable[..., Any]) -> Callable[..., Any]:
    def wide(self: InterpreterBuilder, *args: Any) -> Any:
        result = compute(self, *map(_wide, args))
        last = [each for each in args if isinstance(each, TensorHandle)][-1]
        return _narrow_handle(result) if _is_bf16(last) else result

    return wide


def _reducing_wide(reduce: Callable[..., Any]) -> Callable[..., Any]:
    def wide(self: Any, inputs: tuple[Any, ...]) -> Any:
        was_bf16 = [_is_bf16(each.handle) for each in inputs]
        if not any(was_bf16):
            return reduce(self, inputs)
        results = reduce(self, tuple(_tensor(_wide(each.handle), each) for each in inputs))
        results = results if isinstance(results, (list, tuple)) else [results]
        return [
            _tensor(_narrow_handle(each.handle), each) if narrow_it else each
            for each, narrow_it in zip(results, was_bf16, strict=False)
        ]

    return wide


def _tensor(handle: TensorHandle, like: tl.tensor) -> tl.tensor:
    return tl.tensor(
        handle, tl.block_type(handle.dtype, like.shape) if like.type.is_block() else handle.dtype
    )


def _cast(old: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: Any) -> TensorHandle:
        source = _wide(source)
        if target.scalar != tl.bfloat16:
            return old(self, source, target)
        return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)

    return cast_impl


def _float_cast(old: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, source: TensorHandle, target: Any, rounding: Any) -> TensorHandle:
        source = _wide(source)
        to_bf16 = target.scalar == tl.bfloat16
        if to_bf16 and source.dtype.scalar not in WIDE:
            source = old(self, source, tl.float32, rounding)
        if source.dtype.scalar in WIDE and (to_bf16 or target.scalar in WIDE):
            return self.cast_impl(source, target)
        return old(self, source, target, rounding)

    return create_fp_to_fp


def _constant(self: InterpreterBuilder, value: float) -> TensorHandle:
    return TensorHandle(narrow(np.array([value], np.float32)), tl.bfloat16)


def _patches() -> list[tuple[Any, str, Any]]:
    builder = InterpreterBuilder
    return [
        *((builder, name, _computing_wide(getattr(builder, name))) for name in COMPUTES),
        *((kind, "apply_impl", _reducing_wide(kind.apply_impl)) for kind in (ReduceOps, ScanOps)),
        (builder, "cast_impl", _cast(builder.cast_impl)),
        (builder, "create_fp_to_fp", _float_cast(builder.create_fp_to_fp)),
        (builder, "get_bf16", _constant),
    ]


PATCHES = _patches()
# Triton 3.6 has no ``get_bf16``.
ORIGINALS = [(owner, name, getattr(owner, name)) for owner, name, _ in PATCHES if hasattr(owner, name)]


def repair() -> None:
    """Repair this process' interpreter, once or again."""
    for owner, name, patch in PATCHES:
        setattr(owner, name, patch)


@contextlib.contextmanager
def unrepaired() -> Iterator[None]:
    """The interpreter as Triton ships it."""
    with contextlib.ExitStack() as stack:
        for owner, name, original in ORIGINALS:
            stack.enter_context(mock.patch.object(owner, name, original))
        yield
