"""The kernels of Mamba2, of short convolutions and of commits compile for each GPU, without spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from specc.lowerings.triton_kernels import obstacle

pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

ARCHS = ("sm_90", "gfx942", "gfx950")
OPTIONAL = ("d", "dt_bias", "slots", "track_slots", "track_upto", "track_steps", "bias")
# What is not a tensor of the block's dtype, nor an integer.
TYPES = {
    **dict.fromkeys(("a", "d", "dt_bias", "ring_dt"), "*fp32"),
    **dict.fromkeys(("base", "seq_lens", "final_lens", "upto", "slots", "last_steps"), "*i64"),
    **dict.fromkeys(("track_slots", "track_upto", "track_steps"), "*i64"),
    **dict.fromkeys(("dt_min", "dt_max"), "fp32"),
}
BLOCKS = ("y", "x", "dt", "b", "c", "ring_x", "ring_b", "ring", "weight", "bias", "snapshots")
STATES = ("state", "states")


def assert_compiles(
    kernel: Any, arch: str, block: str, state: str, constants: dict[str, Any], *, bare: bool = False
) -> None:
    """``bare``: without the optional tensors and what launches know of alignment and size."""
    from tests.lowerings.aot import assert_fits, compile_kernel

    options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = TYPES | dict.fromkeys(BLOCKS, block) | dict.fromkeys(STATES, state)
    if bare:
        constants |= {name: None for name in OPTIONAL if name in kernel.arg_names}
    # Strides that are a model's, not a call's.
    fixed = {name for name in kernel.arg_names if kernel.params[kernel.arg_names.index(name)].is_constexpr}
    constants = dict.fromkeys(fixed, 128) | constants
    types = {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
    tensors = [name for name, kind in types.items() if kind.startswith("*") and not bare]
    compiled = compile_kernel(kernel, arch, types, constants, aligned=tensors, below_2gib=tensors, **options)
    assert_fits(compiled, arch)


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("block", "state", "size", "bare"),
    [("*bf16", "*fp32", 128, False), ("*fp32", "*bf16", 256, True), ("*fp16", "*fp32", 16, False)],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_ssd(arch: str, block: str, state: str, size: int, bare: bool) -> None:
    from specc.lowerings.triton_kernels import ssd, ssd_fold, ssd_replay, ssd_snapshot

    constants = ssd.tiles_of(64, size, arch != "sm_90") | ssd.OPTIONS | {"EVERY": 16, "SOFTPLUS": not bare}
    for kernel in (ssd_replay._replay, ssd_fold._fold, ssd_snapshot._snapshot):
        assert_compiles(kernel, arch, block, state, constants, bare=bare)


@pytest.mark.parametrize(("block", "bare"), [("*bf16", False), ("*fp32", True)])
@pytest.mark.parametrize("arch", ARCHS)
def test_convolutions_and_commits(arch: str, block: str, bare: bool) -> None:
    from specc.lowerings.triton_kernels import causal_conv1d, commit_snapshots

    sizes = {"BLOCK_T": causal_conv1d.BLOCK_T, "BLOCK_C": causal_conv1d.BLOCK_C} | causal_conv1d.OPTIONS
    constants = {**sizes, "WIDTH": 4, "BLOCK_W": 4, "SILU": not bare, "EVEN": not bare}
    for kernel in (causal_conv1d._replay, causal_conv1d._inputs, causal_conv1d._commit):
        assert_compiles(kernel, arch, block, block, constants, bare=bare)
    constants = {"BLOCK": commit_snapshots.BLOCK}
    assert_compiles(commit_snapshots._commit, arch, block, "*fp32", constants, bare=bare)
