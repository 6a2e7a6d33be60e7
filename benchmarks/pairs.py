"""Targets and drafts of real shapes with random weights, and agreement that can be set.

The draft is the target's first layers, with its embeddings, final norm and head: the same tensors, no
copy. What the target's other layers add to the hidden state (the weights of their attention's and their
MLP's last projection) is scaled by ``eps``: at 0 the two models are one function, and the larger it is,
the more often their choices differ. So drafts are accepted or not by real verification, at the real cost
of both models.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
import transformers
from torch import Tensor, nn

LAST_PROJECTIONS = ("o_proj", "out_proj", "down_proj")
AGREEMENT_TOKENS = 256
HALVINGS = 12


@dataclasses.dataclass(frozen=True)
class Shape:
    """A configuration class of transformers and what differs from its defaults."""

    config_class: str
    settings: dict[str, Any]
    draft_layers: int

    def config(self) -> Any:
        # Random weights shall not end a text.
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
        return getattr(transformers, self.config_class)(**self.settings, **ids)


_LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
# gpt-fast's rotary embedding has no scaling for long texts; scaling has no bearing on speed.
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
# Weights so large that a tiny model's tokens depend on its layers.
_TINY = {"vocab_size": 128, "initializer_range": 0.3, "max_position_embeddings": 4096}

SHAPES = {
    "llama-8b": Shape(
        "LlamaConfig",
        {
            **(_LLAMA | _ROPE),
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        draft_layers=2,
    ),
    "llama-1b": Shape(
        "LlamaConfig",
        {
            **(_LLAMA | _ROPE),
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        draft_layers=1,
    ),
    # The defaults of the class are this shape: 24 Gated DeltaNet layers and 8 with full attention.
    "qwen3.5-9b": Shape("Qwen3_5TextConfig", {"max_position_embeddings": 131072}, draft_layers=4),
    "tiny-llama": Shape(
        "LlamaConfig",
        {
            **_TINY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        draft_layers=2,
    ),
    "tiny-hybrid": Shape(
        "Qwen3_5TextConfig",
        {
            **_TINY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        draft_layers=4,
    ),
}


class Pair:
    """A target and its draft. Weights are made on ``device``, from ``seed``: the same there every time."""

    def __init__(
        self, name: str, device: str, dtype: torch.dtype, seed: int = 0, draft_layers: int | None = None
    ) -> None:
        self.name, self.seed = name, seed
        shape = SHAPES[name]
        torch.manual_seed(seed)
        with torch.device(device):
            config = shape.config()
            self.target = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.draft_layers = draft_layers or shape.draft_layers
        self.draft = first_layers(self.target, self.draft_layers)
        self.eps = 1.0

    @property
    def device(self) -> torch.device:
        return self.target.device

    @torch.no_grad()
    def set_eps(self, eps: float) -> None:
        """Scale what the target's later layers add, in place. The unscaled weights come from the seed."""
        generator = torch.Generator(self.device)
        for number, each in enumerate(self._later_projections()):
            generator.manual_seed(self.seed * 1_000_003 + number)
            each.weight.normal_(0.0, self.target.config.initializer_range, generator=generator).mul_(eps)
        self.eps = eps

    @torch.no_grad()
    def agreement(self, eps: float) -> float:
        """Share of the positions of a random text where both models choose the same token."""
        self.set_eps(eps)
        text = random_text(self.target, 1, AGREEMENT_TOKENS, seed=self.seed + 1)
        choices = [each(text, use_cache=False).logits.argmax(-1) for each in (self.target, self.draft)]
        return (choices[0] == choices[1]).float().mean().item()

    def set_agreement(self, agreement: float) -> float:
        """Find the eps of this agreement on a random text, by halving, and set it. Returns it."""
        low, high = math.log(1e-4), math.log(4.0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.agreement(math.exp(middle)) > agreement else (low, middle)
        eps = math.exp((low + high) / 2)
        self.set_eps(eps)
        return eps

    def _later_projections(self) -> list[nn.Linear]:
        layers = self.target.model.layers[self.draft_layers :]
        return [each for name, each in layers.named_modules() if name.endswith(LAST_PROJECTIONS)]


def first_layers(target: Any, count: int) -> Any:
    """A model of the target's first layers, with its embeddings, norm and head: no tensor of its own."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]
    with torch.device("meta"):
        draft = transformers.AutoModelForCausalLM.from_config(config, dtype=target.dtype)
    body = draft.model
    body.layers = nn.ModuleList(list(target.model.layers)[:count])
    body.embed_tokens, body.norm = target.model.embed_tokens, target.model.norm
    body.rotary_emb = target.model.rotary_emb
    draft.lm_head = target.lm_head
    return draft.eval()


def random_text(model: Any, rows: int, length: int, seed: int) -> Tensor:
    """Random token ids, int64 [rows, length], on the model's device; no two rows are the same text."""
    generator = torch.Generator().manual_seed(seed)
    high = model.config.get_text_config().vocab_size
    return torch.randint(1, high, (rows, length), generator=generator).to(model.device)
