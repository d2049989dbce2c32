"""One order in which idle things leave the pool, whatever kind they are: the least recently used first.

A prefix's keys and values are of no use without their adapter, and whoever uses a prefix uses its adapter too, for at
least as long. So an adapter's prefixes leave before its pages do, and what is in use never does.
"""

from typing import Protocol

from flora.serve.engine.pages import PagePool


class Idle(Protocol):
    """Things of one kind that hold pages and that nobody needs now."""

    @property
    def idle_pages(self) -> int:
        """What evicting all of them would free."""
        ...

    @property
    def oldest_use(self) -> int | None:
        """When the least recently used one was last needed, by Eviction's clock; None if there is none."""
        ...

    def evict_oldest(self) -> None: ...


class Eviction:
    """Makes room by evicting idle adapters and idle prefixes in the one order of their last use."""

    def __init__(self, pages: PagePool) -> None:
        self._pages = pages
        self._kinds: list[Idle] = []
        self._now = 0

    def join(self, kind: Idle) -> None:
        self._kinds.append(kind)

    def tick(self) -> int:
        """A time that is later than all before."""
        self._now += 1
        return self._now

    @property
    def reclaimable(self) -> int:
        """Pages that are free, or can be made so without taking anything from a running sequence."""
        return self._pages.num_free + sum(kind.idle_pages for kind in self._kinds)

    def reclaim(self, num_pages: int) -> bool:
        """Evicts until `num_pages` are free, oldest use first; whether they are."""
        while self._pages.num_free < num_pages:
            oldest, oldest_use = None, None
            for kind in self._kinds:
                use = kind.oldest_use
                if use is not None and (oldest_use is None or use < oldest_use):
                    oldest, oldest_use = kind, use
            if oldest is None:
                return False
            oldest.evict_oldest()
        return True
