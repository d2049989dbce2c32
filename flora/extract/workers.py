"""Several matrices at once, each on few threads, which is faster than all threads on one; on a GPU, each on a stream.

Where each worker has one thread (1 or 2 threads in all, or matrices small enough for one worker per thread), results
do not depend on the number of threads. With more threads each, BLAS may sum in another order, and last bits differ.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

GPU_WORKERS = 6  # one reads files at 5 to 8 GB/s, and waits for the device at every small factorization
GPU_SHARE = 0.8  # of its free memory that workers may hold

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Crew:
    """How the threads are shared out. Of two workers one reads the next pair while the other computes."""

    num_workers: int
    threads_each: int


def choose_crew(largest_bytes: int, *, fewest: int = 2, memory_bytes: int = 512 << 20) -> Crew:
    """As many workers as fit into `memory_bytes`, or else `fewest`, and the process's threads shared out.

    largest_bytes  what one worker holds at most
    """
    num_threads = torch.get_num_threads()
    num_workers = max(fewest, min(num_threads, memory_bytes // max(1, largest_bytes)))
    return Crew(num_workers, max(1, num_threads // num_workers))


def choose_gpu_crew(largest_bytes: int, free_bytes: int) -> Crew:
    """As many workers as feed a GPU, on half of the cores, since the files are hashed on the other half.

    largest_bytes  of the device's memory, that one worker holds at most;  free_bytes  of it
    """
    num_cores = len(os.sched_getaffinity(0))
    wanted = min(GPU_WORKERS, max(2, num_cores // 2))
    num_workers = max(1, min(wanted, int(GPU_SHARE * free_bytes) // max(1, largest_bytes)))
    return Crew(num_workers, max(1, num_cores // 2 // num_workers))


def in_order(crew: Crew, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """work(item) for each item, in their order, `crew.num_workers` of them in the making at a time.

    The first error ends the run: it is raised at its turn, and nothing new is started.
    """
    with (
        _threads(crew),
        ThreadPoolExecutor(crew.num_workers, initializer=torch.set_num_threads, initargs=(crew.threads_each,)) as pool,
    ):
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 2 * crew.num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _threads(crew: Crew) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)  # a worker's setting is also the default of threads started later
