"""What Gluon, which is experimental, calls otherwise in Triton 3.9 than in 3.6: by its newer names."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

NEW = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = (
    async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
)


@gluon.jit
def reinterpret(shared, SHAPE: gl.constexpr):
    """The same bytes with another shape. Only one branch is compiled."""
    if NEW:
        return shared.reinterpret(shared.dtype, SHAPE, shared.layout)
    else:  # noqa: RET505
        return shared._reinterpret(shared.dtype, SHAPE, shared.layout)
