"""Operators: one file each, with schema, reference, fake kernel and providers."""

from __future__ import annotations

from specc.lowerings.accept_greedy import accept_greedy
from specc.lowerings.framework import REGISTRY, Decision, Op, Provider
from specc.lowerings.greedy_select import greedy_select
from specc.lowerings.kv_write import kv_write
from specc.lowerings.linear import linear
from specc.lowerings.ragged_kv import ragged_kv
from specc.lowerings.read_pages import read_pages
from specc.lowerings.scatter_ragged import scatter_ragged_to_page_table
from specc.lowerings.scatter_req_to_token import scatter_req_to_token_to_page_table
from specc.lowerings.unified_attention import unified_attention
from specc.lowerings.verify_attention import verify_attention

__all__ = [
    "REGISTRY",
    "Decision",
    "Op",
    "Provider",
    "accept_greedy",
    "greedy_select",
    "kv_write",
    "linear",
    "ragged_kv",
    "read_pages",
    "scatter_ragged_to_page_table",
    "scatter_req_to_token_to_page_table",
    "unified_attention",
    "verify_attention",
]
