"""What tests of rewritten attention check, and graphs of theirs that several share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specc.lowerings import kv_write, unified_attention, verify_attention
from tests.passes.attention_graphs import (
    HEADS,
    added,
    attentions,
    buffer_args,
    causal,
    count,
    over_buffer,
    over_pool,
    pool_args,
    repeat_kv,
    rewritten,
)

WRITE, VERIFY, UNIFIED = kv_write.overload, verify_attention.overload, unified_attention.overload
MINUS_INFINITY = added(causal, -torch.inf)
ADDED = added(causal)
SOURCES = [(over_pool, pool_args), (over_buffer, buffer_args)]
IDS = ["pool", "static"]
SINKS = torch.linspace(-1, 2, HEADS)


def check_rewritten(run: Any, layers: int = 1, scatters: int = 1) -> None:
    """Counts on the graph before and after both passes; results were compared when it ran."""
    assert attentions(run.before) == layers
    assert rewritten(run.after), run.refusals
    assert len(run.attention) == layers
    assert (run.count(UNIFIED), run.count(VERIFY), run.scatters) == (layers, 0, scatters)
    assert run.count(WRITE) == layers
    assert run.refusals == []


def check_refused(run: Any, reason: str) -> None:
    """The attention is as it was, with one remark that says why."""
    (given,) = run.refusals
    assert reason in given
    assert attentions(run.after) == attentions(run.before) == 1
    assert run.count(UNIFIED, VERIFY) == run.scatters == 0
    assert count(run.before, "index_copy_") == run.count("index_copy_")


def weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, repeat_kv(k).transpose(2, 3)) * 0.3
