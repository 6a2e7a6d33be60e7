"""Small functions with attention over a pool or a static cache, and a backend that runs the Dynamo passes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from specc.lowerings import scatter_ragged_to_page_table, scatter_req_to_token_to_page_table
from specc.options import Options
from specc.passes import PassResult, canonicalize
from specc.passes import verify_attention as verify_pass
from specc.passes.attention_sites import SDPA, SOFTMAX
from specc.passes.framework import Pass, PassContext, Remark, run_passes

PASSES = (canonicalize.PASS, verify_pass.PASS)
ROWS, HEADS, KV_HEADS, DIM, CAPACITY, PAGE = 2, 4, 2, 8, 32, 8
GROUP = HEADS // KV_HEADS

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
MakeMask = Callable[[Tensor, int, int], Tensor | None]


@dataclasses.dataclass
class Run:
    """One captured graph before and after the passes, and what the passes reported."""

    before: GraphModule
    after: GraphModule
    results: list[PassResult]

    @property
    def remarks(self) -> list[Remark]:
        return [remark for result in self.results for remark in result.remarks]

    @property
    def refusals(self) -> list[str]:
        return [remark.reason for remark in self.remarks if remark.status == "refused"]

    @property
    def attention(self) -> list[str]:
        """Reasons of the attention sites that canonicalize rewrote."""
        reasons = (remark.reason for remark in self.results[0].remarks if remark.status == "fired")
        return [reason for reason in reasons if reason.startswith("attention")]

    def count(self, *targets: Any) -> int:
        return count(self.after, *targets)

    @property
    def scatters(self) -> int:
        return self.count(scatter_req_to_token_to_page_table.overload, scatter_ragged_to_page_table.overload)


def count(gm: GraphModule, *targets: Any) -> int:
    """Nodes that call one of these functions, or methods named so."""
    return sum(node.op != "placeholder" and node.target in targets for node in gm.graph.nodes)


def attentions(gm: GraphModule) -> int:
    return count(gm, SDPA, *SOFTMAX, "softmax")


def compiled(
    fn: Callable[..., Any],
    *calls: Sequence[Any],
    passes: Sequence[Pass] = PASSES,
    dynamic: bool | None = None,
    options: Options | None = None,
) -> list[Run]:
    """Compile ``fn``, run it on each of ``calls`` and compare results and arguments with eager."""
    runs: list[Run] = []

    def backend(gm: GraphModule, inputs: list[Any]) -> Any:
        before = GraphModule(gm, copy.deepcopy(gm.graph))
        runs.append(Run(before, gm, run_passes(gm, passes, PassContext(options or Options()))))
        return AsItSays(gm).run

    torch.compiler.reset()
    with torch.no_grad():
        captured = torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)
        for call in calls:
            expected_args, args = copy.deepcopy(call), copy.deepcopy(call)
            state = torch.get_rng_state()
            expected = fn(*expected_args)
            torch.set_rng_state(state)
            result = captured(*args)
            torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(args, expected_args, atol=1e-6, rtol=1e-6)
    return runs


def compiled_once(fn: Callable[..., Any], *calls: Sequence[Any], **settings: Any) -> Run:
    (run,) = compiled(fn, *calls, **settings)
    return run


class AsItSays(Interpreter):
    """Runs a Dynamo graph, and asserts that every tensor is what its node's fake value says."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        fake = n.meta.get("example_value")
        if n.op.startswith("call") and isinstance(result, Tensor) and isinstance(fake, Tensor):
            assert (fake.dtype, fake.dim()) == (result.dtype, result.dim()), n
            if all(isinstance(size, int) for size in fake.shape):
                assert fake.shape == result.shape, n
        return result


# --- inputs ------------------------------------------------------------------------------------


def block(q_len: int, k_dim: int = DIM, v_dim: int = DIM, heads: int = KV_HEADS) -> tuple[Tensor, ...]:
    """Queries, and the block's own keys and values."""
    q = torch.randn(ROWS, HEADS, q_len, k_dim)
    return q, torch.randn(ROWS, heads, q_len, k_dim), torch.randn(ROWS, heads, q_len, v_dim)


def pool_args(
    q_len: int = 3,
    lens: Any = (5, 17),
    k_dim: int = DIM,
    v_dim: int = DIM,
    capacity: int = CAPACITY,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, ...]:
    """(q, k, v, k_pages, v_pages, table, lens): rows' pages shuffled; page 0 is nobody's."""
    per_row = capacity // PAGE
    pages = 1 + ROWS * per_row
    order = 1 + torch.randperm(pages - 1)
    table = (order[:, None] * PAGE + torch.arange(PAGE)).view(ROWS, capacity).to(torch.int32)
    pools = torch.randn(pages, PAGE, KV_HEADS, k_dim), torch.randn(pages, PAGE, KV_HEADS, v_dim)
    return *block(q_len, k_dim, v_dim), *pools, table, torch.tensor(lens, dtype=dtype)


def buffer_args(
    q_len: int = 3,
    lens: Any = 9,
    k_dim: int = DIM,
    v_dim: int = DIM,
    capacity: int = CAPACITY,
    dtype: torch.dtype = torch.int64,
    heads: int = KV_HEADS,
) -> tuple[Tensor, ...]:
    """(q, k, v, keys, values, lens) with one length for all rows."""
    keys, values = torch.randn(ROWS, heads, capacity, k_dim), torch.randn(ROWS, heads, capacity, v_dim)
    return *block(q_len, k_dim, v_dim, heads), keys, values, torch.tensor(lens, dtype=dtype)


# --- caches ------------------------------------------------------------------------------------


def append_to_pool(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lens: Tensor
) -> tuple[Tensor, Tensor]:
    """As the runtime's cache does."""
    positions = lens[:, None] + torch.arange(k.shape[2])
    slots = table.gather(1, positions.clamp(0, table.shape[1] - 1).long()).flatten().long()
    tokens = (each.transpose(1, 2).flatten(0, 1) for each in (k, v))
    torch.ops.specc.kv_write(*tokens, k_pages, v_pages, slots, None, None)
    return tuple(torch.ops.specc.read_pages(pages, table, None, k.dtype) for pages in (k_pages, v_pages))  # type: ignore[return-value]


def append_to_buffer(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> None:
    positions = torch.arange(k.shape[2]) + lens
    keys.index_copy_(2, positions, k)
    values.index_copy_(2, positions, v)


def over_pool(attend: Attend, make_mask: MakeMask) -> Callable[..., Tensor]:
    def function(
        q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, table: Tensor, lens: Tensor
    ) -> Tensor:
        mask = make_mask(lens, q.shape[2], table.shape[1])
        keys, values = append_to_pool(k, v, k_pages, v_pages, table, lens)
        return attend(q, keys, values, mask)

    return function


def over_buffer(attend: Attend, make_mask: MakeMask) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, lens: Tensor) -> Tensor:
        mask = make_mask(lens, q.shape[2], keys.shape[2])
        append_to_buffer(k, v, keys, values, lens)
        return attend(q, keys, values, mask)

    return function


# --- masks -------------------------------------------------------------------------------------


def causal(lens: Tensor, q_len: int, keys: int) -> Tensor:
    query = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None]
    return torch.arange(keys) <= query


def sliding(window: int) -> MakeMask:
    def make(lens: Tensor, q_len: int, keys: int) -> Tensor:
        query, key = lens.reshape(-1, 1, 1, 1) + torch.arange(q_len)[:, None], torch.arange(keys)
        return (key <= query) & (key > query - window)

    return make


def added(make_mask: MakeMask, hidden: float = torch.finfo(torch.float32).min) -> MakeMask:
    def make(lens: Tensor, q_len: int, keys: int) -> Tensor:
        visible = make_mask(lens, q_len, keys)
        assert visible is not None
        return torch.where(visible, torch.zeros(()), hidden)

    return make


def no_mask(lens: Tensor, q_len: int, keys: int) -> None:
    return None


# --- attention ---------------------------------------------------------------------------------


def repeat_kv(states: Tensor, n: int = GROUP) -> Tensor:
    rows, heads, length, dim = states.shape
    return states[:, :, None, :, :].expand(rows, heads, n, length, dim).reshape(rows, heads * n, length, dim)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, repeat_kv(k), repeat_kv(v), attn_mask=mask)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """transformers' eager_attention_forward."""
    weights = torch.matmul(q, repeat_kv(k).transpose(2, 3)) * DIM**-0.5
    if mask is not None:
        weights = weights + mask
    weights = torch.nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, p=0.0, training=False)
    return torch.matmul(weights, repeat_kv(v))


def rewritten(gm: GraphModule) -> bool:
    """Whether no attention is left but specc's own, and no page is read out."""
    left = count(gm, torch.ops.specc.read_pages, torch.ops.specc.read_pages.default, "index_copy_")
    return attentions(gm) == 0 and left == 0
