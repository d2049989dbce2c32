"""The pool as the schedule sees it: its pages, who holds them, who may lose them, and what can ever fit."""

from collections.abc import Callable
from dataclasses import dataclass

from flora.serve.engine.schedule.eviction import Eviction
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.prefix import PrefixCache
from flora.serve.engine.schedule.residency import Residency
from flora.serve.engine.schedule.room import Room
from flora.serve.engine.schedule.slots import Slots


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """One pool, and the parts that give its pages and take them back. None of them knows the queue."""

    page_tokens: int
    packed_pages: Callable[[str], int | None]  # of a serving digest: the pages it needs, if it lies in host memory
    pages: PagePool
    eviction: Eviction
    residency: Residency
    prefixes: PrefixCache
    room: Room


def make_space(
    pages: PagePool,
    page_tokens: int,
    num_slots: int,
    packed_pages: Callable[[str], int | None],
    slot_pages: int | None = None,
) -> Space:
    """Space in which nothing is resident or cached yet.

    num_slots     adapters on the device at once
    packed_pages  of a serving digest: the pages it needs, if it lies packed in host memory
    slot_pages    set aside for each slot; None: adapters take the pages that they need
    """
    eviction = Eviction(pages)
    residency = Residency(Slots(pages, num_slots, slot_pages), eviction)
    return Space(
        page_tokens,
        packed_pages,
        pages,
        eviction,
        residency,
        PrefixCache(pages, eviction, page_tokens),
        Room(residency, packed_pages, page_tokens),
    )
