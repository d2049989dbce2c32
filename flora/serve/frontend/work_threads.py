"""Threads for work that must not hold up the event loop: encoding text, reading the registry."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")


class WorkThreads:
    """At most so many pieces of work at a time; more wait their turn."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, or raises, on one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Returns once the work under way has ended; what waits is given up."""
        self._threads.shutdown(wait=True, cancel_futures=True)
