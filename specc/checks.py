"""What specc.generate looks at before any work starts, and the sentences it refuses with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specc import leaves
from specc.errors import InputError, UnsupportedError
from specc.runtime.masks import MaskPlan

MAX_DRAFT_TOKENS = 64
DRAFTS = "draft='ngram' (prompt lookup) or draft=<a causal LM of the same vocabulary>"

# kv_dtype -> the dtype of the pool; None takes the model's.
KV_DTYPES: dict[str | None, torch.dtype | None] = {None: None, "fp8": torch.float8_e4m3fn}

# state_dtype -> the dtype of recurrent states.
STATE_DTYPES: dict[str | None, torch.dtype] = {None: torch.float32, "bf16": torch.bfloat16}

Wrong = Callable[[Any], bool]


def is_given(value: Any) -> bool:
    return value is not None and value is not False


def _above_one(value: Any) -> bool:
    return value is not None and value > 1


# Generation settings that change what is computed, and what to do instead.
REFUSED_SETTINGS: dict[str, tuple[Wrong, str]] = {
    "do_sample": (is_given, "sampling is not supported yet: pass do_sample=False"),
    "num_beams": (_above_one, "beam search is not supported: pass num_beams=1"),
    "num_return_sequences": (
        _above_one,
        "greedy decoding has one answer per prompt: pass num_return_sequences=1",
    ),
    "output_scores": (is_given, "scores are not kept yet: pass output_scores=False"),
    "output_logits": (is_given, "logits are not kept yet: pass output_logits=False"),
    "output_attentions": (is_given, "attentions are not kept: pass output_attentions=False"),
    "output_hidden_states": (is_given, "hidden states are not kept: pass output_hidden_states=False"),
    "use_cache": (lambda value: value is False, "specc works over a cache: pass use_cache=True"),
    "prompt_lookup_num_tokens": (
        is_given,
        "specc has prompt lookup of its own: pass draft='ngram' and num_draft_tokens",
    ),
    "assistant_early_exit": (is_given, "early exit is not supported: pass draft='ngram'"),
    "use_mtp": (is_given, "MTP heads are not supported yet: pass draft='ngram'"),
    "penalty_alpha": (is_given, "contrastive search is not supported: leave penalty_alpha out"),
    "dola_layers": (is_given, "DoLa decoding is not supported: leave dola_layers out"),
    "prefill_chunk_size": (
        lambda value: value is not None and value < 1,
        "a prompt is read at least one token at a time: pass a positive number",
    ),
    "cache_implementation": (
        lambda value: value not in (None, "dynamic", "static", "hybrid"),
        "specc keeps a cache of its own: leave cache_implementation out",
    ),
    "token_healing": (is_given, "token healing is not supported: leave token_healing out"),
}

# Arguments of generate that specc would have to ignore, and what to do instead.
REFUSED_ARGUMENTS: dict[str, str] = {
    "assistant_model": "pass the assistant as draft=",
    "assistant_tokenizer": "specc's assistants share the model's vocabulary: leave it out",
    "synced_gpus": "models spread over several processes are not supported yet: leave it out",
    "prefix_allowed_tokens_fn": "it is a logits processor, which specc does not run yet: leave it out",
    "negative_prompt_ids": "classifier-free guidance is not supported: leave it out",
    "negative_prompt_attention_mask": "classifier-free guidance is not supported: leave it out",
    "custom_generate": "specc.generate is the custom_generate: leave it out",
    "inputs_embeds": "specc needs token ids: pass input_ids",
    "past_key_values": "specc keeps a cache of its own: pass the whole text as input_ids",
    "cache_params": "specc keeps a cache of its own: pass the whole text as input_ids",
    "position_ids": "positions follow from attention_mask: leave position_ids out",
}

# What GenerationMixin.generate adds to the model's arguments by itself.
PREPARED_ARGUMENTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "logits_to_keep",
        "past_key_values",
        "cache_params",
        "use_cache",
        "cache_position",
    }
)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse generation settings specc does not follow. settings: name -> effective value."""
    for name, (wrong, sentence) in REFUSED_SETTINGS.items():
        if wrong(settings.get(name)):
            raise UnsupportedError(f"{name}={settings[name]!r}: {sentence}")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of generate that specc would have to ignore."""
    for name, sentence in REFUSED_ARGUMENTS.items():
        if is_given(arguments.get(name)):
            raise UnsupportedError(f"{name} is not supported: {sentence}")


def check_model(model: Any, what: str = "the model") -> None:
    """A causal LM in evaluation mode, on one device, with layers that specc can roll back."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "can_generate"):
        raise InputError(f"{what} must be a Hugging Face causal LM, got {type(model).__name__}")
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise UnsupportedError(f"{what} ({type(model).__name__}) is no causal LM: specc needs one")
    if model.training:
        raise InputError(f"{what} is in training mode: call model.eval() first")
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1:
        raise InputError(f"{what} is spread over {', '.join(devices)}: move all of it to one device")
    if devices == ["meta"]:
        raise InputError(f"{what} has no weights (device 'meta'): load them first")
    _check_recurrence(model, what)
    takes = set(inspect.signature(model.forward).parameters)
    # A purely recurrent model counts no positions, and calls its cache by another name.
    missing = set() if "cache_params" in takes else {"position_ids", "past_key_values"} - takes
    if missing:
        raise UnsupportedError(
            f"{what} ({type(model).__name__}) takes no {' and no '.join(sorted(missing))}, which specc "
            f"needs: use the model's own generate"
        )
    MaskPlan.of(model)


def _check_recurrence(model: Any, what: str) -> None:
    """Recurrent layers, if any, are of a family whose state specc can roll back."""
    reason = leaves.why_unverifiable(model)
    if reason is not None:
        raise UnsupportedError(f"{what} ({type(model).__name__}) {reason}. Use the model's own generate")


def check_draft(draft: Any, model: Any) -> None:
    """``draft`` is there, known, and fits the model."""
    if draft is None:
        raise InputError(f"draft is missing: pass {DRAFTS}")
    if draft == "ngram":
        return
    if not isinstance(draft, torch.nn.Module):
        raise InputError(f"unknown draft {draft!r}: pass {DRAFTS}")
    device = getattr(draft, "device", model.device)
    if device != model.device:
        raise InputError(
            f"the draft model is on {device} and the model on {model.device}: "
            f"move the draft model to {model.device}"
        )
    check_model(draft, "the draft model")
    ours, theirs = _vocabulary(model), _vocabulary(draft)
    if ours != theirs:
        raise InputError(
            f"the draft model has a vocabulary of {theirs} tokens and the model one of {ours}: "
            f"choose a draft model with the same tokenizer, or draft='ngram'"
        )


def check_num_draft_tokens(value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DRAFT_TOKENS:
        raise InputError(
            f"num_draft_tokens must be an integer from 1 to {MAX_DRAFT_TOKENS} "
            f"(drafts per step + the bonus token), got {value!r}"
        )


def check_state_dtype(value: Any) -> None:
    if not isinstance(value, str | None) or value not in STATE_DTYPES:
        raise InputError(f"state_dtype must be 'bf16' or None (float32), got {value!r}")


def check_kv_dtype(value: Any) -> None:
    if not isinstance(value, str | None) or value not in KV_DTYPES:
        raise InputError(f"kv_dtype must be 'fp8' or None (the model's own dtype), got {value!r}")


def check_compile(value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"compile must be True or False, got {value!r}")


def check_device_graph(value: Any) -> None:
    if value not in ("on", "try", "off"):
        raise InputError(f"device_graph must be 'on', 'try' or 'off', got {value!r}")


def check_steps_ahead(value: Any) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise InputError(
            f"steps_ahead must be a positive integer or None (as many as pay on the device), got {value!r}"
        )


# specc's own arguments, but for the draft and the options -> their checks.
SETTINGS: dict[str, Callable[[Any], None]] = {
    "num_draft_tokens": check_num_draft_tokens,
    "kv_dtype": check_kv_dtype,
    "state_dtype": check_state_dtype,
    "compile": check_compile,
    "device_graph": check_device_graph,
    "steps_ahead": check_steps_ahead,
}


def check_prompt(prompts: Any, attention_mask: Any, model: Any) -> None:
    """Token ids, int64 [B, P] with B, P >= 1, left-padded where the mask is 0."""
    if not isinstance(prompts, Tensor):
        raise InputError(f"the prompt must be a tensor of token ids, got {type(prompts).__name__}")
    if prompts.dim() != 2:
        raise InputError(f"the prompt must be 2-D, [batch, tokens], got shape {list(prompts.shape)}")
    if prompts.dtype != torch.int64:
        raise InputError(f"token ids must be torch.int64, got {prompts.dtype}: use input_ids.long()")
    if prompts.numel() == 0:
        raise InputError("the prompt is empty: give each row at least one token")
    if prompts.device != model.device:
        raise InputError(
            f"the prompt is on {prompts.device} and the model on {model.device}: "
            f"use input_ids.to(model.device)"
        )
    vocab = _vocabulary(model)
    if bool(((prompts < 0) | (prompts >= vocab)).any()):
        raise InputError(f"the prompt has token ids outside the model's vocabulary (0 to {vocab - 1})")
    if attention_mask is not None:
        _check_mask(prompts, attention_mask)


def _check_mask(prompts: Tensor, attention_mask: Any) -> None:
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != prompts.shape:
        raise InputError(f"attention_mask must have the prompt's shape {list(prompts.shape)}")
    if attention_mask.device != prompts.device:
        raise InputError(f"attention_mask is on {attention_mask.device} and the prompt on {prompts.device}")
    kept = attention_mask != 0
    if not bool(kept.any(dim=1).all()):
        raise InputError("a prompt is empty: its attention_mask has no 1; give each row a token")
    if bool((kept[:, :-1] & ~kept[:, 1:]).any()):
        raise InputError(
            "prompts must be padded on the left: attention_mask has a 0 behind a 1 "
            "(tokenizer.padding_side = 'left'; if the prompt means its pad tokens, pass an attention_mask "
            "of ones)"
        )


def check_lengths(model: Any, draft: Any, prompt_length: int, max_length: int) -> None:
    """The prompt fits the model's context; what is to be generated fits the draft model's."""
    context = _context(model)
    if context is not None and prompt_length > context:
        raise InputError(
            f"the prompt has {prompt_length} tokens and the model's context is {context}: shorten it"
        )
    if isinstance(draft, str):
        return
    context = _context(draft)
    if context is not None and max_length > context:
        raise InputError(
            f"prompt and new tokens come to {max_length} and the draft model's context is {context}: "
            f"lower max_new_tokens, or use draft='ngram'"
        )


def _vocabulary(model: Any) -> int:
    return model.config.get_text_config().vocab_size


def _context(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
