"""A stock model's forward over a paged cache: the functions that are captured as graphs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from specc.lowerings import greedy_select
from specc.runtime.cache import CacheShapes, PagedCache, ShapeRecorder
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
    model: Any, tokens: Tensor, cache: PagedCache, masks: MaskPlan, last_position: Tensor
) -> Tensor:
    """Feed a chunk of the prompts, int64 [B, q]; logits after its last tokens, [B, V].

    Prompts are padded on the left: a row's length is negative until its first token, and what stands at
    negative positions goes to the page that no row owns.
    """
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    extra = {"logits_to_keep": 1} if keeps else {}
    return _forward(model, tokens, cache, masks, last_position, **extra)[:, -1]


@torch.no_grad()
def layer_shapes(model: Any, masks: MaskPlan) -> CacheShapes:
    """What each layer of a model caches."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    recorder = ShapeRecorder(model.config.get_text_config().num_hidden_layers)
    model(
        input_ids=token,
        attention_mask=masks.build(token, 1, model.dtype),
        use_cache=True,
        **_cache_argument(model, recorder),
        **_positions_argument(model, token),
    )
    return recorder.shapes


def _forward(
    model: Any, tokens: Tensor, cache: PagedCache, masks: MaskPlan, last_position: Tensor, **extra: Any
) -> Tensor:
    positions = cache.rows.positions(tokens.shape[1])
    block = cache.block(positions)
    # Padding sees its row's first slot: a token that sees nothing would turn into NaN.
    positions = positions.clamp(min=0)
    attention_mask = masks.build(positions, cache.rows.capacity, model.dtype)
    logits = model(
        input_ids=tokens,
        attention_mask=attention_mask,
        use_cache=True,
        **_cache_argument(model, block),
        **_positions_argument(model, torch.minimum(positions, last_position)),
        **extra,
    ).logits
    cache.recurrent.advance()
    return logits


def _cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache, by the name that the model's forward has for it."""
    name = (
        "past_key_values"
        if "past_key_values" in inspect.signature(model.forward).parameters
        else "cache_params"
    )
    return {name: cache}


def _positions_argument(model: Any, positions: Tensor) -> dict[str, Tensor]:
    """Positions, unless the model knows none: a purely recurrent one counts nothing."""
    return (
        {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    )
