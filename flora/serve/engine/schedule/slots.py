"""The slots that adapters lie in: rows of the kernels' tables, and the pages behind them, of one pool or set aside.

In a unified pool a slot has the pages that its adapter needs, and keys and values may have them when it leaves. A pool
with fixed slots sets the same number aside for each, for good, whoever lies there: how vLLM keeps adapters (max_loras
buffers of max_lora_rank), and S-LoRA's own ablation. It is here to be measured against.
"""

from flora.errors import OutOfPages, UsageError
from flora.serve.engine.schedule.pages import PagePool, Use


class Slots:
    """Free slots, and where an adapter's pages come from."""

    def __init__(self, pages: PagePool, num_slots: int, slot_pages: int | None = None) -> None:
        """slot_pages  of each slot, taken now and never given back; None: a slot has what its adapter needs"""
        self._pages = pages
        self._free = list(range(num_slots - 1, -1, -1))
        self._own = None if slot_pages is None else [pages.allocate(slot_pages, Use.ADAPTER) for _ in range(num_slots)]
        self._slot_pages = slot_pages
        self.num_slots = num_slots
        self.set_aside = num_slots * (slot_pages or 0)  # pages that keys and values never have
        self.num_shared = pages.num_usable - self.set_aside  # pages that they can have

    @property
    def are_fixed(self) -> bool:
        return self._own is not None

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def shared(self, num_pages: int) -> int:
        """How many of an adapter's pages keys and values could have in its place."""
        return 0 if self.are_fixed else num_pages

    def holds(self, num_pages: int) -> bool:
        """Whether an adapter of so many pages fits into a slot."""
        return self._slot_pages is None or num_pages <= self._slot_pages

    def check_holds(self, num_pages: int) -> None:
        """Raises OutOfPages if no slot ever holds an adapter of so many pages."""
        if not self.holds(num_pages):
            raise OutOfPages(
                f"the adapter needs {num_pages} pages of the pool and each slot has {self._slot_pages}",
                cause=f"{self.num_slots} slots of one size are set aside for adapters",
                fix="give the engine larger slots, or none: adapters then take the pages that they need",
                needed=num_pages,
            )

    def take(self, num_pages: int) -> tuple[int, list[int]]:
        """A free slot and its pages: as many, or all that the slot has."""
        assert self.holds(num_pages)
        slot = self._free.pop()
        return slot, self._pages.allocate(num_pages, Use.ADAPTER) if self._own is None else self._own[slot]

    def give_back(self, slot: int, pages: list[int]) -> None:
        if not self.are_fixed:
            self._pages.free(pages)
        self._free.append(slot)


def pages_of_slot(slot_bytes: int | None, num_slots: int, num_pages: int, page_bytes: int) -> int | None:
    """Pages of each of the slots that are set aside; None where none are.

    num_pages  of the pool, the null page among them
    Raises UsageError where they leave no page for keys and values.
    """
    if slot_bytes is None:
        return None
    slot_pages, usable = max(1, -(-slot_bytes // page_bytes)), num_pages - 1
    if num_slots * slot_pages >= usable:
        raise UsageError(
            f"{num_slots} slots of {slot_bytes} bytes do not fit into a pool of {num_pages * page_bytes} bytes",
            cause=f"each takes {slot_pages} pages of {page_bytes} bytes, together {num_slots * slot_pages}; "
            f"the pool has {usable}, and keys and values need one of them at least",
            fix=f"give it at most {max(0, usable - 1) // slot_pages} slots, or a larger pool",
        )
    return slot_pages
