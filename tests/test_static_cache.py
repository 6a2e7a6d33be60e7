"""A user's own torch.compile(model, backend="specc") over transformers.StaticCache."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CompileConfig, Gemma2Config, Gemma2ForCausalLM, StaticCache

from tests.families import COMMON, FAMILIES, WINDOW, prompt, tiny

ROWS, CAPACITY, STEPS = 2, 32, 3

# Tokens read before the compiled steps; the window is 8.
PREFILLS = {"not full": (2,), "becoming full": (5,), "full": (6, 6)}
CASES = [
    (family, prefill)
    for family in FAMILIES
    for prefill in PREFILLS
    if family in ("gemma3", "gpt_oss") or prefill == "becoming full"
]
LATENT = "latent attention (MLA)"


def run_steps(model: Any, forward: Any, prefill: tuple[int, ...], q_len: int) -> tuple[Any, StaticCache]:
    """Eager prefill, then ``STEPS`` blocks through ``forward``: their logits, and the cache behind them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (ROWS, sum(prefill) + q_len * STEPS), generator=generator)
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    logits, at = [], 0
    with torch.no_grad():
        for length in prefill:
            model(input_ids=ids[:, at : at + length], past_key_values=cache, use_cache=True)
            at += length
        for _ in range(STEPS):
            block = ids[:, at : at + q_len]
            logits.append(forward(input_ids=block, past_key_values=cache, use_cache=True).logits)
            at += q_len
    return torch.cat(logits, 1), cache


def remarks(dump: Path, pass_name: str, status: str) -> list[str]:
    """What a pass said over all graphs."""
    lines = [line for file in sorted(dump.glob("*/remarks.txt")) for line in file.read_text().splitlines()]
    return [line for line in lines if line.startswith(f"{pass_name}: {status}")]


def compare_with_eager(model: Any, dump: Path, q_len: int, prefill: tuple[int, ...], **options: Any) -> None:
    expected, expected_cache = run_steps(model, model, prefill, q_len)
    settings = {"inductor": False, "dump": str(dump), **options}
    compiled = torch.compile(model.forward, backend="specc", fullgraph=True, options=settings)
    logits, cache = run_steps(model, compiled, prefill, q_len)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(layer.values, other.values, atol=2e-5, rtol=2e-5)
        assert int(layer.get_seq_length()) == int(other.get_seq_length())


def graphs(dump: Path) -> int:
    return len(list(dump.glob("graph_*")))


def check_remarks(model: Any, dump: Path) -> None:
    """All attention of all graphs was rewritten, over one page table for each kind of layer."""
    layers = model.config.num_hidden_layers * graphs(dump)
    fired = remarks(dump, "canonicalize", "fired")
    assert sum("attention over a static cache" in line for line in fired) == layers > 0, fired
    assert remarks(dump, "canonicalize", "refused") == []
    assert len(remarks(dump, "verify_attention", "fired")) == layers
    assert remarks(dump, "verify_attention", "refused") == []


@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize(("family", "prefill"), CASES)
def test_every_family(family: str, q_len: int, prefill: str, fresh_compiler: None, tmp_path: Path) -> None:
    model = tiny(family)
    compare_with_eager(model, tmp_path, q_len, PREFILLS[prefill])
    if family == "deepseek_v3":
        refused = remarks(tmp_path, "canonicalize", "refused")
        assert len(refused) == model.config.num_hidden_layers * graphs(tmp_path)
        assert all(LATENT in line for line in refused)
        assert remarks(tmp_path, "verify_attention", "fired") == []
    else:
        check_remarks(model, tmp_path)


def test_families_without_a_window_share_one_page_table(fresh_compiler: None, tmp_path: Path) -> None:
    compare_with_eager(tiny("llama"), tmp_path, 3, (5,))
    fired = remarks(tmp_path, "verify_attention", "fired")
    assert [("by a page table of 32s" in line, "by the same page table" in line) for line in fired] == [
        (True, False),
        (False, True),
    ]
    appended = [line for line in remarks(tmp_path, "canonicalize", "fired") if "appends" in line]
    assert len(appended) == 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations(implementation: str, fresh_compiler: None, tmp_path: Path) -> None:
    model = FAMILIES["llama"]().eval()
    model.load_state_dict(tiny("llama").state_dict())
    model.set_attn_implementation(implementation)
    compare_with_eager(model, tmp_path, 3, (5,))
    check_remarks(model, tmp_path)


@functools.cache
def gemma2() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**{**COMMON, "head_dim": 16}, sliding_window=WINDOW, attn_logit_softcapping=2.0)
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("q_len", [1, 3])
def test_softcap(q_len: int, fresh_compiler: None, tmp_path: Path) -> None:
    compare_with_eager(gemma2(), tmp_path, q_len, PREFILLS["becoming full"])
    check_remarks(gemma2(), tmp_path)


def test_without_the_passes_the_results_are_the_same(fresh_compiler: None, tmp_path: Path) -> None:
    compare_with_eager(tiny("gemma3"), tmp_path, 3, (5,), disable_passes=["verify_attention"])
    assert remarks(tmp_path, "verify_attention", "fired") == []
    compare_with_eager(tiny("qwen3"), tmp_path / "none", 3, (5,), disable_passes=["canonicalize"])
    assert not remarks(tmp_path / "none", "canonicalize", "fired")


def test_lengths_change_without_a_recompile(fresh_compiler: None, tmp_path: Path) -> None:
    compare_with_eager(tiny("llama"), tmp_path, 1, (4,))
    assert graphs(tmp_path) == 1


def test_a_block_beyond_the_end_reaches_no_other_head(fresh_compiler: None) -> None:
    """index_copy_ would raise here; what lies before the end has to stay, for every head and row."""
    model = tiny("llama")
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids = prompt(ROWS)["input_ids"]
    compiled = torch.compile(model.forward, backend="specc", fullgraph=True, options={"inductor": False})
    with torch.no_grad():
        model(input_ids=ids[:, :7], past_key_values=cache, use_cache=True)
        before = [layer.keys[:, :, :7].clone() for layer in cache.layers]
        compiled(input_ids=ids[:, 7:10], past_key_values=cache, use_cache=True)
    for layer, kept in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :7], kept)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_over_a_static_cache(family: str, fresh_compiler: None, tmp_path: Path) -> None:
    """generate makes the masks itself, outside the compiled forward: they are inputs, and are kept."""
    model = tiny(family)
    config = CompileConfig(backend="specc", options={"inductor": False, "dump": str(tmp_path)}, mode=None)
    config._compile_all_devices = True
    settings = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**prompt(2), **settings, disable_compile=True)
    tokens = model.generate(**prompt(2), **settings, compile_config=config)
    assert torch.equal(tokens, expected)
    assert graphs(tmp_path) > 0, "nothing was compiled"
    fired = [line for line in remarks(tmp_path, "canonicalize", "fired") if "attention" in line]
    refused = remarks(tmp_path, "canonicalize", "refused")
    assert len(fired) + len(refused) == model.config.num_hidden_layers * graphs(tmp_path)
    assert all("attention keeps its mask: it depends on" in line for line in refused)


# On a CPU, torch 2.11's Inductor clones what kv_write's index_put_ changes through a view.
COPIES = pytest.mark.xfail(torch.__version__.startswith("2.11"), reason="torch 2.11 copies", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "prefill"), [pytest.param("llama", "not full", marks=COPIES), ("gemma3", "full")]
)
def test_inductor_views_the_static_cache_without_a_copy(
    family: str, prefill: str, fresh_compiler: None
) -> None:
    """No buffer as large as one layer's keys is made; a full window is the model's own copy."""
    from torch._inductor.utils import run_and_get_code

    model = tiny(family)
    expected, _ = run_steps(model, model, PREFILLS[prefill], 3)
    compiled = torch.compile(model.forward, backend="specc", fullgraph=True, options={"inductor": True})
    (logits, cache), codes = run_and_get_code(run_steps, model, compiled, PREFILLS[prefill], 3)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)
    if family == "llama":
        sizes = [
            [int(size) for size in re.findall(r"\d+", shape)]
            for code in codes
            for shape in re.findall(r"empty_strided_cpu\(\(([^)]*)\)", code)
        ]
        assert sizes, "no allocation was found in the generated code"
        cached = cache.layers[0].keys
        assert max(torch.Size(size).numel() for size in sizes) < cached.numel()
        assert all("unified_attention" in code for code in codes)
