"""The pool of keys and values, as a Hugging Face ``Cache`` whose rows have lengths of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specc import compat
from specc.errors import UnsupportedError
from specc.lowerings import kv_write


class PagedLayer(CacheLayerMixin):
    """One layer's pages, [B + 1, capacity, Hkv, D]: page 0 belongs to no row, row b owns page b + 1.

    Writing never moves what is there: a block's tokens go to the slots behind the row's committed
    length, and what a later step does not commit is simply written over.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, seq_lens: Tensor, capacity: int) -> None:
        super().__init__()
        self.seq_lens = seq_lens
        self.capacity = capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = self._pages(key_states)
        self.values = self._pages(value_states)
        self.is_initialized = True

    def _pages(self, states: Tensor) -> Tensor:
        rows, heads, _, head_dim = states.shape
        pages = torch.zeros(
            rows + 1, self.capacity, heads, head_dim, dtype=states.dtype, device=states.device
        )
        # Prompts of another length must not recompile the step.
        compat.mark_dynamic(pages, 1)
        return pages

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write a block behind each row's length; return all keys and values, [B, Hkv, capacity, D].

        key_states, value_states: [B, Hkv, q, D].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        slots = self._slots(self.keys.shape[1], key_states.shape[2])
        kv_write(_by_token(key_states), _by_token(value_states), self.keys, self.values, slots, None, None)
        return self.keys[1:].transpose(1, 2), self.values[1:].transpose(1, 2)

    def _slots(self, capacity: int, q_len: int) -> Tensor:
        rows = torch.arange(1, self.seq_lens.shape[0] + 1, device=self.seq_lens.device)
        return (rows[:, None] * capacity + _positions(self.seq_lens, q_len)).reshape(-1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_max_length(self) -> int:
        return self.capacity

    def get_seq_length(self) -> int:
        raise UnsupportedError(
            "this model's forward asks its cache for one length, and specc's rows each have their own: "
            "use the model's own generate"
        )


def _positions(seq_lens: Tensor, q_len: int) -> Tensor:
    return seq_lens[:, None] + torch.arange(q_len, device=seq_lens.device)


def _by_token(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(0, 1)


class PagedCache(Cache):
    """Pools for all layers of a model, sharing the rows' committed lengths, ``seq_lens`` int64 [B]."""

    def __init__(self, num_layers: int, rows: int, capacity: int, device: torch.device) -> None:
        self.seq_lens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.capacity = capacity
        self._pools = [PagedLayer(self.seq_lens, capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self._pools))

    @property
    def slots_per_row(self) -> int:
        """``capacity``, read off the pool where there is one: a graph then keeps it symbolic."""
        keys = self._pools[0].keys
        return self.capacity if keys is None else keys.shape[1]

    def positions(self, q_len: int) -> Tensor:
        """Positions of the next ``q_len`` tokens of each row, int64 [B, q_len]."""
        return _positions(self.seq_lens, q_len)
