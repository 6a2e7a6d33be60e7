"""The pool of keys and values, as a Hugging Face ``Cache`` whose rows have lengths of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specc import compat
from specc.errors import PoolError, UnsupportedError
from specc.lowerings import kv_write, read_pages
from specc.lowerings.devices import free_bytes
from specc.runtime.pages import RESERVED, PageAllocator, Placement, Rows, pages_needed, place, place_rings
from specc.runtime.recurrent import (
    RecurrentPlan,
    RecurrentPools,
    RecurrentRecorder,
    RecurrentShape,
    RecurrentView,
    memory,
)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """What a layer caches of one token: [heads, k_dim] keys and [heads, v_dim] values."""

    heads: int
    k_dim: int
    v_dim: int
    dtype: torch.dtype

    def bytes_per_token(self, dtype: torch.dtype | None) -> int:
        return self.heads * (self.k_dim + self.v_dim) * (dtype or self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class CacheShapes:
    """What a model caches, by layer: keys and values, recurrent states, or both."""

    attention: dict[int, LayerShape]
    recurrent: dict[int, RecurrentShape]
    num_layers: int


@dataclasses.dataclass
class RowTable:
    """B rows of a batch: how long they are and where their tokens lie.

    seq_lens: int64 [B], committed tokens; negative while a prompt's padding is read. req_to_token:
    window -> int32 [B, capacity], the slot of each position in the pools of the layers with that window
    (0: those that keep everything). Slot 0, on the page that no row owns, stands for no slot.
    """

    seq_lens: Tensor
    req_to_token: dict[int, Tensor]

    @property
    def capacity(self) -> int:
        return self.req_to_token[0].shape[1]

    def positions(self, q_len: int) -> Tensor:
        """Positions of the next ``q_len`` tokens of each row, int64 [B, q_len]."""
        return self.seq_lens[:, None] + torch.arange(q_len, device=self.seq_lens.device)

    def slots(self, positions: Tensor) -> dict[int, Tensor]:
        """Where tokens at these positions go, by window, int64 [B * q]. Padding goes to slot 0."""
        at = positions.clamp(0, self.capacity - 1)
        return {
            window: torch.where(positions >= 0, table.gather(1, at), 0).flatten().long()
            for window, table in self.req_to_token.items()
        }


class PagedLayer(CacheLayerMixin):
    """One layer's pages: keys [num_pages, P, Hkv, Dk] and values [num_pages, P, Hkv, Dv].

    Writing never moves what is there: a block's tokens go to the slots behind the row's committed
    length, and what a later step does not commit is simply written over.
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, pages: int, page_size: int, shape: LayerShape, window: int, **where: Any) -> None:
        super().__init__()
        self.window = window
        self.pools = tuple(
            torch.zeros(pages, page_size, shape.heads, dim, **where) for dim in (shape.k_dim, shape.v_dim)
        )
        for pool in self.pools:
            # Prompts of another length must not recompile the step.
            compat.mark_dynamic(pool, 0)
        self.keys, self.values = self.pools
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The pool exists from the start."""

    def write(
        self, key_states: Tensor, value_states: Tensor, slots: Tensor, req_to_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write a block, [B, Hkv, q, D], to ``slots``; return all keys and values, [B, Hkv, capacity, D]."""
        k_pages, v_pages = self.pools
        kv_write(_by_token(key_states), _by_token(value_states), k_pages, v_pages, slots, None, None)
        keys = read_pages(k_pages, req_to_token, None, key_states.dtype)
        return keys, read_pages(v_pages, req_to_token, None, value_states.dtype)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UnsupportedError("this model's forward updates a cache layer without its cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise UnsupportedError(_NO_LENGTH)

    def get_max_length(self) -> int:
        raise UnsupportedError(_NO_LENGTH)

    def get_seq_length(self) -> int:
        raise UnsupportedError(_NO_LENGTH)


_NO_LENGTH = (
    "this model's forward asks its cache for one length, and specc's rows each have their own: "
    "use the model's own generate"
)


def _by_token(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(0, 1)


class WarmCache(Cache):
    """A cache whose recurrent layers go on from a state, by way of ``update_conv_state`` whatever is fed."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=layers)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return True


class Block(WarmCache):
    """What a model's forward sees of a PagedCache while it is fed one block."""

    def __init__(
        self,
        pools: dict[int, PagedLayer],
        views: dict[int, RecurrentView],
        num_layers: int,
        rows: RowTable,
        slots: dict[int, Tensor],
    ) -> None:
        # A layer with both is asked for its keys and values through the cache only.
        super().__init__([views.get(index) or pools.get(index) for index in range(num_layers)])
        self._pools = pools
        self._views = views
        self._rows = rows
        self._slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self._pools[layer_idx]
        table = self._rows.req_to_token[layer.window]
        return layer.write(key_states, value_states, self._slots[layer.window], table)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self._views[layer_idx].inputs(conv_states)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self._views[layer_idx].keep(recurrent_states)
        return recurrent_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._views[layer_idx].state()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        raise UnsupportedError(_NO_LENGTH)


class PagedCache:
    """Pools for all layers of a model, and the rows that live in them.

    ``rows`` are those the next forward is for: while prompts are read, one row for each different
    prompt; then all rows of the batch.
    """

    def __init__(
        self,
        shapes: CacheShapes,
        windows: Sequence[int],
        rows: Rows,
        device: torch.device,
        *,
        page_size: int,
        chunk: int,
        plan: RecurrentPlan,
        dtype: torch.dtype | None = None,
        drafts: bool = False,
    ) -> None:
        """``windows``: keys a layer sees at most, 0 for all. ``chunk``: the longest block that is ever fed.

        ``dtype``: of the pages, None for the layers' own. ``drafts``: rows run ahead of what is final.
        Raises PoolError if memory does not suffice.
        """
        windows = [windows[index] for index in shapes.attention]
        longest = -(-max(rows.reach) // page_size)
        rings = {window: _ring(window, chunk, page_size) for window in set(windows) if window}
        # A ring that is no shorter than the longest row saves nothing.
        kept = [window if rings.get(window, longest) < longest else 0 for window in windows]
        pages = {
            window: pages_needed(rows, page_size, rings.get(window, 0)) + RESERVED for window in {0, *kept}
        }
        count = len(rows.leaders)
        states = memory(tuple(shapes.recurrent.values()), count, plan)
        wanted = [
            (shape, window, pages[window])
            for shape, window in zip(shapes.attention.values(), kept, strict=True)
        ]
        made = _allocate(wanted, page_size, dtype, device, states)
        self.layers = dict(zip(shapes.attention, made, strict=True))
        self._num_layers = shapes.num_layers
        self._page_size = page_size
        # Window -> the pages that a row goes round in (0: none), and the pages of the pool.
        self._sizes = {window: (rings.get(window, 0), number) for window, number in pages.items()}
        # Graphs treat a length of one as a constant: no table is a single page long.
        capacity = max(longest, 2) * page_size
        self._everyone = _row_table(
            {window: torch.zeros(count, capacity, dtype=torch.int32, device=device) for window in pages},
            torch.zeros(count, dtype=torch.int64, device=device),
        )
        self.recurrent = RecurrentPools(
            shapes.recurrent, self._everyone.seq_lens, plan, ahead_of_final=drafts
        )
        self._seat(rows)

    def fits(self, rows: Rows) -> bool:
        """Whether as many rows as these, with these prompts and reaches, find room."""
        return (
            len(rows.leaders) == len(self._everyone.seq_lens)
            and max(rows.reach) <= self._everyone.capacity
            and all(
                pages_needed(rows, self._page_size, ring) + RESERVED <= number
                for ring, number in self._sizes.values()
            )
        )

    def seat(self, rows: Rows) -> None:
        """Begin anew with these rows, whose prompts are going to be read. Every tensor stays where it is."""
        for layer in self.layers.values():
            for pages in layer.pools:
                # A mask hides what is left of other rows, but not if it is no number.
                pages.view(torch.uint8).zero_()
        self._seat(rows)

    def _seat(self, rows: Rows) -> None:
        self._placements = {
            window: _place(rows, self._page_size, ring, number)
            for window, (ring, number) in self._sizes.items()
        }
        everyone, unique = self._everyone, rows.unique
        for window, placement in self._placements.items():
            slots = _slots(placement, everyone.capacity, self._page_size)
            everyone.req_to_token[window].copy_(slots)
        self.rows = everyone if len(unique) == len(rows.leaders) else _chosen(everyone, unique)
        readers = [unique.index(leader) for leader in rows.leaders]
        self.reader_of_row = torch.tensor(readers, device=everyone.seq_lens.device)
        self.recurrent.start(len(unique))

    def buffers(self) -> Iterator[tuple[str, Tensor]]:
        """What a captured step reads and writes here, by name."""
        yield "seq_lens", self._everyone.seq_lens
        for window, table in self._everyone.req_to_token.items():
            yield f"req_to_token of window {window}", table
        for index, layer in self.layers.items():
            for name, pool in zip(("keys", "values"), layer.pools, strict=True):
                yield f"layer {index} {name}", pool
        yield from self.recurrent.buffers()

    def block(self, positions: Tensor) -> Block:
        """The cache a model is given for tokens at these positions, int64 [B, q]."""
        views = {
            index: RecurrentView(layer, self.recurrent, self.rows.seq_lens)
            for index, layer in self.recurrent.layers.items()
        }
        return Block(self.layers, views, self._num_layers, self.rows, self.rows.slots(positions))

    def share_prompts(self, prompt_lens: Tensor) -> None:
        """Once the prompts are read: rows with the same prompt get copies of what they will write.

        From here on the cache is every row's. prompt_lens: int64 [B].
        """
        for layer in self.layers.values():
            copies = self._placements[layer.window].copies
            if copies:
                source, target = torch.tensor(copies, device=self.reader_of_row.device).unbind(1)
                for pages in layer.pools:
                    stored = pages.view(torch.uint8)
                    stored[target] = stored[source]
        self.rows = self._everyone
        self.rows.seq_lens.copy_(prompt_lens)
        self.recurrent.spread(self.reader_of_row, self.rows.seq_lens)


def _ring(window: int, chunk: int, page_size: int) -> int:
    """Pages in which a window goes round, while a block of ``chunk`` tokens is written ahead of it."""
    return -(-(window + chunk - 1) // page_size) + 1


def _place(rows: Rows, page_size: int, ring: int, num_pages: int) -> Placement:
    allocator = PageAllocator(num_pages)
    return place_rings(allocator, rows, ring, page_size) if ring else place(allocator, rows, page_size)


def _allocate(
    layers: Sequence[tuple[LayerShape, int, int]],
    page_size: int,
    dtype: torch.dtype | None,
    device: torch.device,
    states: int,
) -> list[PagedLayer]:
    """Pools of (shape, window, pages), beside ``states`` bytes of recurrent states.

    What was allocated is let go of where the rest does not fit.
    """
    sizes = [shape.bytes_per_token(dtype) * page_size * pages for shape, _, pages in layers]
    free = free_bytes(device)
    if free is not None and states > free:
        raise PoolError(
            f"the recurrent states need {states / 2**30:.1f} GiB, and {device} has {free / 2**30:.1f}: "
            f"generate fewer rows at once, or fewer draft tokens"
        )
    if free is not None:
        free -= states
    if free is not None and sum(sizes) > free:
        raise _out_of_memory(layers, sizes, free, device)
    made: list[PagedLayer] = []
    for shape, window, pages in layers:
        try:
            layer = PagedLayer(pages, page_size, shape, window, dtype=dtype or shape.dtype, device=device)
        except RuntimeError as error:
            raise _out_of_memory(layers, sizes, sum(sizes[: len(made)]), device) from error
        made.append(layer)
    return made


def _out_of_memory(
    layers: Sequence[tuple[LayerShape, int, int]], sizes: Sequence[int], free: int, device: torch.device
) -> PoolError:
    total = sum(sizes)
    pages = sum({window: count for _, window, count in layers}.values())
    missing = -(-(total - free) * pages // total)
    return PoolError(
        f"the pool of keys and values needs {pages} pages ({total / 2**30:.1f} GiB), and on {device} "
        f"{missing} of them are missing: generate fewer tokens, or fewer rows at once"
    )


def _slots(placement: Placement, capacity: int, page_size: int) -> Tensor:
    """Slot of each row's positions, int32 [B, capacity]; 0 behind a row's last page."""
    table = torch.zeros(len(placement.pages), capacity, dtype=torch.int32)
    for row, pages in enumerate(placement.pages):
        slots = torch.tensor(pages)[:, None] * page_size + torch.arange(page_size)
        table[row, : slots.numel()] = slots.flatten()
    return table


def _row_table(tables: dict[int, Tensor], seq_lens: Tensor) -> RowTable:
    for table in tables.values():
        compat.mark_dynamic(table, 1)
    return RowTable(seq_lens, tables)


def _chosen(table: RowTable, rows: Sequence[int]) -> RowTable:
    """Some of a table's rows, copied."""
    chosen = list(rows)
    tables = {window: each[chosen] for window, each in table.req_to_token.items()}
    return _row_table(tables, table.seq_lens[chosen])


class ShapeRecorder(WarmCache):
    """Takes down what each layer of a model caches, from a forward of one token."""

    def __init__(self, num_layers: int) -> None:
        self._recorders = [RecurrentRecorder() for _ in range(num_layers)]
        super().__init__([*self._recorders])
        self._attention: dict[int, LayerShape] = {}

    @property
    def shapes(self) -> CacheShapes:
        recurrent = {
            index: shape for index, each in enumerate(self._recorders) if (shape := each.shape) is not None
        }
        return CacheShapes(dict(sorted(self._attention.items())), recurrent, len(self._recorders))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        k, v = key_states.shape, value_states.shape
        self._attention[layer_idx] = LayerShape(k[1], k[3], v[3], key_states.dtype)
        return key_states, value_states

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        if state_idx:
            raise UnsupportedError("this model keeps several states in a layer, which specc cannot roll back")
        self._recorders[layer_idx].convolves(conv_states, conv_kernel_size)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return recurrent_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self._recorders[layer_idx].recurrent_states[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0
