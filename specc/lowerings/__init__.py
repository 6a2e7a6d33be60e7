"""Operators: one file each, with schema, reference, fake kernel and providers."""

from __future__ import annotations

from specc.lowerings.accept_greedy import accept_greedy
from specc.lowerings.causal_conv1d import causal_conv1d
from specc.lowerings.causal_conv1d_replay import causal_conv1d_replay
from specc.lowerings.commit_conv import commit_conv
from specc.lowerings.commit_snapshots import commit_snapshots
from specc.lowerings.conv_inputs import conv_inputs
from specc.lowerings.fold_gated_delta_rule import fold_gated_delta_rule
from specc.lowerings.fold_ssd import fold_ssd
from specc.lowerings.framework import REGISTRY, Decision, Op, Provider
from specc.lowerings.gated_delta_rule import gated_delta_rule
from specc.lowerings.gated_delta_rule_replay import gated_delta_rule_replay
from specc.lowerings.gated_delta_rule_snapshot import gated_delta_rule_snapshot
from specc.lowerings.greedy_select import greedy_select
from specc.lowerings.kv_write import kv_write
from specc.lowerings.linear import linear
from specc.lowerings.linears import linears
from specc.lowerings.ragged_kv import ragged_kv
from specc.lowerings.read_pages import read_pages
from specc.lowerings.recurrent_state import recurrent_state
from specc.lowerings.scatter_ragged import scatter_ragged_to_page_table
from specc.lowerings.scatter_req_to_token import scatter_req_to_token_to_page_table
from specc.lowerings.ssd import ssd
from specc.lowerings.ssd_replay import ssd_replay
from specc.lowerings.ssd_snapshot import ssd_snapshot
from specc.lowerings.unified_attention import unified_attention
from specc.lowerings.verify_attention import verify_attention

__all__ = [
    "REGISTRY",
    "Decision",
    "Op",
    "Provider",
    "accept_greedy",
    "causal_conv1d",
    "causal_conv1d_replay",
    "commit_conv",
    "commit_snapshots",
    "conv_inputs",
    "fold_gated_delta_rule",
    "fold_ssd",
    "gated_delta_rule",
    "gated_delta_rule_replay",
    "gated_delta_rule_snapshot",
    "greedy_select",
    "kv_write",
    "linear",
    "linears",
    "ragged_kv",
    "read_pages",
    "recurrent_state",
    "scatter_ragged_to_page_table",
    "scatter_req_to_token_to_page_table",
    "ssd",
    "ssd_replay",
    "ssd_snapshot",
    "unified_attention",
    "verify_attention",
]
