"""Calls of paged attention with what they mean, token by token, for the tests on every device."""

from __future__ import annotations

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.lowerings.pools import FP8, LAYOUTS

PAGE_SIZES = (1, 16, 64, 128)
HEAD_DIMS = ((8, 8), (24, 16), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128))


@dataclasses.dataclass(frozen=True)
class Row:
    """A block of ``count`` tokens that ends a text of ``length`` keys."""

    count: int
    length: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a call is made of, besides its rows."""

    page_size: int = 16
    width: int = 2
    kv_heads: int = 2
    group: int = 2
    head_dims: tuple[int, int] = (8, 8)
    dtype: torch.dtype = torch.float32
    pool_dtype: torch.dtype = torch.float32
    layout: str = "pages first"
    scattered: bool = True
    scaled: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    # Tokens behind the last row's.
    strays: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
    """Arguments of unified_attention, and the rows' keys and values as they are stored, [length, Hkv, D]."""

    arguments: tuple[object, ...]
    rows: list[Row]
    keys: list[Tensor]
    values: list[Tensor]

    def to(self, device: str) -> Call:
        moved = tuple(each.to(device) if isinstance(each, Tensor) else each for each in self.arguments)
        return dataclasses.replace(self, arguments=moved)


def make_call(rows: list[Row], shape: Shape) -> Call:
    """Random queries, keys and values. Slots that hold no key are NaN, unused table entries are wild."""
    full = shape.width * shape.page_size
    num_pages = 1 + len(rows) * shape.width + 2
    pages = torch.randperm(num_pages - 1) + 1 if shape.scattered else torch.arange(1, num_pages)
    table = pages[: len(rows) * shape.width].view(len(rows), shape.width).int()
    dk, dv = shape.head_dims
    k_pages, v_pages = (_poisoned(num_pages, dim, shape) for dim in (dk, dv))
    keys, values = [], []
    for row, each in enumerate(rows):
        stored = min(each.length, full)
        slot = torch.arange(stored)
        page, offset = table[row].long()[slot // shape.page_size], slot % shape.page_size
        for pool, kept, dim in ((k_pages, keys, dk), (v_pages, values, dv)):
            states = torch.randn(stored, shape.kv_heads, dim).to(shape.pool_dtype)
            _bytes(pool)[page, offset] = _bytes(states)
            kept.append(states)
        used = -(-stored // shape.page_size)
        table[row, used:] = torch.tensor([0, -1, 2**31 - 1, num_pages])[torch.randint(4, ())]
    bounds = torch.tensor([0, *(each.count for each in rows)]).cumsum(0).int()
    tokens, heads = int(bounds[-1]) + shape.strays, shape.kv_heads * shape.group
    arguments = (
        torch.randn(tokens, heads, dk).to(shape.dtype),
        k_pages,
        v_pages,
        table,
        bounds,
        torch.tensor([each.length for each in rows]),
        max(each.count for each in rows),
        dk**-0.5,
        shape.window,
        shape.softcap,
        torch.randn(heads).to(shape.dtype) if shape.sinks else None,
        torch.tensor([0.75]) if shape.scaled else None,
        torch.tensor([1.5]) if shape.scaled else None,
    )
    return Call(arguments, rows, keys, values)


def _poisoned(num_pages: int, dim: int, shape: Shape) -> Tensor:
    order = LAYOUTS[shape.layout]
    sizes = (num_pages, shape.page_size, shape.kv_heads, dim)
    buffer = torch.full([sizes[each] for each in order], torch.nan).to(shape.pool_dtype)
    return buffer.permute([order.index(each) for each in range(4)])


def _bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == FP8 else x


def expected(call: Call) -> Tensor:
    """What the call means, one token at a time, in float64: [T, Hq, Dv]."""
    q, _, v_pages, _, bounds, _, _, scale, window, softcap, sinks, k_scale, v_scale = call.arguments
    group = q.shape[1] // v_pages.shape[2]
    out = torch.zeros(q.shape[0], q.shape[1], v_pages.shape[3], dtype=torch.float64)
    for row, (each, k, v) in enumerate(zip(call.rows, call.keys, call.values, strict=True)):
        k = k.double() * (1 if k_scale is None else float(k_scale))
        v = v.double() * (1 if v_scale is None else float(v_scale))
        for j in range(each.count):
            position, token = each.length - each.count + j, int(bounds[row]) + j
            seen = [t for t in range(len(k)) if t <= position and not (window and position - t >= window)]
            if not seen:
                continue
            for head in range(q.shape[1]):
                score = k[seen, head // group] @ q[token, head].double().cpu() * scale
                if softcap:
                    score = torch.tanh(score / softcap) * softcap
                if sinks is not None:
                    score = torch.cat([score, sinks[head : head + 1].double().cpu()])
                weights = torch.softmax(score, 0)[: len(seen)]
                out[token, head] = weights @ v[seen, head // group]
    return out


def by_slots(call: Call) -> tuple[object, ...]:
    """The same call for verify_attention, whose rows name each slot."""
    q, k_pages, v_pages, table, bounds, lens, max_q, *rest = call.arguments
    page_size = k_pages.shape[1]
    slots = [
        table[row, t // page_size] * page_size + t % page_size
        for row, length in enumerate(lens.tolist())
        for t in range(length)
    ]
    kv_indices = torch.tensor([*slots, 7], dtype=torch.int32, device=q.device)
    kv_indptr = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
    return q, k_pages, v_pages, kv_indptr, kv_indices, bounds, max_q, max(1, int(lens.max())), *rest


def _length(shape: Shape, beyond: bool) -> st.SearchStrategy[int]:
    """Lengths at and around page ends, up to the table's width or, if ``beyond``, a little past it."""
    full = shape.width * shape.page_size
    longest = full + 3 if beyond else full
    edges = [page * shape.page_size + off for page in range(shape.width + 1) for off in (-1, 0, 1)]
    return st.sampled_from([each for each in edges if 0 <= each <= longest]) | st.integers(0, longest)


@st.composite
def calls(draw: st.DrawFn, beyond: bool = True, floats: bool = False) -> Call:
    """Ragged rows, empty ones and blocks longer than their text included.

    beyond: lengths past the table's width too. floats: float32 only, which checks most sharply.
    """
    dtype = torch.float32
    if not floats:
        dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    pool_dtype = dtype if floats else draw(st.sampled_from([dtype, dtype, torch.bfloat16, FP8]))
    group = draw(st.sampled_from([1, 2, 3, 4, 8, 16]))
    shape = Shape(
        page_size=draw(st.sampled_from(PAGE_SIZES)),
        width=draw(st.integers(1, 4)),
        kv_heads=draw(st.integers(1, 3 if group < 4 else 1)),
        group=group,
        head_dims=draw(st.sampled_from(HEAD_DIMS)),
        dtype=dtype,
        pool_dtype=pool_dtype,
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        scattered=draw(st.booleans()),
        scaled=pool_dtype == FP8 or draw(st.booleans()),
        window=draw(st.sampled_from([0, 0, 1, 4, 17])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.5])),
        sinks=draw(st.booleans()),
        strays=draw(st.integers(1, 2)),
    )
    row = st.builds(Row, st.integers(0, 9), _length(shape, beyond))
    rows = draw(st.lists(row, min_size=1, max_size=3))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return make_call(rows, shape)
