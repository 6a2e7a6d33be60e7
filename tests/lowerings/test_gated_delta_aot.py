"""The Gated DeltaNet kernels compile for each GPU as they are shipped, without spills."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specc.lowerings.triton_kernels import gluon_obstacle, obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

ARCHS = ("sm_90", "gfx942", "gfx950")
FLOATS = ("g", "beta", "ring_u", "ring_g", "states", "matrices", "scores", "weights")
INDICES = ("base", "seq_lens", "final_lens", "slots", "upto", "track_slots", "track_upto")
STRIDES = ("_row", "_token", "_head", "_entry", "_key")
LAYER = {"K": 128, "V": 128, "GROUP": 2, "BLOCK_K": 128, "L2NORM": True}


def compile_for(
    kernel: Any,
    arch: str,
    constants: dict[str, Any],
    dtype: str,
    pool: str,
    ranged: bool,
    aligned: Sequence[str] | None = None,
    **options: Any,
) -> Any:
    """Pointers and strides are divisible by 16, as those of layers are, or those of ``aligned``; ``ranged``:
    tensors below 2 GiB.
    """
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
        aligned=tensors + strides if aligned is None else aligned,
        below_2gib=tensors if ranged else [],
        **{"num_stages": 1, **options},
    )


def parts(arch: str, dtype: str, pool: str) -> dict[str, Any]:
    """What ``gated_delta_rule.parts`` says there."""
    exact = arch != "sm_90" or dtype == "fp32"
    return {"PARTS": 0 if exact else 2 if pool == "fp32" else 1, "FOLD_PARTS": 0 if exact else 2}


def let_scalars_pass(compiled: Any) -> Any:
    """A few scalars that AMD's compiler keeps in lanes of vector registers, which costs no memory."""
    if "amdgcn" in compiled.asm:
        compiled.asm["amdgcn"] = re.sub(
            r"(sgpr_spill_count:\s+)(\d|1\d)\b", r"\g<1>0", compiled.asm["amdgcn"]
        )
    return compiled


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in LAYER.items() if name not in names}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


STRIDES_WITHIN = {
    "q_token": 2048, "k_token": 2048, "v_token": 4096, "g_token": 32, "beta_token": 32, "state_key": 128,
    "ring_k_entry": 2048, "ring_u_entry": 4096, "ring_g_entry": 32,
}  # fmt: skip
# Tokens, inputs, states and the dimension of keys and values.
CASES = [(8, "bf16", "fp32", 128), (16, "bf16", "bf16", 128)]
WIDE_CASES = [(8, "fp32", "fp32", 128), (8, "bf16", "fp32", 256), (16, "fp32", "fp32", 256)]


def replay_constants(arch: str, tokens: int, dtype: str, pool: str, dim: int, ring: int) -> dict[str, Any]:
    within = {**STRIDES_WITHIN, "state_key": dim}
    size = {"K": dim, "V": dim, "BLOCK_K": dim, "EVEN": True, "RING": ring, "FLUSH_EVERY": 16}
    found = parts(arch, dtype, pool)
    cut = {2: 3}.get(found["PARTS"], found["PARTS"])
    sums = 3 if found["FOLD_PARTS"] else 0
    padded = {"TOKENS": 8 if tokens <= 8 else 16, "RECORDS": 32 if ring > 17 else 16}
    return {**LAYER, **within, **size, **found, **padded, "PARTS": cut, "SUMS": sums}


@pytest.mark.parametrize(("tokens", "dtype", "pool", "dim"), CASES + WIDE_CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_fast_replay(arch: str, tokens: int, dtype: str, pool: str, dim: int) -> None:
    from specc.lowerings.triton_kernels import gated_delta_fast
    from tests.lowerings.aot import assert_fits

    if arch != "sm_90" and (tokens, dtype, dim) == (16, "fp32", 256):
        pytest.skip("about 20 registers are spilled")
    backend = "cuda" if arch == "sm_90" else "hip"
    chosen = {tiles for (name, _), tiles in gated_delta_fast.TILES.items() if name == backend}
    if tokens > 8 or dim > 128 or dtype == "fp32":
        chosen = {gated_delta_fast.WIDE}
    for tiles in sorted(chosen, key=str):
        constants = replay_constants(arch, tokens, dtype, pool, dim, 15 + 2 * tokens)
        constants |= {"BLOCK_V": tiles.columns, "CHUNK": tiles.keys, "STAGES": tiles.num_stages}
        constants |= {"FOLD_CHUNK": tiles.folded, "PICKED": arch == "sm_90"}
        if constants["FOLD_PARTS"] and dtype == "bf16":
            constants["FOLD_PARTS"] = 4
        options = {"num_warps": tiles.num_warps, "ranged": tokens == 8}
        compiled = compile_for(gated_delta_fast._replay, arch, constants, dtype, pool, **options)
        # A few registers, by one of two versions of the assembler each.
        assert_fits(let_scalars_pass(compiled), arch, stack=24)


@pytest.mark.skipif(gluon_obstacle() is not None, reason=str(gluon_obstacle()))
@pytest.mark.parametrize("usual", [True, False])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_replay_in_accumulators(arch: str, usual: bool) -> None:
    """As a layer of the usual shape has it; with wide values, no norms, and nothing aligned but the state."""
    from specc.lowerings.triton_kernels import gated_delta_gluon
    from tests.lowerings.aot import assert_fits

    changes = {"slots": None, "RING": 31} if usual else {"V": 256, "L2NORM": False, "GROUP": 3, "RING": 39}
    for tiles in gated_delta_gluon.TILES.values():
        constants = {**without("BLOCK_K"), **STRIDES_WITHIN, "FLUSH_EVERY": 16, **changes}
        constants |= {"COLUMNS": tiles.columns, "WARPS": tiles.num_warps, "CHUNK": tiles.keys}
        constants |= {"STAGES": tiles.num_stages}
        options = {"num_warps": tiles.num_warps, "ranged": False}
        options |= {} if usual else {"aligned": ["state", "state_row", "state_head"]}
        compiled = compile_for(gated_delta_gluon._replay, arch, constants, "bf16", "fp32", **options)
        assert_fits(compiled, arch, stack=0 if usual else 176)


@pytest.mark.parametrize(
    ("ring", "dtype", "dim"), [(17, "bf16", 128), (31, "bf16", 128), (17, "fp32", 256), (31, "bf16", 256)]
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_replay_of_one_token(arch: str, ring: int, dtype: str, dim: int) -> None:
    from specc.lowerings.triton_kernels import gated_delta_one
    from tests.lowerings.aot import assert_fits

    usual = ring == 17 and dtype == "bf16" and dim == 128
    for tiles in gated_delta_one.TILES.values() if usual else (gated_delta_one.WIDE,):
        constants = replay_constants(arch, 1, dtype, "fp32", dim, ring) | {"BLOCK_V": tiles.columns}
        names = gated_delta_one._replay.arg_names
        constants = {name: value for name, value in constants.items() if name in names}
        options = {"num_warps": tiles.num_warps, "ranged": usual}
        assert_fits(compile_for(gated_delta_one._replay, arch, constants, dtype, "fp32", **options), arch)


@pytest.mark.parametrize(("tokens", "dtype", "pool", "dim"), CASES + WIDE_CASES[:2])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_exact_replay(arch: str, tokens: int, dtype: str, pool: str, dim: int) -> None:
    from specc.lowerings.triton_kernels import gated_delta_exact
    from tests.lowerings.aot import assert_fits

    overlap = arch == "sm_90"
    shared = {"TOKENS": tokens, "RECORDS": 16, "FLUSH_EVERY": 16, "RING": 15 + 2 * tokens, "OVERLAP": overlap}
    options = {"enable_fp_fusion": False, "ranged": tokens == 8}
    size = {"K": dim, "V": dim, "CHUNK_K": gated_delta_exact.CHUNK, "EVEN": True}
    usual = tokens <= 8 and dim <= 128 and dtype != "fp32"
    for tiles in gated_delta_exact.TILES.values() if usual else (gated_delta_exact.WIDE,):
        constants = {**without("BLOCK_K", "L2NORM"), **size, **shared, **parts(arch, dtype, pool)}
        constants |= {"BLOCK_V": tiles.columns, "STAGES": tiles.num_stages}
        more = {"num_warps": tiles.num_warps, **({"launch_pdl": True} if overlap else {})}
        compiled = compile_for(gated_delta_exact._verify, arch, constants, dtype, pool, **options, **more)
        # A few registers, by Triton 3.9's assembler.
        assert_fits(compiled, arch, stack=24)
    constants = {**LAYER, "K": dim, "BLOCK_K": dim, **shared}
    constants.pop("V")
    warps = {
        "num_warps": gated_delta_exact.prepare_warps(torch.float32 if dtype == "fp32" else torch.bfloat16)
    }
    kernel = gated_delta_exact._prepare
    assert_fits(compile_for(kernel, arch, constants, dtype, pool, **options, **warps), arch)


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
