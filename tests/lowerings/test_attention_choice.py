"""Which provider of specc::unified_attention a call on a GPU gets, and why not another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.lowerings import unified_attention
from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))


def call(
    dtype: torch.dtype = torch.bfloat16,
    pool: torch.dtype | None = None,
    page: int = 16,
    dims: tuple[int, int] = (64, 64),
    heads: tuple[int, int] = (8, 2),
    width: int = 4,
    device: str = "cuda",
) -> tuple[Any, ...]:
    k_pages, v_pages = (
        torch.empty(9, page, heads[1], dim, device=device, dtype=pool or dtype) for dim in dims
    )
    q = torch.empty(3, heads[0], dims[0], device=device, dtype=dtype)
    table = torch.empty(1, width, device=device, dtype=torch.int32)
    starts = torch.empty(2, device=device, dtype=torch.int32)
    lengths = torch.empty(1, device=device, dtype=torch.int64)
    return q, k_pages, v_pages, table, starts, lengths, 3, 0.125, 0, 0.0, None, None, None


@pytest.mark.parametrize("hip", [None, "7.2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float32},
        {"dtype": torch.float16, "pool": torch.float8_e4m3fn},
        {"page": 1, "dims": (192, 128), "heads": (7, 1)},
    ],
)
def test_a_gpu_gets_the_triton_kernels(
    options: dict[str, Any], hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    with FakeTensorMode():
        assert unified_attention.choose(*call(**options)).provider.name == "triton"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "has no kernel for queries of torch.float64"),
        ({"pool": torch.float16}, "reads pages of torch.bfloat16 or torch.float8_e4m3fn"),
        ({"page": 24}, "needs a page size that is a power of two, got 24"),
        ({"dims": (60, 64)}, "needs head dimensions of multiples of 8 up to 256, got 60 and 64"),
        ({"dims": (512, 512)}, "needs head dimensions of multiples of 8 up to 256, got 512 and 512"),
        ({"heads": (128, 1)}, "serves up to 64 query heads of a KV head, got 128"),
        ({"width": 2**27}, "reaches 1073741824 keys, got a table of 134217728 pages of 16"),
        ({"device": "cpu"}, "needs a CUDA or HIP device, got cpu"),
    ],
)
def test_refusals(options: dict[str, Any], reason: str) -> None:
    with FakeTensorMode():
        refused = dict(unified_attention.choose(*call(**options)).refused)
    assert reason in refused["triton"]


def test_strided_pages_are_refused() -> None:
    with FakeTensorMode():
        args = list(call())
        strides = (4096, 256, 128, 2)
        args[1] = torch.empty_strided((9, 16, 2, 64), strides, device="cuda", dtype=torch.bfloat16)
        refused = dict(unified_attention.choose(*args).refused)
    assert refused["triton"] == "needs pages with a contiguous last dimension"
