"""The fewest bytes that a step has to move, whatever method runs it, and what it has to multiply."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.harness import weight_bytes

STATE_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Reads:
    """Bytes that a forward reads: weights once, keys and values per token of a row, a state per row.

    States are read as float32 and not counted as written: how often they are is the method's choice.
    ``multiplications`` by weights: per token.
    """

    weights: int
    per_token: int
    state: int
    per_logits: int
    multiplications: int

    @classmethod
    def of(cls, model: Any) -> Reads:
        config, item = model.config.get_text_config(), model.dtype.itemsize
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            weights=weight_bytes(model),
            per_token=kinds.count("full_attention") * 2 * config.num_key_value_heads * head_dim * item,
            state=sum(_state_bytes(config, item) for kind in kinds if kind == "linear_attention"),
            per_logits=config.vocab_size * item,
            multiplications=weight_bytes(model) // item,
        )


@dataclasses.dataclass(frozen=True)
class Floor:
    """Bytes of one step by what they are."""

    weights: int
    draft_weights: int
    keys_and_values: int
    states: int
    logits: int

    @classmethod
    def of(cls, target: Reads, draft: Reads, *, batch: int, context: int, drafts: int, passes: int) -> Floor:
        """``drafts``: tokens drafted; ``passes``: forwards of the draft model."""
        return cls(
            weights=target.weights,
            draft_weights=passes * draft.weights,
            keys_and_values=batch * context * (target.per_token + passes * draft.per_token),
            states=batch * (target.state + passes * draft.state),
            logits=batch * (drafts + 1) * target.per_logits,
        )

    @property
    def bytes(self) -> int:
        return sum(dataclasses.astuple(self))

    def as_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "bytes": self.bytes}


@dataclasses.dataclass(frozen=True)
class Multiplications:
    """Those by weights that a step cannot do without."""

    target: int
    draft: int

    @classmethod
    def of(cls, target: Reads, draft: Reads, *, batch: int, drafts: int, passes: int) -> Multiplications:
        return cls(target.multiplications * batch * (drafts + 1), draft.multiplications * batch * passes)


def bound_seconds(floor: Floor, work: Multiplications, bandwidth: float, rate: float) -> float:
    """A step's bytes at ``bandwidth``, but products by weights no faster than ``rate`` (operations a second).

    For many rows that is more than the bytes alone.
    """
    products = ((floor.weights, work.target), (floor.draft_weights, work.draft))
    others = floor.bytes - floor.weights - floor.draft_weights
    return others / bandwidth + sum(max(moved / bandwidth, 2 * count / rate) for moved, count in products)


def _state_bytes(config: Any, item: int) -> int:
    """Of a Gated DeltaNet layer: its matrix per value head, and the inputs its convolution looks back on."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    window = (2 * keys + values) * (config.linear_conv_kernel_dim - 1)
    return values * config.linear_key_head_dim * STATE_BYTES + window * item
