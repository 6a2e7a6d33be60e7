"""Breadth: many more stock families, tiny and random, drafting for themselves in a ragged batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import specc
from tests.families import COMMON, VOCAB, prompt

OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SLIDING: dict[str, Any] = {"sliding_window": 8}

# Model type -> what its configuration needs beyond the common one.
MORE: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "codegen": {**OLD, "rotary_dim": 4},
    "cohere": {},
    "cohere2": SLIDING,
    "deepseek_v2": {**LATENT, **ROUTED},
    "ernie4_5": {},
    "exaone4": {**SLIDING, "sliding_window_pattern": 2},
    "gemma": {},
    "gemma2": SLIDING,
    "glm4_moe": ROUTED,
    "gpt2": OLD,
    "gpt_bigcode": OLD,
    "gpt_neox": {},
    "gptj": {**OLD, "rotary_dim": 4},
    "granite": {},
    "llama4_text": {"num_local_experts": 2, "attention_chunk_size": 8, "intermediate_size_mlp": 64},
    "ministral": SLIDING,
    "mistral": SLIDING,
    "nemotron": {},
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": SLIDING,
}


def random_model(model_type: str) -> Any:
    config = AutoConfig.for_model(model_type, **{**COMMON, "head_dim": 16, **MORE[model_type]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3 if "embed" in name or "head" in name else 0.15)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    assert config.vocab_size == VOCAB
    return model


@pytest.mark.parametrize("model_type", MORE)
def test_tokens_equal_plain_decoding(model_type: str) -> None:
    """49 tokens: the first from the prompt, then 12 blocks of 4, every draft of which is right."""
    model = random_model(model_type)
    settings = {"max_new_tokens": 49, "do_sample": False}
    output = specc.generate(
        model,
        **prompt(3),
        draft=model,
        num_draft_tokens=4,
        compile=False,
        return_dict_in_generate=True,
        **settings,
    )
    assert torch.equal(output.sequences, model.generate(**prompt(3), **settings))
    assert output.speculation.acceptance == [1.0, 1.0, 1.0]


# What becomes of their attention in captured graphs: sinks, soft caps and windows among them.
ATTENTION = {
    "codegen": "its scores come from attn_weights",
    "cohere2": "unified attention by the same page table",
    "deepseek_v2": "latent attention (MLA)",
    "exaone4": "unified attention by the same page table",
    "gemma2": "unified attention by the same page table",
    "gpt2": "unified attention by the same page table",
    "gpt_neox": "unified attention by the same page table",
    "llama4_text": "not a causal chain's",
    "phi3": "unified attention by the same page table",
}


@pytest.mark.parametrize("model_type", ATTENTION)
def test_captured_tokens_equal_plain_decoding(model_type: str, tmp_path: Path, fresh_compiler: None) -> None:
    model = random_model(model_type)
    settings = {"max_new_tokens": 25, "do_sample": False}
    options = {"inductor": False, "dump": str(tmp_path)}
    tokens = specc.generate(model, **prompt(3), draft=model, num_draft_tokens=4, options=options, **settings)
    assert torch.equal(tokens, model.generate(**prompt(3), **settings))
    for remarks in tmp_path.glob("*/remarks.txt"):
        assert ATTENTION[model_type] in remarks.read_text()
