"""A stock model's forward over a paged cache: the functions that are captured as graphs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specc.lowerings import greedy_select
from specc.runtime.cache import PagedCache
from specc.runtime.masks import MaskPlan


def block_logits(
    model: Any, tokens: Tensor, cache: PagedCache, masks: MaskPlan, last_position: Tensor
) -> Tensor:
    """Feed a block behind each row's length. tokens: int64 [B, q]; returns logits [B, q, V].

    ``last_position`` (int64, one element) is the last position a committed token can have. Tokens of
    the block beyond it can never be accepted; their positions are clamped to it, because a learned
    position table ends there.
    """
    return _forward(model, tokens, cache, masks, last_position)


def next_draft(
    model: Any, tokens: Tensor, cache: PagedCache, masks: MaskPlan, last_position: Tensor
) -> Tensor:
    """Feed a block and choose the token after it, int64 [B]."""
    return greedy_select(_forward(model, tokens, cache, masks, last_position)[:, -1])


def prompt_logits(
    model: Any, tokens: Tensor, prompt_lens: Tensor, cache: PagedCache, masks: MaskPlan
) -> Tensor:
    """Feed whole prompts, right-padded to one length, into empty rows; logits after each, [B, V].

    tokens: int64 [B, q]; prompt_lens: int64 [B]. What the padding writes lies behind the row's length.
    Where rows differ in length, their last tokens are fed once more, together: the logits of all rows
    at all last positions would be B times as many as are needed.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    logits = _forward(model, tokens, cache, masks, None, **({"logits_to_keep": 1} if keeps else {}))
    if bool((prompt_lens == tokens.shape[1]).all()):
        return logits[:, -1]
    last = prompt_lens[:, None] - 1
    cache.seq_lens.copy_(last[:, 0])
    return _forward(model, tokens.gather(1, last), cache, masks, None)[:, -1]


def _forward(
    model: Any,
    tokens: Tensor,
    cache: PagedCache,
    masks: MaskPlan,
    last_position: Tensor | None,
    **extra: Any,
) -> Tensor:
    positions = cache.positions(tokens.shape[1])
    attention_mask = masks.build(positions, cache.slots_per_row, model.dtype)
    if last_position is not None:
        positions = torch.minimum(positions, last_position)
    return model(
        input_ids=tokens,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        **extra,
    ).logits
