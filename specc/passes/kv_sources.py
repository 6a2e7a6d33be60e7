"""Where an attention's keys and values come from: specc's pool, a static cache, or neither."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.fx import Node

from specc.lowerings import read_pages
from specc.passes.attention_sites import AttentionSite, same_sizes
from specc.passes.framework import call_arguments, fake_tensor, mutates, tensor_of


@dataclasses.dataclass(frozen=True)
class Pool:
    """specc's pages, [num_pages, P, Hkv, D], and req_to_token, int32 [B, capacity]."""

    k_pages: Node
    v_pages: Node
    req_to_token: Node
    k_scale: Node | None
    v_scale: Node | None


@dataclasses.dataclass(frozen=True)
class Dense:
    """Contiguous keys and values [B, Hkv, L, D]: a static cache's buffers, or its window with the block."""

    keys: Node
    values: Node


class NoCacheError(Exception):
    """Why keys and values cannot be read as pages."""


def kv_source(site: AttentionSite) -> Pool | Dense:
    """Raises NoCacheError with the reason."""
    k, v = site.k, site.v
    dense = all(_is_buffer(each) or _is_rolled_window(each) for each in (k, v))
    if dense and not all(isinstance(size, int) for each in (k, v) for size in tensor_of(each).shape):
        raise NoCacheError("the size of its static cache is not known when compiling")
    _check_shapes(site)
    if k.target is read_pages.overload and v.target is read_pages.overload:
        k_read, v_read = call_arguments(k), call_arguments(v)
        if k_read["req_to_token"] is not v_read["req_to_token"]:
            raise NoCacheError("its keys and values lie in different slots")
        if tensor_of(k_read["pages"]).shape[1] != tensor_of(v_read["pages"]).shape[1]:
            raise NoCacheError("its keys and values lie on pages of different sizes")
        return Pool(
            k_read["pages"], v_read["pages"], k_read["req_to_token"], k_read["scale"], v_read["scale"]
        )
    if dense:
        if not (tensor_of(k).is_contiguous() and tensor_of(v).is_contiguous()):
            raise NoCacheError("its static cache is not contiguous")
        return Dense(k, v)
    if _comes_from_a_cache(k) or _comes_from_a_cache(v):
        raise NoCacheError("its keys are computed from what is cached, as in latent attention (MLA)")
    raise NoCacheError("its keys come from no cache of fixed size")


def _check_shapes(site: AttentionSite) -> None:
    """Attention of [B, Hq, q, Dk] over [B, Hkv, S, D], without anything that is broadcast."""
    q, k, v, out = (tensor_of(each) for each in (site.q, site.k, site.v, site.node))
    if k.dim() != 4 or v.dim() != 4:
        raise NoCacheError(f"its keys and values have {k.dim()} and {v.dim()} dimensions, not 4")
    rows, heads, q_len, dim = q.shape
    length, kv_heads = k.shape[2], k.shape[1]
    fixed = (rows, heads, dim, kv_heads, v.shape[1], v.shape[3])
    if not all(isinstance(size, int) for size in fixed):
        raise NoCacheError("its numbers of rows and heads are not all known when compiling")
    matching = (
        same_sizes(k.shape, (rows, kv_heads, length, dim))
        and same_sizes(v.shape, (rows, kv_heads, length, v.shape[3]))
        and same_sizes(out.shape, (rows, heads, q_len, v.shape[3]))
    )
    if not matching or heads % kv_heads:
        raise NoCacheError("its queries, keys and values do not have the same rows, heads and lengths")
    if isinstance(q_len, int) and isinstance(length, int) and q_len > length:
        raise NoCacheError(f"it has {q_len} queries and only {length} keys")
    if out.dtype != q.dtype:
        raise NoCacheError(f"it turns queries of {q.dtype} into {out.dtype}")


def _is_buffer(node: Node) -> bool:
    """A graph input that the graph writes new tokens into."""
    return node.op in ("placeholder", "get_attr") and any(mutates(user, node) for user in node.users)


def _is_rolled_window(node: Node) -> bool:
    """cat([cached[:, :, a:b], new], -2), which the graph then copies back into the buffer."""
    if node.target is not torch.cat or not isinstance(node.args[0], list | tuple):
        return False
    cached = node.args[0][0]
    if not isinstance(cached, Node) or cached.target is not operator.getitem:
        return False
    return isinstance(cached.args[0], Node) and _is_buffer(cached.args[0])


def _comes_from_a_cache(node: Node) -> bool:
    pending, seen = [node], set[Node]()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target is read_pages.overload or (
            fake_tensor(current) is not None and _is_buffer(current)
        ):
            return True
        pending.extend(current.all_input_nodes)
    return False


def writes_to(buffer: Node) -> list[Node]:
    """Every node that changes ``buffer`` in place."""
    return [user for user in buffer.users if mutates(user, buffer)]


def appended(node: Node) -> tuple[Any, Any] | None:
    """(positions [q], new [B, Hkv, q, D]) where ``node`` is buffer.index_copy_(2, positions, new)."""
    if node.op != "call_method" or node.target != "index_copy_" or node.kwargs or len(node.args) != 4:
        return None
    _, dim, positions, new = node.args
    return (positions, new) if dim in (2, -2) else None
