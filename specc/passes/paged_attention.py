"""Writes ``specc::verify_attention`` in the place of an attention over a cache."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from specc import compat
from specc.lowerings import kv_write, ragged_kv, verify_attention
from specc.passes.attention_sites import AttentionSite, same_sizes
from specc.passes.causal_masks import Chain, NotAChainError, prove_chain
from specc.passes.framework import DynamoInserter, fake_tensor, fake_value, tensor_of
from specc.passes.in_place import Changes, memory_of
from specc.passes.kv_sources import Dense, NoCacheError, Pool, appended, kv_source, writes_to

# A static cache is cut into the largest of these pages that divides it.
PAGE_SIZES = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Paged:
    """Nodes that a verify_attention over some rows shares with the others over the same rows and slots."""

    kv_indptr: Node
    kv_indices: Node
    cu_seqlens_q: Node
    max_seqlen_k: Any


class PagedRewriter:
    """Rewrites one graph's attention sites; what several need is computed once, before the first layer."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm = gm
        self._top = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
        self._made: dict[Any, Any] = {}
        self._early: set[Any] = set()
        self._buffers: dict[Node, Node] = {}
        self._changes = Changes(gm.graph)

    def rewrite(self, site: AttentionSite) -> str:
        """Put the paged form before ``site.node`` and let its users read that; returns what was done.

        Raises NoCacheError or NotAChainError with the reason, before anything has changed.
        """
        source = kv_source(site)
        self._check_unchanged(site, source)
        chain = self._chain(site, source)
        k_pages, v_pages, table, scales = self._pages(source, site)
        paged = self._paged(chain, table, site)
        make = self._before(site.node, site.node)
        rows = tensor_of(site.q).shape[0]
        q = make.method("flatten", make.method("transpose", site.q, 1, 2), 0, 1)
        attended = make.call(
            verify_attention.overload,
            q,
            k_pages,
            v_pages,
            paged.kv_indptr,
            paged.kv_indices,
            paged.cu_seqlens_q,
            self._size(site.q, 2),
            paged.max_seqlen_k,
            site.scale,
            chain.window,
            site.softcap,
            site.sinks,
            *scales,
        )
        out = make.method("transpose", make.method("unflatten", attended, 0, (rows, -1)), 1, 2)
        if tensor_of(site.node).is_contiguous() and not all(map(_is_transposition, site.node.users)):
            # The result of a product is contiguous, and what reads it may count on that.
            out = make.method("contiguous", out)
        site.node.replace_all_uses_with(out)
        if isinstance(source, Dense):
            self._buffers[source.keys] = source.values
        window = f", window {chain.window}" if chain.window else ""
        return f"attention over {_describe(source)} is specc::verify_attention{window}"

    def rewrite_appends(self) -> Iterator[tuple[Node, str]]:
        """Turn what the static caches of rewritten attention append into ``specc::kv_write``."""
        for keys, values in self._buffers.items():
            writes = list(dict.fromkeys([*writes_to(keys), *writes_to(values)]))
            calls = [appended(node) for node in writes]
            if len(writes) != 2 or None in calls or keys.op not in ("placeholder", "get_attr"):
                continue
            (positions, new_k), (other, new_v) = calls  # type: ignore[misc]
            if positions is not other or any(node.users for node in writes):
                continue
            first, last = sorted(writes, key=list(self._gm.graph.nodes).index)
            if not self._can_wait(first, last, (keys, values), (positions, new_k, new_v)):
                continue
            self._append(keys, values, positions, new_k, new_v, last)
            for node in writes:
                self._gm.graph.erase_node(node)
            yield last, "what the static cache appends is specc::kv_write"

    def _check_unchanged(self, site: AttentionSite, source: Pool | Dense) -> None:
        """What the attention is computed from is read by the operators found, and later by its paged form."""
        read = [each for each in vars(source).values() if each is not None]
        leaves = [each for each in (site.q, site.mask, site.sinks, *read) if each is not None]
        body = _between(leaves, site.node)
        order = self._changes.order()
        first = min(body, key=order.__getitem__)
        for node, _ in self._changes.to([*leaves, *body], first, site.node):
            if node not in body:
                raise NoCacheError(f"what it is computed from is changed in place by {node.name}")
        if isinstance(source, Pool):
            for node, _ in self._changes.to([source.req_to_token]):
                raise NoCacheError(f"its slots are changed in place by {node.name}")

    def _can_wait(self, first: Node, last: Node, buffers: Iterable[Node], given: Iterable[Node]) -> bool:
        """Whether ``first`` may write when ``last`` does: until then, nothing reads that or changes this."""
        changing, waiting = memory_of(buffers), list(given)
        if any(self._changes.to(waiting, first.next, last)):
            return False
        node = first.next
        while node is not last:
            if changing & memory_of(node.all_input_nodes):
                return False
            node = node.next
        return True

    def _append(
        self, keys: Node, values: Node, positions: Node, new_k: Node, new_v: Node, before: Node
    ) -> None:
        """Each head of each row is a run of L slots: a view without gaps, which can be written through."""
        make = self._before(before, before)
        _, capacity = _runs(keys)
        # index_copy_ raises past a buffer's end; a tensor's value cannot, so a run's last slot takes it all
        # and the next run's first slots, another head's, do not.
        inside = make.method("clamp", positions, 0, capacity - 1)
        slots = make.method("flatten", make.method("add", self._run_starts(keys), inside), 0, 1)
        page = _page_size(capacity)
        k, v, k_pages, v_pages = (
            make.method("reshape", each, (-1, *shape, 1, tensor_of(each).shape[-1]))
            for each, shape in ((new_k, ()), (new_v, ()), (keys, (page,)), (values, (page,)))
        )
        make.call(kv_write.overload, k, v, k_pages, v_pages, slots, None, None)

    def _run_starts(self, keys: Node) -> Node:
        runs, capacity = _runs(keys)
        device = tensor_of(keys).device

        def build(make: DynamoInserter) -> Node:
            ends = make.call(torch.arange, 0, runs * capacity, capacity, device=device)
            return make.method("unsqueeze", ends, 1)

        return self._once(("run starts", runs, capacity, device), (), keys, build)

    def _chain(self, site: AttentionSite, source: Pool | Dense) -> Chain:
        q_len, keys = tensor_of(site.q).shape[2], tensor_of(site.k).shape[2]
        if site.mask is not None:
            if site.causal:
                raise NotAChainError("it has a mask and is_causal")
            rows, shape = tensor_of(site.q).shape[0], tensor_of(site.mask).shape
            if not (same_sizes(shape, (rows, 1, q_len, keys)) or same_sizes(shape, (1, 1, q_len, keys))):
                raise NotAChainError(f"its shape is {list(shape)} and not [B or 1, 1, q, S]")
            if site.mask not in self._made:
                self._made[site.mask] = prove_chain(site.mask, rows, self._changes)
            return self._made[site.mask]
        if isinstance(source, Pool):
            raise NotAChainError("it has no mask, and would see slots that hold no token")
        if site.causal and isinstance(q_len, int):
            return Chain(None, 0, 0)
        if isinstance(q_len, int) and q_len == 1 and isinstance(keys, int):
            return Chain(None, keys - 1, 0)
        raise NotAChainError("it has no mask, so every token of the block sees those behind it")

    def _pages(self, source: Pool | Dense, site: AttentionSite) -> tuple[Node, Node, Node, tuple[Any, Any]]:
        if isinstance(source, Pool):
            scales = source.k_scale, source.v_scale
            return source.k_pages, source.v_pages, source.req_to_token, scales
        k_pages, v_pages = (self._page_view(each, site) for each in (source.keys, source.values))
        return k_pages, v_pages, self._dense_table(source.keys, site), (None, None)

    def _page_view(self, buffer: Node, site: AttentionSite) -> Node:
        """[B, H, L, D] as [pages, P, H, D]: page b * H * L / P + j starts at row b's token j * P.

        Pages overlap, since row b + 1 begins H runs further on; nothing is written through this view.
        """
        fake = tensor_of(buffer)
        rows, heads, capacity, dim = fake.shape
        page = _page_size(capacity)
        num_pages = ((rows - 1) * heads + 1) * (capacity // page)
        make = self._before(site.node, site.node)
        shape = (num_pages, page, heads, dim)
        # Without an offset: no guard keeps the buffer where it is in its storage.
        return make.method("as_strided", buffer, shape, (page * dim, dim, capacity * dim, 1))

    def _dense_table(self, keys: Node, site: AttentionSite) -> Node:
        """The slot of each row's tokens in that view, int32 [B, L]."""
        rows, heads, capacity, _ = tensor_of(keys).shape
        device = tensor_of(keys).device

        def build(make: DynamoInserter) -> Node:
            starts = make.call(torch.arange, 0, rows * heads * capacity, heads * capacity, device=device)
            tokens = make.call(torch.arange, capacity, device=device)
            table = make.method("add", make.method("unsqueeze", starts, 1), tokens)
            return make.method("to", table, torch.int32)

        return self._once(("table", rows, heads, capacity, device), (), site.node, build)

    def _paged(self, chain: Chain, table: Node, site: AttentionSite) -> Paged:
        rows = tensor_of(site.q).shape[0]
        device = tensor_of(site.q).device
        q_len = self._size(site.q, 2)

        def lens(make: DynamoInserter) -> Node:
            given = chain.lengths
            if given is None or fake_tensor(given) is None:
                total = make.call(torch.full, (rows,), given or 0, dtype=torch.int64, device=device)
            else:
                total = make.method("expand", make.method("to", given, torch.int64), rows)
            return make.method("add", make.method("add", total, chain.offset), q_len)

        def starts(make: DynamoInserter) -> Node:
            counts = make.call(torch.arange, rows + 1, dtype=torch.int32, device=device)
            return make.method("mul", counts, q_len)

        def ragged(make: DynamoInserter) -> tuple[Node, Node]:
            pair = make.call(ragged_kv.overload, table, kv_lens)
            return make.call(operator.getitem, pair, 0), make.call(operator.getitem, pair, 1)

        block = str(q_len)
        kv_lens = self._once(
            ("lens", chain.lengths, chain.offset, block, rows), (chain.lengths, q_len), site.node, lens
        )
        cu_seqlens_q = self._once(("starts", block, rows), (q_len,), site.node, starts)
        kv_indptr, kv_indices = self._once(("ragged", table, kv_lens), (table, kv_lens), site.node, ragged)
        return Paged(kv_indptr, kv_indices, cu_seqlens_q, self._size(table, 1))

    def _once(
        self, key: Any, needs: tuple[Any, ...], site: Node, build: Callable[[DynamoInserter], Any]
    ) -> Any:
        """What ``build`` makes, once per ``key``: before the first layer where its inputs are there."""
        if key not in self._made:
            early = all(not isinstance(each, Node) or self._is_early(each) for each in needs)
            made = build(self._before(self._top if early else site, site))
            self._made[key] = made
            if early:
                self._early.update(made if isinstance(made, tuple) else (made,))
        return self._made[key]

    def _is_early(self, node: Node) -> bool:
        return node.op in ("placeholder", "get_attr") or node in self._early

    def _size(self, node: Node, dim: int) -> Any:
        """A dimension's size: a number, or where it is symbolic the graph input that carries it."""
        size = tensor_of(node).shape[dim]
        if isinstance(size, int):
            return size
        for each in self._gm.graph.find_nodes(op="placeholder"):
            value = fake_value(each)
            if isinstance(value, torch.SymInt) and compat.is_size(value, size):
                return each

        def build(make: DynamoInserter) -> Node:
            return make.method("size", node, dim)

        return self._once(("size", node, dim), (node,), next(iter(node.users)), build)

    def _before(self, place: Node, like: Node) -> DynamoInserter:
        return DynamoInserter(self._gm.graph, place, like)


def _between(leaves: Iterable[Node], last: Node) -> set[Node]:
    """The nodes that compute ``last`` from ``leaves``, itself included."""
    pending, found, stop = [last], set[Node](), set(leaves)
    while pending:
        node = pending.pop()
        if node not in found and node not in stop and memory_of([node]):
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _is_transposition(node: Node) -> bool:
    return node.op == "call_method" and node.target == "transpose" and set(node.args[1:]) == {1, 2}


def _runs(keys: Node) -> tuple[int, int]:
    rows, heads, capacity, _ = tensor_of(keys).shape
    return rows * heads, capacity


def _page_size(capacity: int) -> int:
    return next(size for size in PAGE_SIZES if capacity % size == 0)


def _describe(source: Pool | Dense) -> str:
    return "specc's pool" if isinstance(source, Pool) else "a static cache"
