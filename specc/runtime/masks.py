"""Attention masks for rows that each have a length of their own.

Hugging Face models take ready-made 4-D masks: one tensor, or one per layer type where the
configuration has ``layer_types`` (``transformers.masking_utils.create_masks_for_generate`` is the
contract). Here they are index arithmetic on the positions of the block's tokens, so they trace into
the graph and no length ever reaches the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from specc import compat, leaves
from specc.errors import UnsupportedError

Visible = Callable[[Tensor, Tensor, int], Tensor]


def _causal(query: Tensor, key: Tensor, size: int) -> Tensor:
    return key <= query


def _sliding(query: Tensor, key: Tensor, size: int) -> Tensor:
    return (key <= query) & (key > query - size)


def _chunked(query: Tensor, key: Tensor, size: int) -> Tensor:
    return (key <= query) & (key // size == query // size)


# Layer type -> (which keys a query sees, the configuration's field that holds the window or chunk).
PATTERNS: dict[str, tuple[Visible, str | None]] = {
    "full_attention": (_causal, None),
    "sliding_attention": (_sliding, "sliding_window"),
    "chunked_attention": (_chunked, "attention_chunk_size"),
}

# Layer types with parts that have no attention -> the masks these layers look up, by name.
MIXED: dict[str, tuple[str, ...]] = {
    "linear_attention": ("linear_attention",),
    "conv": ("conv",),
    "hybrid": ("full_attention", "linear_attention"),
    "moe": (),
    "mlp": (),
}

# Attention implementation -> whether it adds the mask to the scores (else it is boolean).
IMPLEMENTATIONS: dict[str, bool] = {"sdpa": False, "eager": True}

# Models outside transformers' attention interface may build masks or biases of their own from one
# length for all rows (GPT-Neo, BLOOM). These do not: their tokens were compared.
CHECKED_BY_HAND = frozenset({"codegen", "gptj", *leaves.FAMILIES})


@dataclasses.dataclass(frozen=True)
class MaskPlan:
    """How a model wants its masks. ``sizes``: layer type -> window or chunk (0 where it has none).

    unmasked: names under which recurrent layers look for a mask of padding. They get none: padding is
    kept out of their inputs.
    """

    sizes: tuple[tuple[str, int], ...]
    by_layer_type: bool
    additive: bool
    unmasked: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> MaskPlan:
        """Read the plan off a model's configuration.

        Raises UnsupportedError for layer types and attention implementations without a rule here, and
        for models that do not use the masks they are given.
        """
        config = model.config.get_text_config()
        layer_types = getattr(config, "layer_types", None)
        names = sorted(_names(layer_types)) if layer_types else [_only_pattern(config)]
        unmasked = tuple(name for name in names if name in MIXED)
        if layer_types and set(names) == set(unmasked):
            return cls((), True, False)
        if not compat.takes_masks(model) and not CHECKED_BY_HAND & leaves.modeling_families(model):
            raise UnsupportedError(
                f"{type(model).__name__} does not take its attention masks from outside as they are, and "
                f"specc's would be ignored: use the model's own generate"
            )
        implementation = compat.attention_implementation(config)
        if implementation not in IMPLEMENTATIONS:
            raise UnsupportedError(
                f"attn_implementation={implementation!r} is not supported yet: load the model with "
                f"attn_implementation='sdpa' (or 'eager')"
            )
        unknown = [name for name in names if name not in PATTERNS and name not in MIXED]
        if unknown:
            raise UnsupportedError(
                f"{type(model).__name__} has layers of type {', '.join(unknown)}, which specc cannot "
                f"speculate on yet: use the model's own generate"
            )
        sizes = tuple((name, _size(config, name)) for name in names if name not in MIXED)
        return cls(sizes, bool(layer_types), IMPLEMENTATIONS[implementation], unmasked)

    def windows(self, config: Any, num_layers: int) -> list[int]:
        """How many keys each layer sees at most, 0 for all. config: the model's text configuration."""
        sizes = {name: size if name == "sliding_attention" else 0 for name, size in self.sizes}
        layer_types = getattr(config, "layer_types", None) or [self.sizes[0][0]] * num_layers
        return [sizes.get(name, 0) for name in layer_types[:num_layers]]

    def build(self, positions: Tensor, capacity: int, dtype: torch.dtype) -> Any:
        """Masks for a block. positions: int64 [B, q]; returns [B, 1, q, capacity], or a dict of them.

        A model without attention gets None. ``dtype`` is the model's, used where the mask is added to the
        scores.
        """
        query = positions[:, None, :, None]
        key = torch.arange(capacity, device=positions.device)
        if not self.sizes:
            return None
        masks: dict[str, Tensor | None] = dict.fromkeys(self.unmasked)
        for name, size in self.sizes:
            visible = PATTERNS[name][0](query, key, size)
            masks[name] = _as_bias(visible, dtype) if self.additive else visible
        return masks if self.by_layer_type else masks[self.sizes[0][0]]


def _names(layer_types: Iterable[str]) -> set[str]:
    return {name for each in layer_types for name in MIXED.get(each, (each,))}


def _only_pattern(config: Any) -> str:
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def _size(config: Any, pattern: str) -> int:
    field = PATTERNS[pattern][1]
    return int(getattr(config, field)) if field else 0


def _as_bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)
