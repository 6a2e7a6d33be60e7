"""The page table and pool kernels compile for each GPU, without spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

ARCHS = ("sm_90", "gfx942", "gfx950")


def assert_compiles(
    kernel: Any, arch: str, types: dict[str, str], constants: dict[str, Any], specialized: bool
) -> None:
    from tests.lowerings.aot import assert_fits, compile_kernel

    tensors = [name for name, kind in types.items() if kind.startswith("*")] if specialized else []
    integers = {name: "i32" for name in kernel.arg_names if name not in types}
    compiled = compile_kernel(
        kernel, arch, {**integers, **types}, constants, aligned=tensors, below_2gib=tensors
    )
    assert_fits(compiled, arch)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("specialized", [False, True])
@pytest.mark.parametrize("index", ["*i32", "*i64"])
@pytest.mark.parametrize("arch", ARCHS)
def test_page_tables(arch: str, index: str, specialized: bool) -> None:
    from specc.lowerings.triton_kernels import page_table

    constants = {"BLOCK": page_table.BLOCK}
    ragged = {"out": "*i32", "kv_indices": "*i32", "kv_indptr": index}
    assert_compiles(page_table._from_ragged, arch, ragged, constants, specialized)
    requests = {"out": "*i32", "req_to_token": "*i32", "req_pool_indices": index, "kv_lens": index}
    assert_compiles(page_table._from_requests, arch, requests, constants, specialized)
    del requests["req_pool_indices"]
    constants = {**constants, "req_pool_indices": None}
    assert_compiles(page_table._from_requests, arch, requests, constants, specialized)


@pytest.mark.parametrize("specialized", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("states", "pool", "dims"),
    [
        ("*bf16", "*bf16", (128, 128)),
        ("*bf16", "*u8", (128, 128)),
        ("*fp16", "*fp16", (80, 64)),
        ("*fp32", "*u8", (192, 128)),
        ("*fp32", "*bf16", (576, 512)),
    ],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_kv_write(
    arch: str, states: str, pool: str, dims: tuple[int, int], scaled: bool, specialized: bool
) -> None:
    from specc.lowerings.triton_kernels import kv_write

    types = {"k": states, "v": states, "k_pages": pool, "v_pages": pool, "slots": "*i64"}
    constants = {"K_DIM": dims[0], "V_DIM": dims[1], "BLOCK": kv_write.BLOCK}
    scales = ("k_scale", "v_scale")
    if scaled:
        types |= dict.fromkeys(scales, "*fp32")
    else:
        constants |= dict.fromkeys(scales)
    assert_compiles(kv_write._write, arch, types, constants, specialized)
