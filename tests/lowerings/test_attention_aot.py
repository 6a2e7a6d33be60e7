"""The Triton kernels of specc::unified_attention, compiled for every architecture in every configuration."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

STRIDES = [
    *("q_token_stride", "q_head_stride"),
    *("k_page_stride", "k_slot_stride", "k_head_stride"),
    *("v_page_stride", "v_slot_stride", "v_head_stride"),
]
SIZES = [
    *("tokens", "rows", "heads", "kv_heads", "blocks", "max_q", "width", "num_pages"),
    *("splits", "slots", "wanted", "window", "programs", "table_stride"),
]
ARCHS = ("sm_90", "gfx942", "gfx950")
# Triton 3.6 keeps an address or two, of those needed outside the loop over tiles, on a thread's stack.
STACK = 16 if version("triton").startswith("3.6.") else 0


def signature(dtype: str, pool: str) -> dict[str, str]:
    types = dict.fromkeys(STRIDES + SIZES, "i32")
    types |= dict.fromkeys(("q", "out", "sinks"), f"*{dtype}")
    types |= dict.fromkeys(("k_pages", "v_pages"), f"*{pool}")
    types |= dict.fromkeys(("states", "sums", "k_scale", "v_scale"), "*fp32")
    types |= {"score_scale": "fp32", "cap": "fp32"}
    return types | {"table": "*i32", "cu_seqlens": "*i32", "lengths": "*i64"}


def configurations(arch: str) -> list[Any]:
    from specc.lowerings.triton_kernels.attention import TILES

    backend = "cuda" if arch == "sm_90" else "hip"
    return sorted(
        {
            (precision, lanes, tiles)
            for (name, precision, lanes, _), tiles in TILES.items()
            if name == backend
        },
        key=str,
    )


def compile_attend(
    arch: str, tiles: Any, lanes: int, dtype: str, *, walk: bool, ranged: bool, fancy: bool = False
) -> Any:
    """Groups of 4 heads over pages of 16 keys; ``fancy``: a float8 pool, and every option."""
    from specc.lowerings.triton_kernels import attention, attention_kernels
    from tests.lowerings.aot import compile_kernel

    types = signature(dtype, "fp8e4nv" if fancy else dtype)
    kernel = attention_kernels.attend
    tensors = [name for name in kernel.arg_names if types.get(name, "").startswith("*")]
    constants = {
        "GROUP": 4,
        "DK": lanes,
        "DV": lanes,
        "PAGE": 16,
        "NEAR": True,
        "TWINS": True,
        "WINDOWED": fancy,
        "CAPPED": fancy,
        "LINEAR": not fancy,
        "WALK": walk,
        "BLOCK_M": tiles.rows,
        "BLOCK_N": tiles.keys,
        "BLOCK_K": lanes,
        "BLOCK_V": lanes,
        "CHUNK": attention.CHUNK,
        "SECTION": attention.SECTION,
    }
    if not fancy:
        constants |= {"sinks": None, "k_scale": None, "v_scale": None}
    return compile_kernel(
        kernel,
        arch,
        types,
        constants,
        aligned=tensors + STRIDES,
        below_2gib=tensors if ranged else (),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=False,
    )


def assert_products_overlap(compiled: Any, tmp_path: Path) -> None:
    """Where a branch reads a product, Triton may forget to wait for it; ptxas then waits after each step."""
    import triton

    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    code = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-sass", str(path)], text=True)
    steps, waits = code.count("HGMMA."), code.count("WARPGROUP.DEPBAR")
    assert 0 < 2 * waits < steps, (waits, steps)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_fits(arch: str, walk: bool, tmp_path: Path) -> None:
    from tests.lowerings.aot import assert_fits

    for precision, lanes, tiles in configurations(arch):
        dtype = "fp32" if precision == "exact" else "bf16"
        compiled = compile_attend(arch, tiles, lanes, dtype, walk=walk, ranged=walk)
        assert_fits(compiled, arch, stack=STACK)
        if arch == "sm_90" and precision == "half":
            assert_products_overlap(compiled, tmp_path)


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_float8_with_every_option_fits(arch: str, ranged: bool) -> None:
    from specc.lowerings.triton_kernels.attention import TILES
    from tests.lowerings.aot import ARCHS as LIMITS

    tiles = TILES["cuda" if arch == "sm_90" else "hip", "half", 128, True]
    compiled = compile_attend(arch, tiles, 128, "bf16", walk=False, ranged=ranged, fancy=True)
    assert compiled.metadata.shared <= LIMITS[arch].shared


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_combination_of_states_fits(arch: str, ranged: bool) -> None:
    from specc.lowerings.triton_kernels import attention, attention_kernels
    from tests.lowerings.aot import assert_fits, compile_kernel

    types = signature("bf16", "bf16")
    kernel = attention_kernels.combine
    tensors = [name for name in kernel.arg_names if types.get(name, "").startswith("*")]
    constants = {
        "GROUP": 4,
        "DV": 128,
        "PAGE": 16,
        "BLOCK_M": 64,
        "BLOCK_V": 128,
        "CHUNK": attention.CHUNK,
        "SECTION": attention.SECTION,
        "v_scale": None,
    }
    compiled = compile_kernel(
        kernel,
        arch,
        types,
        constants,
        aligned=tensors if ranged else (),
        below_2gib=tensors if ranged else (),
        num_warps=1,
        enable_fp_fusion=False,
    )
    assert_fits(compiled, arch)
