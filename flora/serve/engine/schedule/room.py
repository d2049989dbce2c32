"""What can ever fit: the arithmetic by which requests, loads and pins are refused when they arrive.

Adapters pinned by request hold their pages for good; everything else can be preempted or evicted. So a request can
always finish if its pages at its longest and its adapter fit beside the pinned ones, and a pin is granted only while
that stays true for every request that is here.
"""

from collections.abc import Callable, Iterable

from flora.errors import OutOfPages
from flora.serve.engine.schedule.residency import Residency
from flora.serve.engine.schedule.sequence import Sequence


class Room:
    """Counts pages; holds none."""

    def __init__(self, residency: Residency, packed_pages: Callable[[str], int | None], page_tokens: int) -> None:
        """packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory"""
        self._residency = residency
        self._slots = residency.slots
        self._packed_pages = packed_pages
        self._page_tokens = page_tokens

    def for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def for_adapter(self, digest: str | None) -> int | None:
        """Pages that the adapter takes, as far as that is known yet; 0 for the base."""
        if digest is None:
            return 0
        resident = self._residency.get(digest)
        return len(resident.pages) if resident else self._packed_pages(digest)

    def check_sequence(self, sequence: Sequence, adapter_pages: int) -> None:
        """Raises OutOfPages if the sequence could not finish even alone beside the pinned adapters."""
        self._slots.check_holds(adapter_pages)
        whole, adapter_pages = self.for_tokens(sequence.max_len), self._slots.shared(adapter_pages)
        pinned = self._pinned(without=sequence.digest)
        if whole + adapter_pages + pinned > self._slots.num_shared:
            raise OutOfPages(
                f"the request needs {whole + adapter_pages} pages of the pool and {self._slots.num_shared - pinned} "
                "can be had",
                cause=f"{whole} pages for {sequence.max_len} tokens, {adapter_pages} for the adapter, "
                f"and {pinned} are taken by pinned adapters",
                fix="ask for fewer tokens, unload pinned adapters, or give the server a larger pool",
                needed=whole + adapter_pages,
            )

    def check_adapter(self, digest: str, num_pages: int) -> None:
        """Raises OutOfPages if an adapter would find no room even beside nothing but pinned adapters."""
        self._slots.check_holds(num_pages)
        pinned = self._pinned(without=digest)
        if pinned + self._slots.shared(num_pages) > self._slots.num_shared:
            raise OutOfPages(
                f"the adapter needs {num_pages} pages of the pool and {self._slots.num_shared - pinned} can be had",
                cause=f"{pinned} of {self._slots.num_shared} pages are taken by pinned adapters",
                fix="unload a pinned adapter, or give the server a larger pool",
                needed=num_pages,
            )

    def check_pin(self, digest: str, num_pages: int, live: Iterable[Sequence]) -> None:
        """Raises OutOfPages if a live sequence could not finish once this adapter holds its pages for good."""
        pinned = self._pinned(without=digest) + self._slots.shared(num_pages)
        largest = max((self._need_beside(sequence, digest) for sequence in live), default=1)
        resident = self._residency.get(digest)
        num_pinned = self._residency.num_pinned + (not (resident and resident.pinned))
        if pinned + largest > self._slots.num_shared or num_pinned >= self._slots.num_slots:
            raise OutOfPages(
                f"pinning {num_pages} more pages leaves too few for the requests that are here",
                cause=f"{pinned} of {self._slots.num_shared} pages would be pinned, {num_pinned} of "
                f"{self._slots.num_slots} adapter slots, and the largest request needs {largest} pages",
                fix="unload another adapter, or load this one without a pin",
                needed=num_pages,
            )

    def _pinned(self, without: str | None) -> int:
        """Pages of adapters pinned by request."""
        own = self._residency.get(without) if without else None
        return self._residency.pinned_pages - (self._slots.shared(len(own.pages)) if own and own.pinned else 0)

    def _need_beside(self, sequence: Sequence, pinned_digest: str) -> int:
        """Pages that the sequence needs apart from adapters that are pinned, or are about to be."""
        resident = self._residency.get(sequence.digest) if sequence.digest else None
        shared = sequence.digest == pinned_digest or (resident is not None and resident.pinned)
        own = 0 if shared else self._slots.shared(self.for_adapter(sequence.digest) or 0)
        return self.for_tokens(sequence.max_len) + own
