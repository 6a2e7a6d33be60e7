"""Paged attention under whole models on a CUDA device: the pass on, real pools, stock static caches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import specc
from tests.families import FAMILIES, noisy_copy, prompt, tiny

CAPTURED = {"inductor": False}
# In float32, experts ask the host for their numbers, which no graph of a device can.
TRIED = {"options": CAPTURED, "device_graph": "try"}
SETTINGS = {"max_new_tokens": 64, "do_sample": False}


def on_cuda(model: Any) -> Any:
    return copy.deepcopy(model).cuda()


def inputs(rows: int, width: int = 48) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in prompt(rows, width).items()}


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_decoding(family: str, rows: int, fresh_compiler: None) -> None:
    model, assistant, given = on_cuda(tiny(family)), on_cuda(noisy_copy(family)), inputs(rows)
    plain = model.generate(**given, **SETTINGS)
    for num_draft_tokens in (2, 4, 8):
        for draft in ("ngram", assistant):
            call = {"draft": draft, "num_draft_tokens": num_draft_tokens, **TRIED, **SETTINGS}
            assert torch.equal(specc.generate(model, **given, **call), plain), (num_draft_tokens, draft)


@pytest.mark.parametrize("num_draft_tokens", [2, 8])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_small_pages_and_rings(
    family: str, num_draft_tokens: int, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specc.runtime.model.PAGE_SIZE", 16)
    model, draft, given = on_cuda(tiny(family)), on_cuda(noisy_copy(family)), inputs(4)
    tokens = specc.generate(
        model,
        **given,
        draft=draft,
        num_draft_tokens=num_draft_tokens,
        prefill_chunk_size=7,
        **TRIED,
        **SETTINGS,
    )
    assert torch.equal(tokens, model.generate(**given, **SETTINGS))


def test_the_kernels_are_taken(tmp_path: Path, fresh_compiler: None) -> None:
    options = {**CAPTURED, "dump": str(tmp_path)}
    specc.generate(on_cuda(tiny("gemma3")), **inputs(2), draft="ngram", options=options, **SETTINGS)
    for remarks in sorted(tmp_path.glob("*/remarks.txt")):
        text = remarks.read_text()
        for op in ("unified_attention", "scatter_req_to_token_to_page_table", "kv_write"):
            assert f"{op} takes triton" in text, f"{op} in {remarks.name}"


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fp8_pools_give_the_tokens_of_plain_decoding_over_them(
    family: str, rows: int, fresh_compiler: None
) -> None:
    model, draft, given = on_cuda(tiny(family)), on_cuda(noisy_copy(family)), inputs(rows)
    call = {**SETTINGS, "kv_dtype": "fp8", "options": CAPTURED}
    plain = specc.generate(model, **given, draft="ngram", num_draft_tokens=1, **call)
    assert torch.equal(specc.generate(model, **given, draft=draft, num_draft_tokens=4, **call), plain)


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_is_read_as_pages(family: str, q_len: int, fresh_compiler: None) -> None:
    model = on_cuda(tiny(family))
    ids = inputs(1, 24)["input_ids"].repeat(3, 1)

    def logits(forward: Any) -> torch.Tensor:
        cache = StaticCache(config=model.config, max_cache_len=64)
        found = []
        with torch.no_grad():
            model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True)
            for at in range(6, 6 + 4 * q_len, q_len):
                out = forward(input_ids=ids[:, at : at + q_len], past_key_values=cache, use_cache=True)
                found.append(out.logits)
        return torch.cat(found, 1)

    compiled = torch.compile(model.forward, backend="specc", fullgraph=True, options=CAPTURED)
    torch.testing.assert_close(logits(compiled), logits(model.forward), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_through_inductor(family: str, fresh_compiler: None) -> None:
    model, draft, given = on_cuda(tiny(family)), on_cuda(noisy_copy(family)), inputs(4)
    # In float32, experts ask the host for their numbers, which no graph of a device can.
    settings = {**SETTINGS, "device_graph": "try"}
    tokens = specc.generate(model, **given, draft=draft, num_draft_tokens=4, **settings)
    assert torch.equal(tokens, model.generate(**given, **SETTINGS))


def test_bfloat16_blocks_of_any_length_choose_the_same_tokens(fresh_compiler: None) -> None:
    """Our kernels fix their sums and cuBLAS gives a row the same bits in blocks of 2 to 32."""
    model = on_cuda(tiny("llama")).to(torch.bfloat16)
    given = inputs(4)
    call = {**SETTINGS, "draft": "ngram", "options": {**CAPTURED, "exact": False}}
    plain = specc.generate(model, **given, num_draft_tokens=2, **call)
    for num_draft_tokens in (4, 8):
        assert torch.equal(specc.generate(model, **given, num_draft_tokens=num_draft_tokens, **call), plain)
