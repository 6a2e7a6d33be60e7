"""The drop-in, the backend and the Triton kernels on a CUDA device."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import specc
from specc.lowerings import greedy_select
from specc.lowerings.greedy_select import reference
from tests.families import FAMILIES, noisy_copy, prompt, tiny


def on_cuda(model: Any) -> Any:
    return copy.deepcopy(model).cuda()


def inputs(rows: int) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in prompt(rows).items()}


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kind", ["ngram", "assistant"])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_tokens_equal_plain_decoding(family: str, rows: int, kind: str) -> None:
    model = on_cuda(tiny(family))
    draft = "ngram" if kind == "ngram" else on_cuda(noisy_copy(family))
    settings = {"max_new_tokens": 64, "do_sample": False}
    tokens = specc.generate(model, **inputs(rows), draft=draft, compile=False, **settings)
    assert torch.equal(tokens, model.generate(**inputs(rows), **settings))


@pytest.mark.parametrize("options", [{"inductor": False}, {}])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_tokens_equal_plain_decoding(family: str, options: Any, fresh_compiler: None) -> None:
    model, draft = on_cuda(tiny(family)), on_cuda(noisy_copy(family))
    settings = {"max_new_tokens": 64, "do_sample": False}
    tokens = specc.generate(model, **inputs(4), draft=draft, num_draft_tokens=4, options=options, **settings)
    assert torch.equal(tokens, model.generate(**inputs(4), **settings))


def test_modes_and_the_default_device_change_nothing(fresh_compiler: None) -> None:
    """Each call finds what the one before has kept."""
    model, given = on_cuda(tiny("llama")), inputs(4)
    settings = {"max_new_tokens": 64, "do_sample": False}
    expected = model.generate(**given, **settings)
    for mode in (torch.inference_mode(), torch.no_grad(), torch.device("cuda"), torch.enable_grad()):
        with mode:
            tokens = specc.generate(model, **given, draft="ngram", options={"inductor": False}, **settings)
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize("options", [{"inductor": False}, {}])
def test_greedy_select_takes_the_triton_kernel(options: Any, tmp_path: Path, fresh_compiler: None) -> None:
    def select(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1).topk(1).indices

    logits = torch.randn(4, 128256, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(select, backend="specc", options={**options, "dump": str(tmp_path)})
    with torch.no_grad():
        chosen = compiled(logits)
    assert torch.equal(chosen[:, 0], reference(logits))
    assert "greedy_select takes triton" in (tmp_path / "graph_000" / "remarks.txt").read_text()


def rows_of(kind: str, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(6, vocab, device="cuda")
    if kind == "tied":
        x = x.mul(2).round()
    elif kind == "nan":
        x[:, ::3] = torch.nan
    elif kind == "all nan":
        x[:] = torch.nan
    elif kind == "all -inf":
        x[:] = -torch.inf
    elif kind == "negative":
        x = -x.abs() - 1
    elif kind == "last":
        x[:, -1] = 100.0
    elif kind == "fp8":
        x = x.to(torch.float8_e4m3fn).float()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 2, 127, 4096, 4097, 8193, 151666, 248320])
def test_the_argmax_kernel_follows_the_rule(vocab: int, dtype: torch.dtype) -> None:
    for kind in ("random", "tied", "nan", "all nan", "all -inf", "negative", "last", "fp8"):
        logits = rows_of(kind, vocab, dtype)
        # Rows inside a wider buffer, with what must not be read behind them.
        buffer = torch.full((6, vocab + 5), torch.inf, device="cuda", dtype=dtype)
        buffer[:, :vocab] = logits
        for rows in (logits, buffer[:, :vocab]):
            chosen = torch.ops.specc.greedy_select.triton(rows)
            assert torch.equal(chosen, reference(logits.cpu()).cuda()), kind
            assert bool(((chosen >= 0) & (chosen < vocab)).all())


def test_rows_beyond_two_gib() -> None:
    vocab, rows = 131072, 16500
    logits = torch.zeros(rows, vocab, device="cuda", dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    at = torch.randint(0, vocab, (rows,), device="cuda")
    logits.scatter_(1, at[:, None], 1.0)
    assert torch.equal(greedy_select(logits), at)


def test_a_model_on_two_devices_is_refused() -> None:
    model = copy.deepcopy(tiny("llama"))
    model.lm_head.cuda()
    with pytest.raises(specc.InputError, match="spread over cpu, cuda:0"):
        specc.generate(model, **prompt(1), draft="ngram")
    with pytest.raises(specc.InputError, match="the draft model is on cuda:0 and the model on cpu"):
        specc.generate(tiny("llama"), **prompt(1), draft=on_cuda(tiny("llama")))
