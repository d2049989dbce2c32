"""Which adapters are on the device: integers only. Keys are serving digests, never names."""

from collections import OrderedDict
from collections.abc import Iterator

from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.slots import Slots
from flora.serve.request import AdapterTarget


class Resident:
    """One adapter on the device."""

    __slots__ = ("digest", "due", "label", "pages", "pinned", "rank", "retiring", "running", "slot")

    def __init__(self, target: AdapterTarget, slot: int, pages: list[int]) -> None:
        self.digest = target.serving_digest
        self.label = target.label  # what the request that brought it here called it; for messages
        self.slot = slot  # row of the kernels' tables
        self.pages = pages
        self.running = 0  # sequences that need it now
        self.pinned = False  # by request: stays when nobody needs it
        self.retiring = False  # goes as soon as nobody needs it
        self.rank = 0  # highest of its modules
        self.due = 0  # its place in the order of leaving, once nothing needs it


class Residency:
    """Places adapters into slots and their pages; those that nothing needs leave in the order of `eviction`."""

    def __init__(self, slots: Slots, eviction: Eviction) -> None:
        self.slots = slots
        self._eviction = eviction
        self._residents: dict[str, Resident] = {}
        self._idle: OrderedDict[str, Resident] = OrderedDict()  # what may be evicted, least recently used first
        self.idle_pages = 0  # that eviction could free for keys and values
        self.pinned_pages = 0  # that these cannot have until a request ends the pin
        self.num_pinned = 0
        self.num_running = 0  # adapters that running sequences need
        self._evicted: list[Resident] = []
        self.num_evictions = 0
        if not slots.are_fixed:  # else keys and values gain nothing when an adapter leaves
            eviction.join(self)

    def __iter__(self) -> Iterator[Resident]:
        return iter(self._residents.values())

    def __len__(self) -> int:
        return len(self._residents)

    def get(self, digest: str) -> Resident | None:
        return self._residents.get(digest)

    @property
    def num_pages(self) -> int:
        """Pages that are adapters' now: those of the resident ones, or of all slots where they are fixed."""
        return self.slots.set_aside or sum(len(resident.pages) for resident in self)

    def can_place(self, num_pages: int) -> bool:
        has_slot = self.slots.has_free or bool(self._idle)
        return has_slot and self.slots.holds(num_pages) and self.slots.shared(num_pages) <= self._eviction.reclaimable

    def place(self, target: AdapterTarget, num_pages: int) -> Resident:
        """The adapter, now resident and idle, with pages to write it to. The caller has asked can_place."""
        assert target.serving_digest not in self._residents
        if not self.slots.has_free:
            self.evict_first()
        self._eviction.reclaim(self.slots.shared(num_pages))
        resident = Resident(target, *self.slots.take(num_pages))
        self._residents[resident.digest] = resident
        self._rest(resident)
        return resident

    def acquire(self, digest: str) -> Resident:
        """A sequence starts to need the adapter."""
        resident = self._residents[digest]
        resident.running += 1
        self.num_running += resident.running == 1
        self._rouse(resident)
        return resident

    def release(self, digest: str) -> None:
        """A sequence no longer needs it. It stays until its pages are wanted, unless it was told to go."""
        resident = self._residents[digest]
        resident.running -= 1
        assert resident.running >= 0
        self.num_running -= not resident.running
        self._rest(resident)
        if resident.retiring and not resident.running:
            self.remove(digest)

    def pin(self, digest: str) -> None:
        """By request: it stays until it is retired."""
        resident = self._residents[digest]
        self._set_pinned(resident, True)
        self.keep(digest)
        self._rouse(resident)

    def keep(self, digest: str) -> None:
        """By request: it stays until its pages are wanted, though it may have been told to go when it is not needed."""
        self._residents[digest].retiring = False

    def retire(self, digest: str) -> None:
        """By request, or since it was not written: it goes now, or when the last sequence that needs it ends."""
        resident = self._residents[digest]
        self._set_pinned(resident, False)
        resident.retiring = True
        if not resident.running:
            self.remove(digest)

    @property
    def first_due(self) -> int | None:
        """See Idle.first_due."""
        for first in self._idle.values():
            return first.due
        return None

    def evict_first(self) -> None:
        """See Idle.evict_first."""
        resident = next(iter(self._idle.values()))
        self._rouse(resident)
        self._drop(resident)
        self.num_evictions += 1

    def remove(self, digest: str) -> None:
        """Gives the pages of an adapter that no sequence needs back."""
        resident = self._residents[digest]
        assert not resident.running
        self._rouse(resident)
        self._drop(resident)

    def take_evicted(self) -> list[Resident]:
        """Adapters that left since the last call: their slots' table rows are to be cleared."""
        evicted, self._evicted = self._evicted, []
        return evicted

    def _rest(self, resident: Resident) -> None:
        if not resident.running and not resident.pinned and resident.digest not in self._idle:
            resident.due = self._eviction.due(is_proven=True)
            self._idle[resident.digest] = resident
            self.idle_pages += self.slots.shared(len(resident.pages))

    def _rouse(self, resident: Resident) -> None:
        if self._idle.pop(resident.digest, None):
            self.idle_pages -= self.slots.shared(len(resident.pages))

    def _set_pinned(self, resident: Resident, pinned: bool) -> None:
        change = pinned - resident.pinned
        self.num_pinned += change
        self.pinned_pages += change * self.slots.shared(len(resident.pages))
        resident.pinned = pinned

    def _drop(self, resident: Resident) -> None:
        del self._residents[resident.digest]
        self.slots.give_back(resident.slot, resident.pages)
        self._evicted.append(resident)
