"""Graph-to-graph rewrites, one file each, and the order in which they run."""

from __future__ import annotations

from specc.passes import (
    canonicalize,
    choose_providers,
    greedy_select,
    lower_linear,
    prune_logits,
    state_commit,
    verify_attention,
)
from specc.passes.framework import Level, Pass, PassContext, PassResult, Remark

PASSES: tuple[Pass, ...] = (
    canonicalize.PASS,
    state_commit.PASS,
    verify_attention.PASS,
    choose_providers.ON_DYNAMO,
    greedy_select.PASS,
    prune_logits.PASS,
    lower_linear.PASS,
    choose_providers.ON_ATEN,
)


def passes_at(level: Level) -> tuple[Pass, ...]:
    return tuple(each for each in PASSES if each.level == level)


__all__ = ["PASSES", "Level", "Pass", "PassContext", "PassResult", "Remark", "passes_at"]
