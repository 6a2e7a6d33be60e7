"""Triton kernels, one source for CUDA and HIP. Nothing here imports Triton until a kernel is needed."""

from __future__ import annotations

import functools
import importlib.util

from specc.lowerings.framework import Reason


@functools.cache
def obstacle() -> Reason:
    """Why Triton kernels cannot run in this process, or None."""
    return None if importlib.util.find_spec("triton") else "the triton package is not installed"
