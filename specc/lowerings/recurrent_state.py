"""``specc::recurrent_state``: stands for rows' states in a captured graph until a pass rewrites it."""

from __future__ import annotations

import torch
from torch import Tensor

from specc.errors import UnsupportedError
from specc.lowerings.framework import LIBRARY, NAMESPACE

NAME = "recurrent_state"


def _fake(
    state: Tensor,
    rings: list[Tensor],
    base: Tensor,
    seq_lens: Tensor,
    final_lens: Tensor,
    flush_every: int,
    exact: bool,
) -> Tensor:
    """float32 [B, *inner], where seq_lens is [B] and state [S, *inner] or, without rings, [S, R, *inner]."""
    inner = state.shape[1:] if rings else state.shape[2:]
    return state.new_empty((seq_lens.shape[0], *inner), dtype=torch.float32)


def _run(*_: object) -> Tensor:
    raise UnsupportedError(
        "the recurrence over specc's cache could not be rewritten, and cannot run as captured: "
        "was the pass state_commit disabled, or is mode='verify' missing from the options?"
    )


LIBRARY.define(
    f"{NAME}(Tensor state, Tensor[] rings, Tensor base, Tensor seq_lens, Tensor final_lens, int flush_every, "
    "bool exact) -> Tensor"
)
LIBRARY.impl(NAME, _run, "CompositeExplicitAutograd")
LIBRARY.impl(NAME, _fake, "Meta")

# Not in the registry: it has no meaning of its own, so no provider can serve it.
recurrent_state = getattr(getattr(torch.ops, NAMESPACE), NAME).default
