"""Tiny random models with recurrent layers, with weights large enough that a wrong state changes logits."""

from __future__ import annotations

import functools
import importlib
import math
from typing import Any

import torch
from torch import Tensor

VOCAB = 96

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
ATTENTION: dict[str, Any] = {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Two recurrent layers: what is done once for all layers is seen. Keys and values lie between them.
LAYERS = ["linear_attention", "full_attention", "linear_attention"]
# Value heads outnumber key heads.
GATED_DELTA: dict[str, Any] = {
    **ATTENTION,
    "num_hidden_layers": 3,
    "layer_types": LAYERS,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}

# Family -> (model class, configuration class, what differs from COMMON).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", GATED_DELTA),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", GATED_DELTA | EXPERTS),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", GATED_DELTA | EXPERTS),
    "olmo_hybrid": ("OlmoHybridForCausalLM", "OlmoHybridConfig", GATED_DELTA),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "falcon_h1": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        ATTENTION | MAMBA | {"num_hidden_layers": 2, "mamba_d_ssm": 64},
    ),
    "bamba": (
        "BambaForCausalLM",
        "BambaConfig",
        ATTENTION | MAMBA | {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    ),
    "nemotron_h": (
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **ATTENTION,
            "layers_block_type": ["mamba", "attention", "mamba"],
            "head_dim": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        "Lfm2Config",
        ATTENTION | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    ),
}

# The same leaves again, with experts and shared attention around them.
RELATIVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "granitemoehybrid": (
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **ATTENTION,
            **MAMBA,
            "num_hidden_layers": 3,
            "layer_types": LAYERS,
            "shared_intermediate_size": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **ATTENTION,
            "num_key_value_heads": 4,
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_d_state": 16,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "adapter_rank": 4,
            "num_mem_blocks": 1,
        },
    ),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM",
        "Lfm2MoeConfig",
        {
            **ATTENTION,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "num_dense_layers": 1,
        },
    ),
}


def build(family: str, seed: int = 0, **changes: Any) -> Any:
    """A new tiny model of ``family``, boosted; ``changes`` go into its configuration."""
    model_class, config_class, own = (FAMILIES | RELATIVES)[family]
    module = importlib.import_module("transformers")
    torch.manual_seed(seed)
    config = getattr(module, config_class)(**(COMMON | own | changes))
    model = getattr(module, model_class)(config).eval()
    boost(model)
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def tiny(family: str) -> Any:
    """``build(family)``, the same object each time."""
    return build(family)


@torch.no_grad()
def boost(model: torch.nn.Module) -> None:
    """Have states decay slowly and weigh in: by default zeroing them hardly moves the logits."""
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "A_log":
            parameter.fill_(math.log(0.05))
        elif leaf == "dt_bias":
            parameter.fill_(0.5)
        elif parameter.dim() >= 2:
            parameter.mul_(8.0 if ".conv" in name and leaf == "weight" else 4.0)


def cache_name(model: Any) -> str:
    """How the model's forward calls its cache."""
    return "cache_params" if model.config.model_type == "mamba2" else "past_key_values"


def static_cache(model: Any, length: int = 64) -> Any:
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=length)


def feed(model: Any, cache: Any, ids: Tensor, start: int, call: Any = None) -> Tensor:
    """Logits [B, q, V] of ``ids`` [B, q] at positions ``start ...``; ``call`` stands in for the model's."""
    positions = torch.arange(start, start + ids.shape[1]).expand(ids.shape[0], -1)
    given = {"position_ids": positions} if model.config.model_type != "mamba2" else {}
    call = model if call is None else call
    with torch.no_grad():
        return call(input_ids=ids, use_cache=True, **{cache_name(model): cache}, **given).logits


def states(cache: Any) -> list[Tensor]:
    """The convolution windows and the recurrent states of a cache."""
    kept = (
        getattr(layer, name, {}) for layer in cache.layers for name in ("conv_states", "recurrent_states")
    )
    return [state for each in kept for state in each.values() if state is not None]


def prompt(rows: int = 2, length: int = 9, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)
