"""specc::greedy_select: the rule, its reference, and the Triton kernels as far as a CPU can tell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specc.errors import ProviderError
from specc.lowerings import greedy_select
from specc.lowerings.greedy_select import reference
from specc.lowerings.triton_kernels import obstacle

needs_triton = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))

NAN, INF = float("nan"), float("inf")
SIZES = (1, 2, 127, 8192, 8193, 151666)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def by_the_rule(row: Tensor) -> int:
    """The written rule, one entry at a time: NaN is below every number, the first maximum wins, else 0."""
    best = 0
    largest = -INF
    for index, value in enumerate(row.double().tolist()):
        if value > largest:
            best, largest = index, value
    return best


def fp8_rounded(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab).to(torch.float8_e4m3fn).float()


def some_nan(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.5, NAN)


def mostly_infinite(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab).masked_fill(torch.rand(rows, vocab) < 0.9, -INF)


def nan_or_minus_infinity(rows: int, vocab: int) -> Tensor:
    return torch.full((rows, vocab), -INF).masked_fill(torch.rand(rows, vocab) < 0.5, NAN)


def last_is_largest(rows: int, vocab: int) -> Tensor:
    return -torch.rand(rows, vocab) - torch.arange(vocab).flip(0)


def equal_maxima_in_two_blocks(rows: int, vocab: int) -> Tensor:
    x = -torch.rand(rows, vocab) - 1
    x[:, vocab // 3] = x[:, vocab - 1] = 0.0
    return x


CASES: dict[str, Callable[[int, int], Tensor]] = {
    "random": torch.randn,
    "ties": lambda rows, vocab: torch.randint(-2, 3, (rows, vocab)).float(),
    "all equal": torch.zeros,
    "signed zeros": lambda rows, vocab: torch.where(torch.rand(rows, vocab) < 0.5, 0.0, -0.0),
    "all negative": lambda rows, vocab: -torch.rand(rows, vocab) - 1,
    "fp8": fp8_rounded,
    "some NaN": some_nan,
    "all NaN": lambda rows, vocab: torch.full((rows, vocab), NAN),
    "mostly -inf": mostly_infinite,
    "all -inf": lambda rows, vocab: torch.full((rows, vocab), -INF),
    "NaN or -inf": nan_or_minus_infinity,
    "+inf": lambda rows, vocab: torch.where(torch.rand(rows, vocab) < 0.1, INF, torch.randn(rows, vocab)),
    "last": last_is_largest,
    "equal maxima far apart": equal_maxima_in_two_blocks,
}


def padded(x: Tensor) -> Tensor:
    """The same rows, each followed in memory by +inf, which must never be read."""
    storage = x.new_full((x.shape[0], x.shape[1] + 5), INF)
    storage[:, : x.shape[1]] = x
    return storage[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_reference_follows_the_rule(case: str, vocab: int, dtype: torch.dtype) -> None:
    x = CASES[case](2, vocab).to(dtype)
    chosen = reference(x)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [by_the_rule(row) for row in x]
    assert torch.equal(chosen, reference(x.double()))
    assert torch.equal(chosen, greedy_select(padded(x)))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 7), (1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(greedy_select(x), x.argmax(-1))
    strided = torch.randn(*shape[:-1], shape[-1] * 2)[..., ::2]
    assert torch.equal(greedy_select(strided), strided.argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload: str, dtype: torch.dtype) -> None:
    op = getattr(torch.ops.specc.greedy_select, overload)
    for x in (torch.randn(3, 9), torch.randn(0, 9), torch.randn(2, 3, 18)[..., ::2], torch.randn(5)):
        torch.library.opcheck(op, (x.to(dtype),))


@pytest.mark.parametrize("shape", [(), (3, 0)])
def test_fake_refuses_what_has_no_answer(shape: tuple[int, ...]) -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match="greedy_select"):
        greedy_select(torch.empty(shape))


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "provider"), [*((d, "triton") for d in DTYPES), (torch.float64, "reference")]
)
def test_choice_on_a_gpu(dtype: torch.dtype, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 9, device="cuda", dtype=dtype)
    assert greedy_select.choose(x).provider.name == provider
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert greedy_select.choose(x).provider.name == provider


def test_choice_on_a_cpu() -> None:
    decision = greedy_select.choose(torch.randn(2, 9))
    assert decision.describe() == "reference (not triton: needs a CUDA or HIP device, got cpu)"
    with pytest.raises(ProviderError, match="needs a CUDA or HIP device"):
        greedy_select.choose(torch.randn(2, 9), forced="triton")


# The kernels cast bf16 to float32 as they load it, and compute nothing in bf16, which the interpreter
# would get wrong: so all three dtypes can be tried.
def compare_in_the_interpreter() -> None:
    from specc.lowerings.triton_kernels.argmax import split_argmax

    torch.manual_seed(0)
    for dtype in DTYPES:
        for vocab in SIZES:
            for case, make in CASES.items():
                x = make(2, vocab).to(dtype)
                for layout in (x, padded(x)) if vocab < SIZES[-1] else (padded(x),):
                    chosen = split_argmax(layout)
                    assert torch.equal(chosen, reference(x)), (case, vocab, dtype, chosen, reference(x))
        for shape in ((0, 9), (2, 0, 9), (2, 3, 9), (9,)):
            x = torch.randn(shape).to(dtype)
            assert torch.equal(split_argmax(x), reference(x)), shape
        x = torch.randn(2, 18).to(dtype)[:, ::2]
        assert torch.equal(split_argmax(x), reference(x)), "strided in the vocabulary"


@needs_triton
def test_triton_in_the_interpreter() -> None:
    code = f"from {__name__} import compare_in_the_interpreter as compare; compare()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


TYPES = {
    "maxima": "*fp32",
    "indices": "*i32",
    "out": "*i64",
    "row_stride": "i32",
    "vocab": "i32",
    "num_blocks": "i32",
}
TENSORS = ("logits", "maxima", "indices", "out")


@needs_triton
@pytest.mark.parametrize("specialized", [False, True])
@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize(
    "kernel", ["_block_maxima[fp32]", "_block_maxima[fp16]", "_block_maxima[bf16]", "_merge_blocks[]"]
)
def test_triton_compiles(
    kernel: str, arch: str, specialized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specc.lowerings.triton_kernels import argmax
    from tests.lowerings.aot import assert_fits, compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    name, _, dtype = kernel.removesuffix("]").partition("[")
    function = getattr(argmax, name)
    constants = {"BLOCK": argmax.BLOCK} if dtype else {"BLOCKS": 64}
    tensors = [each for each in function.arg_names if each in TENSORS] if specialized else []
    compiled = compile_kernel(
        function, arch, {**TYPES, "logits": f"*{dtype}"}, constants, aligned=tensors, below_2gib=tensors
    )
    assert_fits(compiled, arch)
