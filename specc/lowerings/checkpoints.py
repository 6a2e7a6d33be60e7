"""What the references of recurrent layers share: live rows of a pool, and rings of records.

Nothing here has a shape that depends on data. A ring holds the record of position p at entry ``p % R``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specc.lowerings.framework import Provider, always

# What the kernels of recurrent layers read and write.
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def live_rows(slots: Tensor | None, alive: Tensor, pool_rows: int) -> tuple[Tensor, Tensor]:
    """The pool row of each batch row, int64 [B] within the pool, and which rows are live, bool [B].

    alive: bool [B], what the call itself says of its rows; slots: int [B] or None for 0, 1, 2, ...
    """
    if slots is None:
        return torch.arange(alive.shape[0], device=alive.device).clamp(max=pool_rows - 1), alive
    return slots.long().clamp(0, pool_rows - 1), alive & (slots >= 0)


def put_rows(pool: Tensor, slot: Tensor, live: Tensor, values: Tensor) -> None:
    """``pool[slot[b]] = values[b]`` for live rows, in place.

    A dead row repeats the first live row's write; where no row is live, what lies there is put back.
    """
    source = torch.where(live, torch.arange(len(live), device=live.device), live.int().argmax())
    at = slot[source]
    values = torch.where(live.any(), values[source].to(pool.dtype), pool[at])
    pool.index_put_((at,), values)


def put_block(ring: Tensor, slot: Tensor, live: Tensor, seq_lens: Tensor, block: Tensor) -> None:
    """Write token t of ``block`` [B, T, ...] to the entry of position ``seq_lens + t``, in place.

    ring: [S, R, ...]. Of a block longer than the ring its end stays; negative positions are not written.
    """
    size, tokens = ring.shape[1], block.shape[1]
    last = (seq_lens + tokens - 1)[:, None]
    position = last - (last - torch.arange(size, device=ring.device)) % size
    token = position - seq_lens[:, None]
    row = torch.arange(len(slot), device=ring.device)[:, None]
    written = block[row, token.clamp(0, tokens - 1)].to(ring.dtype)
    fresh = along(token >= 0, ring) & along(position >= 0, ring)
    put_rows(ring, slot, live, torch.where(fresh, written, ring[slot]))


def along(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` over the first dimensions of ``x``, with ones for the others."""
    return mask.reshape(*mask.shape, *[1] * (x.dim() - mask.dim()))


def longest(counts: Tensor, bound: int) -> int:
    """How often a loop over ``counts`` [B] must run: what a CPU reads at once, elsewhere the bound."""
    if counts.device.type != "cpu" or not counts.numel():
        return bound
    return min(max(int(counts.max()), 0), bound)


def as_one_call(reference: Callable[..., Any]) -> Provider:
    """A reference that loops over a length, as one node of a compiled graph, which would unroll it."""
    return Provider("loops", reference, always)
