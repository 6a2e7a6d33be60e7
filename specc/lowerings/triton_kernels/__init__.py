"""Triton kernels, one source for CUDA and HIP. Nothing here imports Triton until a kernel is needed."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from specc.lowerings.devices import device_kind
from specc.lowerings.framework import Reason

# What kernels read lengths, slots and pages from.
INDICES = (torch.int32, torch.int64)
# First and last version of Triton whose Gluon compiles what is here.
GLUON = (3, 6), (3, 9)


@functools.cache
def obstacle() -> Reason:
    """Why Triton kernels cannot run in this process, or None."""
    return None if importlib.util.find_spec("triton") else "the triton package is not installed"


@functools.cache
def gluon_obstacle() -> Reason:
    """Why what is written in Gluon for Nvidia's units cannot run in this process, or None."""
    if torch.version.hip is not None:
        return "there is no form for AMD's units"
    if obstacle() is not None:
        return obstacle()
    import triton

    known = GLUON[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= GLUON[1]
    return None if known else f"Gluon, being experimental, may differ in Triton {triton.__version__}"


def unfit(first: Tensor, *others: Tensor | None) -> Reason:
    """Why a Triton kernel cannot reach these tensors, or None."""
    if device_kind(first.device) not in ("cuda", "hip"):
        return f"needs a CUDA or HIP device, got {first.device.type}"
    elsewhere = {each.device for each in others if each is not None} - {first.device}
    if elsewhere:
        devices = ", ".join(sorted(str(device) for device in (first.device, *elsewhere)))
        return f"needs all tensors on one device, got {devices}"
    return obstacle()


def not_integers(*dtypes: torch.dtype, **tensors: Tensor | None) -> Reason:
    """Why a kernel of these dtypes cannot read positions or slots from these tensors, or None."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in dtypes:
            return f"has no kernel for {name} of {tensor.dtype}"
    return None
