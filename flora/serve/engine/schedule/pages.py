"""The pool's one allocator: page ids, integers only. KV grows from the low end, adapters from the high one."""

from collections.abc import Iterable
from enum import IntEnum
from heapq import heapify, heappop, heappush

from flora.errors import OutOfPages

NULL_PAGE = 0  # never handed out: what unused entries of block tables and cell tables point to


class Use(IntEnum):
    """What a page holds."""

    FREE = 0
    KV = 1
    ADAPTER = 2
    NULL = 3


class PagePool:
    """Which pages are free, and what the others hold.

    Runs of neighbouring pages make an adapter's load few copies, which is why the two uses come from either end;
    nothing else depends on which pages are given.
    """

    def __init__(self, num_pages: int, *, remember_freed: bool = False) -> None:
        self.num_pages = num_pages
        self._use = bytearray(num_pages)
        self._use[NULL_PAGE] = Use.NULL
        self._counts = {Use.FREE: num_pages - 1, Use.KV: 0, Use.ADAPTER: 0}
        # Two heaps over the same free pages. A page taken through one stays in the other until it comes up there, or
        # is free again; `_queued` keeps it from standing in one heap twice, so neither outgrows the pool.
        self._heaps: dict[Use, list[int]] = {
            Use.KV: list(range(1, num_pages)),
            Use.ADAPTER: [-page for page in range(1, num_pages)],
        }
        heapify(self._heaps[Use.ADAPTER])
        self._queued = {use: bytearray(b"\1") * num_pages for use in self._heaps}
        self._freed: list[int] | None = [] if remember_freed else None

    @property
    def num_usable(self) -> int:
        """Pages that can ever be handed out."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return self._counts[Use.FREE]

    def count(self, use: Use) -> int:
        return self._counts[use]

    def use(self, page: int) -> Use:
        return Use(self._use[page])

    def allocate(self, count: int, use: Use) -> list[int]:
        """`count` pages for `use`, now owned by the caller. Raises OutOfPages and takes none if fewer are free."""
        if count > self.num_free:
            raise OutOfPages(f"{count} pages are asked for and {self.num_free} are free", needed=count)
        heap, queued, sign = self._heaps[use], self._queued[use], 1 if use is Use.KV else -1
        pages: list[int] = []
        while len(pages) < count:
            page = sign * heappop(heap)
            queued[page] = 0
            if self._use[page] == Use.FREE:
                self._use[page] = use
                pages.append(page)
        self._counts[Use.FREE] -= count
        self._counts[use] += count
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Takes back pages that their owner no longer reads or writes."""
        for page in pages:
            use = self.use(page)
            assert use in self._heaps, f"page {page} is freed and is {use.name}"
            self._use[page] = Use.FREE
            self._counts[use] -= 1
            self._counts[Use.FREE] += 1
            for side, sign in ((Use.KV, 1), (Use.ADAPTER, -1)):
                if not self._queued[side][page]:
                    self._queued[side][page] = 1
                    heappush(self._heaps[side], sign * page)
            if self._freed is not None:
                self._freed.append(page)

    def take_freed(self) -> list[int]:
        """Pages freed since the last call, for whoever poisons them; empty unless `remember_freed`."""
        if not self._freed:
            return []
        freed, self._freed = self._freed, []
        return freed
