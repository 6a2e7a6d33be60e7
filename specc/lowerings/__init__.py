"""Operators: one file each, with schema, reference, fake kernel and providers."""

from __future__ import annotations

from specc.lowerings.accept_greedy import accept_greedy
from specc.lowerings.framework import REGISTRY, Decision, Op, Provider
from specc.lowerings.greedy_select import greedy_select
from specc.lowerings.kv_write import kv_write
from specc.lowerings.linear import linear

__all__ = ["REGISTRY", "Decision", "Op", "Provider", "accept_greedy", "greedy_select", "kv_write", "linear"]
