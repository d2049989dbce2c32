"""One order in which idle things leave the pool, whatever kind they are: least recently used first, weighed by use.

What proved useful counts as used later: adapters, and prefixes that a second request has found. Else prompts that
nobody repeats would fill the pool and drive adapters out: on the traces of tests/serve/engine/test_policies.py plain
recency needs 2 to 4 times the loads that a pool without prefixes does, and four turns of the pool 1 to 1.3 times.

A prefix's keys and values are of no use without their adapter, and whoever uses a prefix uses its adapter too, for at
least as long. So an adapter's prefixes leave before its pages do, and what is in use never does.
"""

from typing import Protocol

from flora.serve.engine.schedule.pages import PagePool

_PROVEN_TURNS = 4  # of the pool's pages through other hands, that what proved useful is kept longer


class Idle(Protocol):
    """Things of one kind that hold pages and that nobody needs now."""

    @property
    def idle_pages(self) -> int:
        """What evicting all of them would free."""
        ...

    @property
    def first_due(self) -> int | None:
        """The earliest `Eviction.due` among them; None if there are none."""
        ...

    def evict_first(self) -> None:
        """Evicts that one."""
        ...


class Eviction:
    """Makes room by evicting idle adapters and idle prefixes in the one order of their last use."""

    def __init__(self, pages: PagePool) -> None:
        self._pages = pages
        self._kinds: list[Idle] = []
        self._now = 0  # grows by one for every page and adapter that is let go
        self._credit = _PROVEN_TURNS * pages.num_usable

    def join(self, kind: Idle) -> None:
        self._kinds.append(kind)

    def due(self, *, is_proven: bool) -> int:
        """The place in the order of leaving that something has which is let go now; no other has the same."""
        self._now += 1
        return 2 * (self._now + self._credit) + 1 if is_proven else 2 * self._now

    @property
    def reclaimable(self) -> int:
        """Pages that are free, or can be made so without taking anything from a running sequence."""
        return self._pages.num_free + sum(kind.idle_pages for kind in self._kinds)

    def reclaim(self, num_pages: int) -> bool:
        """Evicts until `num_pages` are free; whether they are."""
        while self._pages.num_free < num_pages:
            first, first_due = None, None
            for kind in self._kinds:
                due = kind.first_due
                if due is not None and (first_due is None or due < first_due):
                    first, first_due = kind, due
            if first is None:
                return False
            first.evict_first()
        return True
