"""Compiles Triton kernels for CUDA and HIP on a machine without a GPU, and reads what the binaries say."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel


@dataclasses.dataclass(frozen=True)
class Arch:
    """``shared``: bytes a program may use. ``machine``, ``flags``: what the ELF header says of the arch."""

    target: GPUTarget
    shared: int
    machine: int
    flags: int


ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), 166912, 190, 80),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), 232448, 190, 90),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), 65536, 224, 0x4C),
    "gfx950": Arch(GPUTarget("hip", "gfx950", 64), 163840, 224, 0x4F),
}


def compile_kernel(
    kernel: Any,
    arch: str,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    aligned: Sequence[str] = (),
    below_2gib: Sequence[str] = (),
    **options: Any,
) -> CompiledKernel:
    """Compile a function of Triton's or of Gluon's ``jit``.

    ``types``: "*bf16", "i32", ... of the run-time arguments;
    ``aligned``: arguments divisible by 16; ``below_2gib``: tensors that HIP may reach with 32-bit offsets.
    A launch finds out both by itself, so test with and without. ``options``: num_warps, num_stages, ...
    """
    at = {name: (position,) for position, name in enumerate(kernel.arg_names)}
    ranged = below_2gib if ARCHS[arch].target.backend == "hip" else ()
    facts = [("tt.divisibility", 16, aligned), ("tt.pointer_range", 32, ranged)]
    attributes = {at[name]: [[fact, n] for fact, n, names in facts if name in names] for name in at}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    constexprs = {at[name]: value for name, value in constants.items()}
    source: Any = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    made = source(kernel, signature, constexprs, attributes)
    return triton.compile(made, target=ARCHS[arch].target, options=options)


def assert_fits(compiled: CompiledKernel, arch: str, stack: int = 0) -> None:
    """No spills, shared memory within the limit (triton.compile does not check it), and the right machine.

    ``stack``: bytes of a CUDA thread's stack to let pass.
    """
    limits, cuda = ARCHS[arch], ARCHS[arch].target.backend == "cuda"
    binary = compiled.asm["cubin" if cuda else "hsaco"]
    assert int.from_bytes(binary[18:20], "little") == limits.machine
    assert limits.flags in binary[48:50], binary[48:52].hex()  # A newer CUDA ABI has it one byte up.
    assert compiled.metadata.shared <= limits.shared
    spilled = _cuda_spills(binary) if cuda else _hip_spills(compiled.asm["amdgcn"])
    assert max(spilled.pop("STACK", 0) - stack, *spilled.values()) <= 0, spilled


def _cuda_spills(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(buffering=0) as file:
        file.write(cubin)
        command = triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name
        usage = subprocess.check_output(command, text=True)
    return {name: int(size) for name, size in re.findall(r"(STACK|LOCAL):(\d+)", usage)}


def _hip_spills(assembly: str) -> dict[str, int]:
    return {name: int(n) for name, n in re.findall(r"([vs]gpr_spill_count|ScratchSize):\s+(\d+)", assembly)}
