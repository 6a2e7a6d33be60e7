"""Who owns which page, against a model in plain Python."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specc.errors import PoolError
from specc.runtime.pages import RESERVED, PageAllocator, Placement, Rows, pages_needed, place, place_rings

FAST = settings(max_examples=150, deadline=None)
PAGE_SIZES = st.sampled_from([1, 2, 4, 16])


def pages_in(placement: Placement) -> int:
    """Different pages in use."""
    return len({page for row in placement.pages for page in row})


@FAST
@given(num_pages=st.integers(1, 12), data=st.data())
def test_allocator(num_pages: int, data: st.DataObject) -> None:
    allocator, uses = PageAllocator(num_pages), Counter[int]()
    for _ in range(data.draw(st.integers(0, 25))):
        in_use = sorted(uses)
        kind = data.draw(st.sampled_from(["take", "share", "release"] if in_use else ["take"]))
        free = num_pages - RESERVED - len(in_use)
        if kind == "take":
            count = data.draw(st.integers(0, free + 3))
            if count > free:
                sentence = f"{count} are needed, {free} are free, {count - free} are missing"
                with pytest.raises(PoolError, match=sentence):
                    allocator.take(count)
            else:
                taken = allocator.take(count)
                assert len(set(taken)) == len(taken) == count
                assert all(RESERVED <= page < num_pages for page in taken)
                assert not set(taken) & set(in_use), "a page that is in use was handed out"
                uses.update(taken)
        else:
            pages = data.draw(st.lists(st.sampled_from(in_use), unique=True))
            if kind == "share":
                assert allocator.share(pages) == pages
                uses.update(pages)
            else:
                allocator.release(pages)
                uses.subtract(pages)
                uses = +uses
        assert allocator.free == num_pages - RESERVED - len(uses)


@pytest.mark.parametrize("num_pages", [0, 1])
def test_a_pool_of_the_reserved_page_alone_has_nothing_to_give(num_pages: int) -> None:
    allocator = PageAllocator(num_pages)
    assert allocator.free == 0
    with pytest.raises(PoolError, match="1 are needed, 0 are free, 1 are missing"):
        allocator.take(1)


def test_a_page_is_free_when_its_last_use_is_released() -> None:
    allocator = PageAllocator(3)
    pages = allocator.take(2)
    allocator.share(pages[:1])
    allocator.release(pages)
    assert allocator.free == 1
    assert allocator.take(1) == pages[1:], "only the page without uses may be taken"
    allocator.release(pages[:1])
    assert allocator.take(1) == pages[:1]


def test_using_a_free_page_is_an_assertion() -> None:
    allocator = PageAllocator(3)
    pages = allocator.take(1)
    allocator.release(pages)
    with pytest.raises(AssertionError, match="page 1 is free"):
        allocator.release(pages)
    with pytest.raises(AssertionError, match="page 1 is free"):
        allocator.share(pages)
    with pytest.raises(AssertionError, match="page 0 is free"):
        allocator.release([0])


def draw_rows(data: st.DataObject, page_size: int) -> tuple[Rows, list[list[int]]]:
    """Rows of which several have the same prompt, with lengths around the ends of pages."""
    lens = st.integers(0, 3).flatmap(lambda k: st.sampled_from([k * page_size + d for d in (-1, 0, 1)]))
    kinds = data.draw(st.lists(st.tuples(st.integers(0, 1), lens.filter(lambda n: n > 0)), min_size=1))
    prompts = data.draw(st.lists(st.sampled_from([[word] * count for word, count in kinds]), min_size=1))
    return Rows.of(prompts, data.draw(st.integers(1, 3 * page_size))), prompts


def pages_of(tokens: int, page_size: int) -> int:
    return (tokens + page_size - 1) // page_size


@FAST
@given(page_size=PAGE_SIZES, data=st.data())
def test_rows(page_size: int, data: st.DataObject) -> None:
    rows, prompts = draw_rows(data, page_size)
    for row, leader in enumerate(rows.leaders):
        assert prompts.index(prompts[row]) == leader
        assert rows.prompt_lens[row] == len(prompts[row]) < rows.reach[row]
    assert [prompts[row] for row in rows.unique] == [
        prompt for row, prompt in enumerate(prompts) if prompt not in prompts[:row]
    ]


@FAST
@given(page_size=PAGE_SIZES, spare=st.integers(0, 3), data=st.data())
def test_placement(page_size: int, spare: int, data: st.DataObject) -> None:
    rows, prompts = draw_rows(data, page_size)
    needed = pages_needed(rows, page_size)
    allocator = PageAllocator(needed + RESERVED + spare)
    placement = place(allocator, rows, page_size)
    assert allocator.free == spare
    assert pages_in(placement) == needed
    owners = {page: [] for row in placement.pages for page in row}
    for row, pages in enumerate(placement.pages):
        assert len(pages) == len(set(pages)) == pages_of(rows.reach[row], page_size), "reach is not covered"
        for index, page in enumerate(pages):
            assert RESERVED <= page < needed + RESERVED + spare
            owners[page].append((row, index))
    for sharers in owners.values():
        if len(sharers) > 1:
            ((index, text),) = {(index, tuple(prompts[row])) for row, index in sharers}
            # Every token on the page is the prompt's, and none is its last, which is fed again.
            assert (index + 1) * page_size < len(text)
    check_copies(rows, placement, page_size)


def check_copies(rows: Rows, placement: Placement, page_size: int) -> None:
    """Each follower copies one page: that of its prompt's last token, from its leader, to one of its own."""
    wanted = []
    for row, leader in enumerate(rows.leaders):
        if row == leader:
            continue
        last = (rows.prompt_lens[row] - 1) // page_size
        wanted.append((placement.pages[leader][last], placement.pages[row][last]))
        assert placement.pages[row][:last] == placement.pages[leader][:last], "the prefix is not shared"
    assert sorted(placement.copies) == sorted(wanted)
    for _, target in placement.copies:
        assert sum(target in pages for pages in placement.pages) == 1, "a shared page is written"


@FAST
@given(page_size=PAGE_SIZES, data=st.data())
def test_placement_takes_all_or_nothing(page_size: int, data: st.DataObject) -> None:
    rows, _ = draw_rows(data, page_size)
    needed = pages_needed(rows, page_size)
    free = data.draw(st.integers(0, needed - 1))
    allocator = PageAllocator(free + RESERVED)
    sentence = f"{needed} are needed, {free} are free, {needed - free} are missing"
    with pytest.raises(PoolError, match=sentence):
        place(allocator, rows, page_size)
    assert allocator.free == free
    assert sorted(allocator.take(free)) == list(range(RESERVED, free + RESERVED))


@FAST
@given(page_size=PAGE_SIZES, data=st.data())
def test_released_row_by_row_every_page_comes_back_once(page_size: int, data: st.DataObject) -> None:
    rows, _ = draw_rows(data, page_size)
    allocator = PageAllocator(pages_needed(rows, page_size) + RESERVED)
    placement = place(allocator, rows, page_size)
    for row in data.draw(st.permutations(range(len(placement.pages)))):
        allocator.release(list(placement.pages[row]))
    assert allocator.free == pages_in(placement)


@pytest.mark.parametrize("pages", [1, 2, 3])
@pytest.mark.parametrize(("offset", "more"), [(-1, -1), (0, -1), (1, 0)])
def test_what_is_shared_at_the_end_of_a_page(pages: int, offset: int, more: int) -> None:
    """A full last page is copied, as it is written again; one token further it is shared."""
    page_size, shared = 4, pages + more
    rows = Rows.of([[7] * (pages * page_size + offset)] * 3, beyond=5)
    placement = place(PageAllocator(64), rows, page_size)
    first, *others = placement.pages
    for other in others:
        assert other[:shared] == first[:shared]
        assert not set(other[shared:]) & set(first)
    assert placement.copies == tuple((first[shared], other[shared]) for other in others)
    assert pages_needed(rows, page_size) == pages_in(placement) == 3 * len(first) - 2 * shared


def test_a_prompt_that_only_begins_alike_is_not_shared() -> None:
    rows = Rows.of([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], beyond=1)
    placement = place(PageAllocator(64), rows, 2)
    assert not set(placement.pages[0]) & set(placement.pages[1])
    assert placement.copies == ()


@FAST
@given(page_size=PAGE_SIZES, ring=st.integers(1, 6), data=st.data())
def test_rings(page_size: int, ring: int, data: st.DataObject) -> None:
    rows, _ = draw_rows(data, page_size)
    total = ring * len(rows.leaders) + RESERVED
    placement = place_rings(PageAllocator(total), rows, ring, page_size)
    own = [set(pages) for pages in placement.pages]
    assert sum(map(len, own)) == pages_in(placement), "rings are never shared"
    # What a pool of this many pages does not have, no row may use.
    assert set().union(*own) == set(range(RESERVED, pages_in(placement) + RESERVED))
    for row, pages in enumerate(placement.pages):
        assert len(pages) == pages_of(rows.reach[row], page_size)
        for index, page in enumerate(pages):
            assert page == pages[index % ring]
        assert len(own[row]) == min(ring, len(pages))
    for row, leader in enumerate(rows.leaders):
        copied = {source: target for source, target in placement.copies if target in own[row]}
        wanted = dict(zip(placement.pages[leader], placement.pages[row], strict=True))
        assert copied == ({} if row == leader else wanted)
    assert all(target in set().union(*own) for _, target in placement.copies)


def test_rings_take_all_or_nothing() -> None:
    rows = Rows.of([[1] * 9, [2] * 9], beyond=20)
    allocator = PageAllocator(5 + RESERVED)
    with pytest.raises(PoolError, match="6 are needed, 5 are free, 1 are missing"):
        place_rings(allocator, rows, 3, 4)
    assert allocator.free == 5
