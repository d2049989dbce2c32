"""Which adapters stay: those in use and those pinned; of the others the most recently used."""

import pytest

from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.pages import PagePool, Use
from flora.serve.engine.schedule.residency import Residency
from flora.serve.engine.schedule.slots import Slots
from flora.serve.request import AdapterTarget


def target(digest: str) -> AdapterTarget:
    return AdapterTarget(serving_digest=digest, version_digest=f"version of {digest}", label=digest)


@pytest.fixture
def pages() -> PagePool:
    return PagePool(11)  # ten to hand out


@pytest.fixture
def eviction(pages: PagePool) -> Eviction:
    return Eviction(pages)


@pytest.fixture
def residency(pages: PagePool, eviction: Eviction) -> Residency:
    return Residency(Slots(pages, num_slots=3), eviction)


def digests(residency: Residency) -> set[str]:
    return {resident.digest for resident in residency}


def test_the_least_recently_used_makes_room(residency):
    for digest in "abc":
        residency.place(target(digest), 3)
    residency.acquire("a")
    residency.release("a")  # used last

    assert residency.can_place(4)
    residency.place(target("d"), 4)

    assert digests(residency) == {"a", "c", "d"}
    assert residency.num_evictions == 1


def test_an_adapter_in_use_is_never_evicted(residency, eviction):
    residency.place(target("a"), 4)
    residency.acquire("a")
    residency.place(target("b"), 4)

    assert not residency.can_place(7)
    assert eviction.reclaim(6)
    assert not eviction.reclaim(7)
    assert digests(residency) == {"a"}


def test_a_pinned_adapter_is_never_evicted(residency, eviction):
    residency.place(target("a"), 4)
    residency.pin("a")

    assert not eviction.reclaim(7)
    assert digests(residency) == {"a"}


def test_a_pinned_adapter_stays_pinned_when_its_last_sequence_ends(residency, eviction):
    residency.place(target("a"), 4)
    residency.pin("a")
    residency.acquire("a")
    residency.release("a")

    assert not eviction.reclaim(7)


def test_a_slot_is_room_too(residency):
    for digest in "abc":
        residency.place(target(digest), 1)
    residency.acquire("a")

    residency.place(target("d"), 1)

    assert digests(residency) == {"a", "c", "d"}
    assert len({resident.slot for resident in residency}) == 3


def test_without_an_idle_adapter_there_is_no_slot(residency):
    for digest in "abc":
        residency.place(target(digest), 1)
        residency.acquire(digest)

    assert not residency.can_place(1)


def test_a_retired_adapter_goes_at_once_when_idle(residency, pages):
    residency.place(target("a"), 4)
    residency.pin("a")

    residency.retire("a")

    assert digests(residency) == set()
    assert pages.num_free == pages.num_usable


def test_a_retired_adapter_in_use_goes_with_its_last_sequence(residency, pages):
    residency.place(target("a"), 4)
    residency.acquire("a")
    residency.acquire("a")

    residency.retire("a")
    residency.release("a")
    assert digests(residency) == {"a"}
    residency.release("a")

    assert digests(residency) == set()
    assert pages.count(Use.ADAPTER) == 0


def test_who_left_is_told_once(residency):
    residency.place(target("a"), 4)
    residency.retire("a")

    assert [resident.digest for resident in residency.take_evicted()] == ["a"]
    assert residency.take_evicted() == []


def test_an_adapter_without_modules_takes_a_slot_and_no_page(residency, pages):
    resident = residency.place(target("empty"), 0)

    assert resident.pages == []
    assert pages.num_free == pages.num_usable
