"""Which device a tensor is on, in the words specc's tables use: cpu, cuda, hip, npu, ..."""

from __future__ import annotations

import torch


def device_kind(device: torch.device) -> str:
    """``device.type``, except that ROCm's "cuda" is called "hip"."""
    if device.type == "cuda" and torch.version.hip is not None:
        return "hip"
    return device.type


def usual_dtype(device: str) -> torch.dtype:
    """What models compute in there: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if device == "cpu" else torch.bfloat16


# Up to how many rows sums in one order cost a step with drafts less than 3 % where that was measured
# (benchmarks/NOTES.md).
_CHEAPLY_EXACT = {("cuda", torch.bfloat16): 1}


def exact_by_default(device: torch.device, dtype: torch.dtype, rows: int) -> bool:
    """Whether so many rows are decoded with ``exact`` by a model there, of that dtype, unless told otherwise.

    It must not depend on the number of drafts: with and without them, tokens are to be the same.
    """
    return rows <= _CHEAPLY_EXACT.get((device_kind(device), dtype), 0)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be allocated there, or None where the device does not say."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + cached
