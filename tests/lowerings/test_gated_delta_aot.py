"""The Gated DeltaNet kernels compile for each GPU as they are shipped, without spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

ARCHS = ("sm_90", "gfx942", "gfx950")
FLOATS = ("g", "beta", "ring_u", "ring_g", "states", "matrices", "scores", "weights")
INDICES = ("base", "seq_lens", "final_lens", "slots", "upto", "track_slots", "track_upto")
STRIDES = ("_row", "_token", "_head", "_entry", "_key")
LAYER = {"K": 128, "V": 128, "GROUP": 2, "BLOCK_K": 128, "L2NORM": True}


def compile_for(
    kernel: Any, arch: str, constants: dict[str, Any], dtype: str, pool: str, ranged: bool, **options: Any
) -> Any:
    """Pointers and strides are divisible by 16, as those of layers are; ``ranged``: tensors below 2 GiB."""
    from tests.lowerings.aot import compile_kernel

    known = dict.fromkeys(("q", "k", "v", "xs", "ring_k", "out"), f"*{dtype}") | dict.fromkeys(
        FLOATS, "*fp32"
    )
    known |= dict.fromkeys(INDICES, "*i64") | {"state": f"*{pool}", "scale": "fp32", "plan": "*i32"}
    types = {name: known.get(name, "i32") for name in kernel.arg_names if name not in constants}
    tensors = [name for name, kind in types.items() if kind.startswith("*")]
    strides = [name for name in types if name.endswith(STRIDES)]
    return compile_kernel(
        kernel,
        arch,
        types,
        constants,
        aligned=tensors + strides,
        below_2gib=tensors if ranged else [],
        **{"num_stages": 1, **options},
    )


def parts(arch: str, dtype: str, pool: str) -> dict[str, Any]:
    """What ``gated_delta_rule.parts`` says there."""
    exact = arch != "sm_90" or dtype == "fp32"
    return {"PARTS": 0 if exact else 2 if pool == "fp32" else 1, "FOLD_PARTS": 0 if exact else 2}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in LAYER.items() if name not in names}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


CASES = [(8, "bf16", "fp32"), (16, "bf16", "bf16")]


@pytest.mark.parametrize(("tokens", "dtype", "pool"), CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_fast_replay(arch: str, tokens: int, dtype: str, pool: str) -> None:
    from specc.lowerings.triton_kernels import gated_delta_fast
    from tests.lowerings.aot import assert_fits

    backend = "cuda" if arch == "sm_90" else "hip"
    shared = {"TOKENS": tokens, "RECORDS": 32, "SUMS": "tf32x3" if arch == "sm_90" else "ieee"}
    chosen = {tiles for (name, _), tiles in gated_delta_fast.TILES.items() if name == backend}
    for tiles in sorted(chosen, key=str):
        constants = {
            **without("BLOCK_K", "L2NORM"),
            **shared,
            **parts(arch, dtype, pool),
            "CHUNK_K": tiles.keys,
            "BLOCK_V": tiles.columns,
            "EVEN": True,
            "STAGES": tiles.num_stages,
        }
        options = {"num_warps": tiles.num_warps if tokens == 8 else gated_delta_fast.LONG_WARPS}
        kernel = gated_delta_fast._verify
        compiled = compile_for(kernel, arch, constants, dtype, pool, ranged=tokens == 8, **options)
        assert_fits(compiled, arch)
    constants = {**without("V"), **shared, "FLUSH_EVERY": 16, "DOTS": "ieee"}
    for warps in sorted({tiles.prepare_warps for tiles in chosen}):
        options = {"num_warps": warps if tokens == 8 else gated_delta_fast.LONG_WARPS}
        kernel = gated_delta_fast._prepare
        assert_fits(compile_for(kernel, arch, constants, dtype, pool, ranged=tokens == 8, **options), arch)


@pytest.mark.parametrize(("tokens", "dtype", "pool"), CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_exact_replay(arch: str, tokens: int, dtype: str, pool: str) -> None:
    from specc.lowerings.triton_kernels import gated_delta_exact
    from tests.lowerings.aot import assert_fits

    shared = {"TOKENS": tokens, "RECORDS": 16, "FLUSH_EVERY": 16}
    options = {"num_warps": gated_delta_exact.WARPS, "enable_fp_fusion": False, "ranged": tokens == 8}
    constants = {
        **without("BLOCK_K", "L2NORM"),
        **shared,
        **parts(arch, dtype, pool),
        "CHUNK_K": gated_delta_exact.CHUNK,
        "BLOCK_V": gated_delta_exact.COLUMNS,
        "EVEN": True,
        "STAGES": gated_delta_exact.STAGES,
    }
    assert_fits(compile_for(gated_delta_exact._verify, arch, constants, dtype, pool, **options), arch)
    constants = {**without("V"), **shared, "DOTS": "ieee"}
    assert_fits(compile_for(gated_delta_exact._prepare, arch, constants, dtype, pool, **options), arch)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_folds(arch: str, tracked: bool) -> None:
    from specc.lowerings.triton_kernels import gated_delta_rule
    from tests.lowerings.aot import assert_fits

    constants = {**LAYER, "PARTS": 2 if arch == "sm_90" else 0, "RECORDS": 32, "BLOCK_V": 32}
    if not tracked:
        constants |= {"slots": None, "track_slots": None, "track_upto": None, "L2NORM": False}
    compiled = compile_for(
        gated_delta_rule._fold, arch, constants, "bf16", "fp32", ranged=tracked, num_warps=4
    )
    assert_fits(compiled, arch)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_recurrence(arch: str, each: bool) -> None:
    from specc.lowerings.triton_kernels import gated_delta_rule
    from tests.lowerings.aot import assert_fits

    constants = {**LAYER, "EACH": each, "BLOCK_V": 32}
    if not each:
        constants |= {"slots": None, "state": None, "L2NORM": False}
    compiled = compile_for(
        gated_delta_rule._recurrent, arch, constants, "bf16", "fp32", ranged=each, num_warps=2
    )
    assert_fits(compiled, arch)
