"""The kernel for products of few rows compiles for each GPU, without spills, whatever the tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specc.lowerings.linear import MOST
from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

CUDA = [
    (64, 16, 128, 8, 4),
    (64, 32, 128, 6, 4),
    (64, 64, 128, 5, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 128, 4, 4),
    (128, 128, 64, 5, 8),
]
HIP = [(32, tokens, 128, 2, 4) for tokens in (16, 32, 64)]
SCATTERED = (64, 64, 64, 4, 4)
HIP_ARCHS = ("gfx942", "gfx950")
ARCHS = {"sm_90": CUDA, **dict.fromkeys(HIP_ARCHS, HIP)}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    arch: str,
    tile: tuple[int, ...],
    dtype: str,
    weights: int,
    biased: bool,
    whole: bool,
    aligned: bool = True,
) -> Any:
    """``whole``: lengths that tiles divide. ``aligned``: addresses and strides that are multiples of 16."""
    from specc.lowerings.triton_kernels.linear import _products
    from tests.lowerings.aot import compile_kernel

    outputs, tokens, inner, stages, warps = tile
    constants: dict[str, Any] = {"OUTPUTS": outputs, "TOKENS": tokens, "INNER": inner, "STAGES": stages}
    constants |= {"WHOLE": whole, "EVEN": whole, "ALIGNED": aligned}
    types = {"x": dtype}
    for each in (f"{name}{n}" for name in ("weight", "bias", "out") for n in range(MOST)):
        if int(each[-1]) < weights and (biased or not each.startswith("bias")):
            types[each] = dtype
        else:
            constants[each] = None
    integers = {name: "i32" for name in _products.arg_names if name not in types | constants}
    options = {"num_warps": warps} | ({} if arch == "sm_90" else {"matrix_instr_nonkdim": 16})
    return compile_kernel(
        _products,
        arch,
        {**integers, **types},
        constants,
        aligned=[*types, "inner", "x_stride"] if aligned else [],
        below_2gib=list(types) if aligned else [],
        **options,
    )


@pytest.mark.parametrize(("arch", "tile"), [(arch, tile) for arch, tiles in ARCHS.items() for tile in tiles])
@pytest.mark.parametrize(
    ("dtype", "weights", "biased", "whole"),
    [("*bf16", 1, False, True), ("*fp16", 4, True, True), ("*bf16", 3, True, False)],
)
def test_tiles(arch: str, tile: tuple[int, ...], dtype: str, weights: int, biased: bool, whole: bool) -> None:
    from tests.lowerings.aot import assert_fits

    assert_fits(compiled(arch, tile, dtype, weights, biased, whole), arch)


@pytest.mark.parametrize(("arch", "tile"), [("sm_90", SCATTERED), *((arch, HIP[0]) for arch in HIP_ARCHS)])
def test_rows_that_are_read_entry_by_entry(arch: str, tile: tuple[int, ...]) -> None:
    from tests.lowerings.aot import assert_fits

    assert_fits(compiled(arch, tile, "*bf16", 3, True, False, aligned=False), arch)


def test_the_table_is_what_is_compiled_here() -> None:
    from specc.lowerings.triton_kernels import linear
    from specc.lowerings.triton_kernels.linear import SHARED, Tile

    outputs, tokens, inner, stages, warps = SCATTERED
    assert Tile(outputs, inner, tokens, stages, warps) == linear.SCATTERED
    fewest = {(*shape, *shared[0]) for shape, shared in SHARED.items()}
    assert fewest <= set(CUDA)


@pytest.mark.parametrize("weights", [1, 4])
@pytest.mark.parametrize("tile", CUDA)
def test_weights_are_copied_16_bytes_at_a_time(tile: tuple[int, ...], weights: int) -> None:
    """A pointer chosen among four is still known to be aligned; instructions differ only in the tokens."""
    ptx = compiled("sm_90", tile, "*bf16", weights, False, True).asm["ptx"]
    copies = [line for line in ptx.splitlines() if "cp.async.c" in line and "commit" not in line]
    assert copies
    assert all(", 0x10" in line for line in copies)
    products = {line.split()[0] for line in ptx.splitlines() if "mma_async" in line}
    assert products == {f"wgmma.mma_async.sync.aligned.m64n{tile[1]}k16.f32.bf16.bf16"}


@pytest.mark.parametrize("arch", HIP_ARCHS)
def test_one_matrix_instruction_on_hip(arch: str) -> None:
    found = set()
    for tile in HIP:
        assembly = compiled(arch, tile, "*bf16", 1, False, True).asm["amdgcn"]
        found |= {line.split()[0] for line in assembly.splitlines() if line.strip().startswith("v_mfma")}
    assert len(found) == 1, found
