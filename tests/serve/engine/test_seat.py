"""The place of a loader process: who ends is followed, and who only ends is not followed for ever."""

from collections.abc import Callable

import pytest

from flora.errors import ServeError
from flora.serve.engine.loading.seat import MAX_USELESS, Seat


class Mortal:
    """A loader process, as far as its seat looks at it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.is_alive = True
        self.has_answered = False

    def bury(self) -> str:
        assert not self.is_alive
        return "exit code 7"

    def end(self) -> None:
        self.is_alive = False


@pytest.fixture
def born() -> list[Mortal]:
    return []


@pytest.fixture
def start(born: list[Mortal]) -> Callable[[], Mortal]:
    def start() -> Mortal:
        born.append(Mortal(pid=len(born)))
        return born[-1]

    return start


def test_who_ends_is_followed_and_the_log_says_how_it_ended(born, start, caplog):
    seat = Seat(start)
    seat.fill()
    assert seat.child is born[0]  # who lives stays

    born[0].is_alive = False
    assert not seat.is_filled
    seat.fill()

    assert seat.is_filled
    assert seat.child is born[1]
    assert caplog.messages == ["loader process ended pid=0: exit code 7"]


def test_after_three_in_a_row_without_an_answer_nobody_follows(born, start):
    seat = Seat(start)
    for _ in range(10):
        born[-1].is_alive = False
        seat.fill()

    assert len(born) == MAX_USELESS
    assert seat.is_given_up
    with pytest.raises(ServeError, match="no loader process is left"):
        _ = seat.child


def test_those_that_have_answered_are_followed_however_often(born, start):
    seat = Seat(start)
    for _ in range(10):
        born[-1].has_answered = True
        born[-1].is_alive = False
        seat.fill()

    assert seat.child is born[10]


def test_a_system_that_starts_no_process_is_not_asked_for_ever(born, start):
    seat = Seat(start)
    tried = []

    def refuse() -> Mortal:
        tried.append(None)
        raise BlockingIOError(11, "Resource temporarily unavailable")

    seat._start = refuse
    born[0].has_answered = True
    born[0].is_alive = False
    for _ in range(10):
        seat.fill()

    assert len(tried) <= MAX_USELESS
    assert seat.is_given_up


def test_nobody_follows_who_was_ended(born, start):
    seat = Seat(start)

    seat.end()
    seat.fill()

    assert len(born) == 1
    assert not seat.is_given_up
