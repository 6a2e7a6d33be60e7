"""Tensors too large for this machine, as long as little of them is touched."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor


def untouched(size: int) -> Tensor:
    """uint8 [size] of zeros: the system gives it memory page by page, at the first write."""
    return torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
