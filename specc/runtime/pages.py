"""Who owns which page of a pool. Host side; the device sees only the resulting slots."""

from __future__ import annotations

import dataclasses
import itertools

from specc.errors import PoolError

# Page 0 belongs to no row: padding reads and writes it.
RESERVED = 1


class PageAllocator:
    """Pages 1 .. num_pages - 1, each free or used by one row or several."""

    def __init__(self, num_pages: int) -> None:
        self._uses = [0] * num_pages
        # Taken from the end: the lowest first, so that a row's pages lie one behind the other.
        self._free = list(range(num_pages - 1, RESERVED - 1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """``count`` pages, used once each. Raises PoolError, taking none, if there are fewer."""
        if count > self.free:
            raise PoolError(
                f"the pool is out of pages: {count} are needed, {self.free} are free, "
                f"{count - self.free} are missing"
            )
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._uses[page] = 1
        return pages

    def share(self, pages: list[int]) -> list[int]:
        """Use pages that are in use once more; returns them."""
        for page in pages:
            assert self._uses[page] > 0, f"page {page} is free"
            self._uses[page] += 1
        return pages

    def release(self, pages: list[int]) -> None:
        """Give up one use of each page; those without any become free."""
        for page in pages:
            assert self._uses[page] > 0, f"page {page} is free"
            self._uses[page] -= 1
            if self._uses[page] == 0:
                self._free.append(page)


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a batch's rows need. ``leaders[b]``: the first row with row b's prompt, b itself if it is that.

    prompt_lens: tokens of each prompt; reach: tokens a row's slots must hold, the last block's included.
    """

    leaders: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    reach: tuple[int, ...]

    @classmethod
    def of(cls, prompts: list[list[int]], beyond: int) -> Rows:
        """Rows with these prompts (no padding), which grow by up to ``beyond`` tokens."""
        first: dict[tuple[int, ...], int] = {}
        leaders = tuple(first.setdefault(tuple(prompt), row) for row, prompt in enumerate(prompts))
        lens = tuple(map(len, prompts))
        return cls(leaders, lens, tuple(length + beyond for length in lens))

    @property
    def unique(self) -> tuple[int, ...]:
        """The rows whose prompts are read; the others share what they leave behind."""
        return tuple(row for row, leader in enumerate(self.leaders) if row == leader)

    def shared_pages(self, row: int, page_size: int) -> int:
        """Whole pages of the prompt that are never written again, which a row can share with its leader.

        The page with the prompt's last token is a row's own even if full: an assistant feeds that token
        once more.
        """
        return (self.prompt_lens[row] - 1) // page_size


@dataclasses.dataclass(frozen=True)
class Placement:
    """Each row's pages, in order of its tokens, and the pages to copy once the prompts have been read."""

    pages: tuple[tuple[int, ...], ...]
    copies: tuple[tuple[int, int], ...]


def pages_needed(rows: Rows, page_size: int, ring: int = 0) -> int:
    """Pages that ``place`` takes, or, given the pages of a ring, ``place_rings``."""
    if ring:
        return sum(min(ring, _pages(reach, page_size)) for reach in rows.reach)
    return sum(
        _pages(reach, page_size) - (rows.shared_pages(row, page_size) if leader != row else 0)
        for row, (leader, reach) in enumerate(zip(rows.leaders, rows.reach, strict=True))
    )


def place(allocator: PageAllocator, rows: Rows, page_size: int) -> Placement:
    """Give every row its pages: those of the prompt are shared, the partial last one is copied.

    Raises PoolError, with nothing taken, if the pages do not suffice.
    """
    own = allocator.take(pages_needed(rows, page_size))
    pages: list[tuple[int, ...]] = []
    copies: list[tuple[int, int]] = []
    for row, (leader, reach) in enumerate(zip(rows.leaders, rows.reach, strict=True)):
        shared: list[int] = []
        if leader != row:
            kept = rows.shared_pages(row, page_size)
            shared = allocator.share(list(pages[leader][:kept]))
            copies.append((pages[leader][kept], own[0]))
        count = _pages(reach, page_size) - len(shared)
        pages.append((*shared, *own[:count]))
        own = own[count:]
    return Placement(tuple(pages), tuple(copies))


def place_rings(allocator: PageAllocator, rows: Rows, ring: int, page_size: int) -> Placement:
    """Give every row up to ``ring`` pages that its tokens go round in; a ring is copied as a whole.

    Raises PoolError, with nothing taken, if the pages do not suffice.
    """
    counts = [_pages(reach, page_size) for reach in rows.reach]
    own = iter(allocator.take(pages_needed(rows, page_size, ring)))
    rings = [list(itertools.islice(own, min(ring, count))) for count in counts]
    pages = tuple(
        tuple(each[i % ring] for i in range(count)) for each, count in zip(rings, counts, strict=True)
    )
    copies = tuple(
        pair
        for row, leader in enumerate(rows.leaders)
        if leader != row
        for pair in zip(rings[leader], rings[row], strict=True)
    )
    return Placement(pages, copies)


def _pages(tokens: int, page_size: int) -> int:
    return -(-tokens // page_size)
