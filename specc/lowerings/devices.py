"""Which device a tensor is on, in the words specc's tables use: cpu, cuda, hip, npu, ..."""

from __future__ import annotations

import torch


def device_kind(device: torch.device) -> str:
    """``device.type``, except that ROCm's "cuda" is called "hip"."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "hip"
    return device.type
