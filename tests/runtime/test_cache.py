"""Pool, tables and blocks: what a row wrote is what it reads, whatever its neighbours do."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specc.runtime.cache import CacheShapes, LayerShape, PagedCache
from specc.runtime.pages import Rows
from specc.runtime.recurrent import RecurrentPlan

FAST = settings(max_examples=60, deadline=None)
PAGE_SIZES = st.sampled_from([1, 4, 64])
FP8 = torch.float8_e4m3fn
SHAPE = LayerShape(2, 4, 3, torch.float32)
CPU = torch.device("cpu")


def pool(
    rows: Rows,
    page_size: int,
    windows: Sequence[int] = (0,),
    chunk: int = 4,
    dtype: torch.dtype | None = None,
) -> PagedCache:
    shapes = CacheShapes(dict.fromkeys(range(len(windows)), SHAPE), {}, len(windows))
    plan = RecurrentPlan(ahead=chunk)
    return PagedCache(shapes, windows, rows, CPU, page_size=page_size, chunk=chunk, plan=plan, dtype=dtype)


def texts(*lens: int) -> list[list[int]]:
    """Prompts of these lengths, all different."""
    return [[row] * count for row, count in enumerate(lens)]


def write(cache: PagedCache, lens: Tensor, q_len: int, layer: int = 0) -> tuple[Tensor, ...]:
    """Feed a random block behind these lengths; returns its keys and values, and all that can be read."""
    cache.rows.seq_lens.copy_(lens)
    keys = torch.randn(len(lens), SHAPE.heads, q_len, SHAPE.k_dim)
    values = torch.randn(len(lens), SHAPE.heads, q_len, SHAPE.v_dim)
    return keys, values, *cache.block(cache.rows.positions(q_len)).update(keys, values, layer)


def read(cache: PagedCache, layer: int = 0) -> tuple[Tensor, Tensor]:
    """All rows' keys and values; what is fed is padding, which goes to page 0."""
    _, _, keys, values = write(cache, torch.full_like(cache.rows.seq_lens, -1), 1, layer)
    return keys, values


class Written:
    """What each row has written last at each position, and so has to read."""

    def __init__(self, cache: PagedCache, layer: int = 0, dtype: torch.dtype = torch.float32) -> None:
        rows, capacity = len(cache.rows.seq_lens), cache.rows.capacity
        self.keys = torch.zeros(rows, SHAPE.heads, capacity, SHAPE.k_dim)
        self.values = torch.zeros(rows, SHAPE.heads, capacity, SHAPE.v_dim)
        self._cache, self._layer, self._dtype = cache, layer, dtype

    def write(self, lens: Tensor, q_len: int) -> tuple[Tensor, Tensor]:
        """Write to the cache and take it down; returns what the cache gives back."""
        keys, values, *got = write(self._cache, lens, q_len, self._layer)
        for kept, block in ((self.keys, keys), (self.values, values)):
            stored = block.to(self._dtype).float()
            for row in range(len(lens)):
                for j in range(q_len):
                    position = int(lens[row]) + j
                    if 0 <= position < kept.shape[2]:
                        kept[row, :, position] = stored[row, :, j]
        return got[0], got[1]

    def check(self, keys: Tensor, values: Tensor, row: int, positions: slice) -> None:
        assert torch.equal(keys[row, :, positions], self.keys[row, :, positions])
        assert torch.equal(values[row, :, positions], self.values[row, :, positions])


@pytest.mark.parametrize("dtype", [None, FP8])
@FAST
@given(page_size=PAGE_SIZES, data=st.data())
def test_pool_rows_never_touch_each_other(
    dtype: torch.dtype | None, page_size: int, data: st.DataObject
) -> None:
    """Random blocks behind random lengths, padding included: every row reads back what it wrote."""
    lens = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    rows = Rows.of(texts(*lens), beyond=data.draw(st.integers(4, 10)))
    cache = pool(rows, page_size, dtype=dtype)
    written = Written(cache, dtype=dtype or torch.float32)
    for _ in range(4):
        q_len = data.draw(st.integers(1, 4))
        starts = [data.draw(st.integers(-q_len, reach - q_len)) for reach in rows.reach]
        keys, values = written.write(torch.tensor(starts), q_len)
        for row, reach in enumerate(rows.reach):
            written.check(keys, values, row, slice(0, reach))
    layer = cache.layers[0]
    assert (layer.keys.dtype, layer.values.dtype) == (dtype or torch.float32,) * 2
    used = {0, *cache.rows.req_to_token[0].flatten().tolist()}
    for pages in layer.pools:
        flat = pages.float().flatten(0, 1)
        assert flat.isfinite().all()
        untouched = [slot for slot in range(len(flat)) if slot not in used]
        assert not flat[untouched].any(), "a slot that no row and no padding has was written"


@FAST
@given(page_size=PAGE_SIZES, windows=st.sampled_from([(0,), (0, 5)]), data=st.data())
def test_padding_goes_to_the_page_that_no_row_owns(
    page_size: int, windows: tuple[int, ...], data: st.DataObject
) -> None:
    lens = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    cache = pool(Rows.of(texts(*lens), beyond=40), page_size, windows)
    for table in cache.rows.req_to_token.values():
        for row, reach in enumerate(lens):
            assert (table[row, : reach + 40] >= page_size).all(), "a row's slot lies on page 0"
    starts = torch.tensor([data.draw(st.integers(-9, -1)) for _ in lens])
    q_len = data.draw(st.integers(1, 4))
    for index, layer in cache.layers.items():
        slots = cache.rows.slots(starts[:, None] + torch.arange(q_len))[layer.window]
        padding = (starts[:, None] + torch.arange(q_len) < 0).flatten()
        assert (slots[padding] == 0).all()
        assert (slots[~padding] >= page_size).all()
        keys, _, _, _ = write(cache, starts, q_len, index)
        flat = layer.keys.flatten(0, 1)
        changed = set(flat.flatten(1).any(dim=1).nonzero().flatten().tolist())
        assert changed == set(slots.tolist())
        assert flat.isfinite().all()
        tokens = keys.transpose(1, 2).flatten(0, 1)
        assert torch.equal(flat[slots[~padding]], tokens[~padding])


@FAST
@given(page_size=st.sampled_from([1, 2, 4]), data=st.data())
def test_a_ring_always_holds_the_window_behind_a_block(page_size: int, data: st.DataObject) -> None:
    """Blocks of up to C tokens, of which any number is kept: the last W - 1 + C written can be read."""
    window, chunk = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    lens = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    rows = Rows.of(texts(*lens), beyond=chunk + data.draw(st.integers(0, 50)))
    cache = pool(rows, page_size, (window,), chunk)
    layer, written = cache.layers[0], Written(cache)
    used_ring = layer.window == window
    if used_ring:
        assert layer.keys.shape[0] * page_size < 1 + len(lens) * (cache.rows.capacity + page_size)
    now, highest = torch.zeros(len(lens), dtype=torch.int64), torch.zeros(len(lens), dtype=torch.int64)
    last = torch.tensor(rows.reach)
    for _ in range(40):
        q_len = data.draw(st.integers(1, chunk))
        if bool((now + q_len > last).any()):
            break
        keys, values = written.write(now, q_len)
        highest = torch.maximum(highest, now + q_len)
        for row, top in enumerate(highest.tolist()):
            written.check(keys, values, row, slice(max(0, top - (window - 1 + chunk)), top))
        now = now + torch.tensor([data.draw(st.integers(0, q_len)) for _ in lens])


def test_a_short_row_beside_a_long_one_has_a_ring_of_its_own() -> None:
    """The short row does not fill its ring; the long row's pages are still those of the pool."""
    rows = Rows.of(texts(1, 30), beyond=4)
    cache = pool(rows, 4, (5,), chunk=4)
    layer, written = cache.layers[0], Written(cache)
    assert layer.window == 5
    assert int(cache.rows.req_to_token[5].max()) < layer.keys.shape[0] * 4
    for start in range(0, 28, 4):
        starts = torch.tensor([0, start])
        keys, values = written.write(starts, 4)
        written.check(keys, values, 0, slice(0, 4))
        written.check(keys, values, 1, slice(max(0, start - 4), start + 4))


def test_windows_have_tables_and_pools_of_their_own() -> None:
    """Rings that are no shorter than the longest row are plain pages."""
    cache = pool(Rows.of(texts(5, 60), beyond=4), 4, (0, 3, 6, 500, 0), chunk=4)
    assert [layer.window for layer in cache.layers.values()] == [0, 3, 6, 0, 0]
    assert set(cache.rows.req_to_token) == {0, 3, 6}
    assert {table.shape for table in cache.rows.req_to_token.values()} == {(2, cache.rows.capacity)}
    sizes = [layer.keys.shape[0] for layer in cache.layers.values()]
    assert sizes[0] == sizes[3] == sizes[4]
    assert sizes[1] <= sizes[2] < sizes[0]


@FAST
@given(page_size=PAGE_SIZES, fp8=st.booleans(), data=st.data())
def test_rows_with_the_same_prompt(page_size: int, fp8: bool, data: st.DataObject) -> None:
    """One row reads the prompt, all have it; then each goes on by itself from the last token on."""
    dtype = FP8 if fp8 else None
    lens = data.draw(st.lists(st.integers(1, 18), min_size=1, max_size=2))
    kinds = texts(*lens)
    chosen = data.draw(st.lists(st.integers(0, len(lens) - 1), min_size=1, max_size=5))
    window, chunk = 5, 4
    rows = Rows.of([kinds[kind] for kind in chosen], beyond=30)
    cache = pool(rows, page_size, (0, window), chunk, dtype)
    first = [chosen[row] for row in rows.unique]
    assert cache.reader_of_row.tolist() == [first.index(kind) for kind in chosen]
    assert len(cache.rows.seq_lens) == len(first)

    prompts = [Written(cache, layer, dtype or torch.float32) for layer in (0, 1)]
    for start in range(0, 20, chunk):
        starts = torch.tensor([start - 20 + lens[kind] for kind in first])
        for each in prompts:
            each.write(starts, chunk)
    cache.share_prompts(torch.tensor(rows.prompt_lens))
    assert len(cache.rows.seq_lens) == len(chosen)

    everyone = [Written(cache, layer, dtype or torch.float32) for layer in (0, 1)]
    starts = torch.tensor([lens[kind] - 1 for kind in chosen])
    for layer, (prompt, mine) in enumerate(zip(prompts, everyone, strict=True)):
        mine.keys, mine.values = (kept[cache.reader_of_row] for kept in (prompt.keys, prompt.values))
        behind = window - 1 + chunk if cache.layers[layer].window else 1000
        keys, values = read(cache, layer)
        for row, kind in enumerate(chosen):
            mine.check(keys, values, row, slice(max(0, lens[kind] - behind), lens[kind]))
        for step in range(2):
            keys, values = mine.write(starts + step * chunk, chunk)
            for row, kind in enumerate(chosen):
                end = lens[kind] - 1 + (step + 1) * chunk
                mine.check(keys, values, row, slice(max(0, end - behind), end))


@FAST
@given(page_size=PAGE_SIZES, data=st.data())
def test_beyond_the_capacity_no_other_row_is_touched(page_size: int, data: st.DataObject) -> None:
    lens = data.draw(st.lists(st.integers(1, 12), min_size=2, max_size=4))
    rows = Rows.of(texts(*lens), beyond=4)
    cache = pool(rows, page_size)
    written = Written(cache)
    for start in range(0, max(rows.reach), 4):
        written.write(torch.tensor([min(start, reach - 4) for reach in rows.reach]), 4)
    guilty = data.draw(st.integers(0, len(lens) - 1))
    starts = torch.full((len(lens),), -4)
    starts[guilty] = cache.rows.capacity - data.draw(st.integers(-5, 2))
    _, _, keys, values = write(cache, starts, 4)
    for row, reach in enumerate(rows.reach):
        # The one row may lose what lies at the very end of the table.
        end = min(reach, int(starts[row]), cache.rows.capacity - 1) if row == guilty else reach
        written.check(keys, values, row, slice(0, end))
    assert all(pages.isfinite().all() for pages in cache.layers[0].pools)


def test_what_an_fp8_pool_cannot_hold_saturates() -> None:
    cache = pool(Rows.of(texts(3), beyond=4), 4, dtype=FP8)
    states = torch.tensor([1e6, -1e6, 500.0, -0.1]).expand(1, SHAPE.heads, 2, 4)
    for start in (-2, 0):
        cache.rows.seq_lens.fill_(start)
        keys, values = cache.block(cache.rows.positions(2)).update(states, states[..., :3], 0)
    rounded = torch.tensor(-0.1).to(FP8).float()
    expected = torch.stack([torch.tensor(448.0), torch.tensor(-448.0), torch.tensor(448.0), rounded])
    assert torch.equal(keys[0, :, :2], expected.expand(2, 2, 4))
    assert torch.equal(values[0, :, :2], expected[:3].expand(2, 2, 3))
    assert keys.dtype == torch.float32
    assert all(pages.float().isfinite().all() for pages in cache.layers[0].pools)


@pytest.mark.parametrize(("reach", "capacity"), [(1, 8), (4, 8), (8, 8), (9, 12)])
def test_a_table_is_never_a_single_page_long(reach: int, capacity: int) -> None:
    """A graph captured for a table of one page would serve no other."""
    cache = pool(Rows.of(texts(1), beyond=reach - 1), 4)
    assert cache.rows.capacity == capacity
    assert cache.layers[0].keys.shape[0] == 1 + -(-reach // 4), "pages are only those that are needed"


def test_a_table_of_short_rows_has_rings_only_where_they_save_pages() -> None:
    """The table's least width is no reason for a ring."""
    cache = pool(Rows.of(texts(1), beyond=2), 4, (1,), chunk=1)
    assert [layer.window for layer in cache.layers.values()] == [0]
