"""Who loads takes its range of the arena at once; where there is none, the engine's thread makes room, in order."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from threading import Semaphore, get_ident

import pytest

from flora.errors import ServeError
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.claims import Claims

PAGE = 4096
NUM_AHEAD = 2  # loader processes


class Office:
    """Claims on an arena, of four pages where no test says more, and threads that make them."""

    def __init__(self, num_pages: int = 4) -> None:
        self.arena = Arena(num_pages * PAGE, pinned=False)
        self._is_waiting = Semaphore(0)
        self.claims = Claims(self.arena, num_ahead=NUM_AHEAD, on_waiting=self._is_waiting.release)
        self._threads = ThreadPoolExecutor()

    def take(self, num_pages: int) -> int:
        """What there is at once."""
        self.claims.expect()
        return self.take_expected(num_pages)

    def take_expected(self, num_pages: int) -> int:
        """What there is at once, for a load that is expected already."""
        return self._threads.submit(self.claims.take, num_pages * PAGE).result(timeout=60)

    def wait(self, num_pages: int) -> Future[int]:
        """A claim that waits."""
        self.claims.expect()
        start = self._threads.submit(self.claims.take, num_pages * PAGE)
        assert self._is_waiting.acquire(timeout=60)
        return start

    def close(self) -> None:
        self.claims.close()
        self._threads.shutdown()
        self.arena.close()


@pytest.fixture
def office() -> Iterator[Office]:
    office = Office()
    yield office
    office.close()


def no_room(num_bytes: int) -> bool:
    return False


def test_a_range_that_is_free_is_given_without_the_engine(office):
    assert [office.take(1), office.take(3)] == [0, PAGE]


def test_room_is_made_on_the_thread_that_settles_until_the_range_is_long_enough(office):
    held, made = [office.take(1) for _ in range(4)], []

    def make_room(num_bytes: int) -> bool:
        made.append((get_ident(), num_bytes))
        office.arena.release(held.pop(), PAGE)
        return True

    start = office.wait(2)
    office.claims.settle(make_room)

    assert start.result(timeout=60) == 2 * PAGE
    assert made == [(get_ident(), 2 * PAGE)] * 2


def test_nobody_overtakes_those_who_wait_so_that_what_becomes_free_is_enough_for_a_large_one_in_the_end(office):
    held = [office.take(1) for _ in range(4)]
    large, small = office.wait(2), office.wait(1)

    def becomes_free() -> None:
        office.arena.release(held.pop(), PAGE)
        office.claims.settle(no_room)

    becomes_free()
    assert office.arena.num_free == PAGE  # a gap, and the small one does not get it
    becomes_free()
    assert large.result(timeout=60) == 2 * PAGE
    assert office.arena.num_free == 0
    becomes_free()
    assert small.result(timeout=60) == PAGE


def test_room_is_made_ahead_for_loads_that_are_expected(office):
    held = [office.take(1) for _ in range(4)]

    def make_room(num_bytes: int) -> bool:
        for _ in range(num_bytes // PAGE):
            office.arena.release(held.pop(), PAGE)
        return True

    office.claims.expect()
    office.claims.expect()
    office.claims.settle(make_room)
    assert office.arena.num_free == 2 * PAGE
    office.claims.settle(make_room)
    assert office.arena.num_free == 2 * PAGE  # which is enough

    office.claims.forgo()  # that load failed
    assert office.take_expected(1) == 2 * PAGE
    office.claims.settle(make_room)
    assert office.arena.num_free == PAGE  # nobody else is expected


def test_room_made_ahead_is_for_the_next_load_of_each_process_and_of_the_mean_size_of_recent_ones():
    made = []
    with closing(Office(8)) as office:
        ranges = [(office.take(num_pages), num_pages) for num_pages in (1, 1, 1, 5)]

        def make_room(num_bytes: int) -> bool:
            made.append(num_bytes)
            start, num_pages = ranges.pop()
            office.arena.release(start, num_pages * PAGE)
            return True

        for _ in range(5):
            office.claims.expect()
            office.claims.settle(make_room)
        assert made == [2 * PAGE]  # for the first, and what that freed is enough for a second

        for _ in range(5):
            office.claims.forgo()
        for _ in range(100):
            office.arena.release(office.take(1), PAGE)
        office.take(5)
        assert made == [2 * PAGE]  # none is expected
        for _ in range(5):
            office.claims.expect()
        office.claims.settle(make_room)
        assert len(made) == 2
        assert NUM_AHEAD * PAGE < made[-1] < NUM_AHEAD * 2 * PAGE  # one of 5 pages among many of 1


def test_a_large_load_before_small_ones_empties_no_cache():
    with closing(Office(64)) as office:
        cached = [office.take(1) for _ in range(48)]

        def make_room(num_bytes: int) -> bool:
            before = len(cached)
            while cached and before - len(cached) < num_bytes / PAGE:
                office.arena.release(cached.pop(), PAGE)
            return len(cached) < before

        office.take(8)
        for _ in range(8):  # small ones, as it turns out, for which there is room
            office.claims.expect()
            office.claims.settle(make_room)
        for _ in range(8):
            office.take_expected(1)
            office.claims.settle(make_room)

        assert len(cached) >= 46


def test_what_is_longer_than_the_arena_is_refused_and_nobody_waits_behind_it(office):
    with pytest.raises(ServeError, match="20480 bytes does not fit the 16384"):
        office.take(5)

    assert office.take(4) == 0


def test_whoever_waits_at_the_end_is_told_and_so_is_whoever_comes_later(office):
    office.take(4)
    waiting = office.wait(1)

    office.claims.close()

    with pytest.raises(ServeError, match="shutting down"):
        waiting.result(timeout=60)
    with pytest.raises(ServeError, match="shutting down"):
        office.take(1)
