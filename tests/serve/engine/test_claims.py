"""Who loads takes its range of the arena at once; where there is none, the engine's thread makes room, in order."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore, get_ident

import pytest

from flora.errors import ServeError
from flora.serve.engine.loading.arena import Arena
from flora.serve.engine.loading.claims import Claims

PAGE = 4096


class Office:
    """Claims on an arena of four pages, and threads that make them."""

    def __init__(self) -> None:
        self.arena = Arena(4 * PAGE, pinned=False)
        self._is_waiting = Semaphore(0)
        self.claims = Claims(self.arena, self._is_waiting.release)
        self._threads = ThreadPoolExecutor()

    def take(self, num_pages: int) -> int:
        """What there is at once."""
        self.claims.expect()
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


def test_nobody_overtakes_those_who_wait_unless_no_room_can_be_made_for_them(office):
    office.take(3)
    large = office.wait(2)

    small = office.wait(1)  # though there is a gap
    office.claims.settle(no_room)

    assert small.result(timeout=60) == 3 * PAGE
    assert not large.done()
    office.arena.release(0, 3 * PAGE)
    office.claims.settle(no_room)
    assert large.result(timeout=60) == 0


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
    assert office.claims.take(PAGE) == 2 * PAGE
    office.claims.settle(make_room)
    assert office.arena.num_free == PAGE  # nobody else is expected


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
