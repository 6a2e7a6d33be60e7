"""A model with a pool of its own: what the step calls to verify or to draft."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specc.options import Options
from specc.runtime.cache import PagedCache
from specc.runtime.compiled import CompiledForward, GraphKey, compiled_forward
from specc.runtime.forward import block_logits, next_draft, prompt_logits
from specc.runtime.masks import MaskPlan


@dataclasses.dataclass(frozen=True)
class Role:
    """What a model does in the step, and the function that is captured for it."""

    name: str
    function: Callable[..., Tensor]


VERIFY = Role("verify", block_logits)
DRAFT = Role("draft", next_draft)


class BoundModel:
    """A stock model, its rows in a paged cache, and its compiled forward for blocks of ``q_len``.

    ``compiled=False`` runs the model's own eager forward in the same step.
    """

    def __init__(
        self,
        model: Any,
        role: Role,
        *,
        rows: int,
        q_len: int,
        capacity: int,
        last_position: int,
        options: Options,
        compiled: bool,
    ) -> None:
        device = model.device
        layers = model.config.get_text_config().num_hidden_layers
        self.model = model
        self.cache = PagedCache(layers, rows, capacity, device)
        self._masks = MaskPlan.of(model)
        self._last_position = torch.tensor(last_position, device=device)
        self._blank = torch.zeros(rows, q_len, dtype=torch.int64, device=device)
        self._forward: Callable[..., Tensor] = role.function
        if compiled:
            key = GraphKey(role.name, q_len, rows)
            self._forward = compiled_forward(model, key, role.function, options)

    def prefill(self, prompts: Tensor, prompt_lens: Tensor) -> Tensor:
        """Read right-padded prompts [B, q] into the empty pool; logits after each prompt, [B, V]."""
        logits = prompt_logits(self.model, prompts, prompt_lens, self.cache, self._masks)
        self.cache.seq_lens.copy_(prompt_lens)
        return logits

    def warm_up(self) -> float:
        """Compile the forward if it is not; seconds. Needs a prefilled pool, whose scratch it uses."""
        if not isinstance(self._forward, CompiledForward):
            return 0.0
        return self._forward.warm_up(*self._arguments(self._blank))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run the role's function on a block behind each row's length. tokens: int64 [B, q_len]."""
        return self._forward(*self._arguments(tokens))

    def _arguments(self, tokens: Tensor) -> tuple[Any, ...]:
        return self.model, tokens, self.cache, self._masks, self._last_position
