import threading

import pytest
import torch

from flora.extract.workers import Crew, choose_crew, in_order


def test_results_come_in_the_order_of_the_items_though_work_ends_in_another():
    first_may_end = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert first_may_end.wait(timeout=30)
        else:
            first_may_end.set()
        return 10 * item

    assert list(in_order(Crew(2, 1), work, range(6))) == [0, 10, 20, 30, 40, 50]


def test_no_more_pairs_are_in_the_making_than_there_are_workers():
    lock, busy, most = threading.Lock(), 0, 0

    def work(item: int) -> None:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        torch.randn(200, 200) @ torch.randn(200, 200)
        with lock:
            busy -= 1

    list(in_order(Crew(2, 1), work, range(40)))

    assert most <= 2


def test_an_error_is_raised_at_its_turn_and_ends_the_run():
    started = []

    def work(item: int) -> int:
        started.append(item)
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(Crew(2, 1), work, range(1000))

    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        list(results)
    assert len(started) < 20


def test_the_threads_are_shared_out_and_given_back():
    before = torch.get_num_threads()

    seen = list(in_order(Crew(2, 1), lambda _: torch.get_num_threads(), range(4)))

    assert seen == [1, 1, 1, 1]
    assert torch.get_num_threads() == before


def test_large_matrices_are_worked_on_by_two_workers_at_most():
    assert choose_crew(largest_bytes=1 << 40).num_workers == 2
    assert choose_crew(largest_bytes=1 << 40, fewest=1).num_workers == 1
