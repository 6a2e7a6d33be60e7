"""Tiny random models of each family, with weights large enough that a wrong cache changes tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 128
# Small enough that prompts and new tokens cross it several times.
WINDOW = 8

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**COMMON))


def _qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16))


def _gemma3() -> Any:
    sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    # Tied, a tiny random Gemma repeats its last token for ever, and nothing would depend on the cache.
    return Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, **sliding, head_dim=16, tie_word_embeddings=False))


def _gpt_oss() -> Any:
    sliding = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    # The default YaRN scaling belongs to the default context.
    common = {**COMMON, "max_position_embeddings": 131072}
    return GptOssForCausalLM(GptOssConfig(**common, **sliding, **experts, head_dim=16))


def _deepseek_v3() -> Any:
    latent = {
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    experts = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    }
    common = {**COMMON, "num_key_value_heads": 4}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**common, **latent, **experts))


def _mixtral() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**COMMON, **experts))


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gpt_oss": _gpt_oss,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
}


@functools.cache
def tiny(family: str, seed: int = 0) -> Any:
    """A model of ``family`` that says varied things; the same object for the same arguments."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                # Default weights leave every hidden state near its embedding: the cache would not matter.
                parameter.normal_(0, 0.3 if "embed" in name or "lm_head" in name else 0.15)
            elif "sinks" in name:
                parameter.normal_(0, 1.0)
    model.generation_config.eos_token_id = None
    return model


def noisy_copy(family: str, noise: float = 0.05) -> Any:
    """A draft model that agrees with ``tiny(family)`` often, but not always."""
    return _noisy_copy(family, noise)


@functools.cache
def _noisy_copy(family: str, noise: float) -> Any:
    model = tiny(family)
    draft = FAMILIES[family]().eval()
    draft.load_state_dict(model.state_dict())
    draft.generation_config = model.generation_config
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() >= 2:
                spread = noise * parameter.std()
                parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return draft


def prompt(rows: int, width: int = 12) -> dict[str, torch.Tensor]:
    """Ragged, left-padded prompts with repetitions in them: row b has 3 b fewer tokens than ``width``."""
    generator = torch.Generator().manual_seed(7)
    period = torch.randint(3, VOCAB, (rows, 5), generator=generator)
    ids = period.repeat(1, width // 5 + 1)[:, :width]
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 3 * row] = 0
        ids[row, : 3 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}
