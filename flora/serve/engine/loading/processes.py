"""Loads in processes of their own: reading, hashing and packing take no time from the engine's interpreter.

A thread leads each process from load to load, during the engine's step too. The engine's own thread alone makes room in
the host cache: when it asks for loads, for the next few of each process. A load that finds no gap waits for it. Where a
process ends, its load fails, and another process follows it.
"""

import math
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from threading import Condition, Thread

import torch

from flora.serve.config import EngineConfig, encode_engine_config
from flora.serve.engine.layout import PoolGeometry
from flora.serve.engine.loading.arena import Arena, cells_of
from flora.serve.engine.loading.child import Child
from flora.serve.engine.loading.claims import Claims
from flora.serve.engine.loading.loader import Finished, load_failed
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.loading.seat import Seat
from flora.serve.request import AdapterTarget

_STEP_S = 0.07  # of a GPU, with prompts: the engine asks for more only between steps
_QUICKEST_S = 0.009  # a load of a small adapter
_AHEAD = 4  # loads of each process that get room ahead: more than it does in a step, unless they are small


class ProcessLoader:
    """`num_workers` loader processes over one arena. See Loader."""

    def __init__(
        self,
        config: EngineConfig,
        geometry: PoolGeometry,
        dtype: torch.dtype,
        arena: Arena,
        num_workers: int,
        on_finished: Callable[[], None],
    ) -> None:
        """on_finished  is called from a thread when a load has finished or waits for room: it wakes whoever waits"""
        self._geometry = geometry
        self._dtype = dtype
        self._arena = arena
        self._on_finished = on_finished
        self._make_room: Callable[[int], bool] = lambda _: False
        self._claims = Claims(arena, num_ahead=_AHEAD * num_workers, on_waiting=lambda: self._tell(None))
        self._finished: SimpleQueue[Finished | None] = SimpleQueue()  # None: a load waits for room
        self._last_s = _STEP_S  # what the last load took
        self._changed = Condition()  # holds the lock of these three
        self._asked: deque[AdapterTarget] = deque()
        self._num_serving = num_workers
        self._is_closing = False
        first = encode_engine_config(config)
        self._seats = [Seat(partial(Child, first, arena)) for _ in range(num_workers)]
        self._threads = [
            Thread(target=self._lead, args=(seat,), name="adapter-loader", daemon=True) for seat in self._seats
        ]
        for thread in self._threads:
            thread.start()

    @property
    def max_loading(self) -> int:
        """See Loader: a load for each process, and as many behind it as it does in a step, or it would be idle.

        By the time that the last one took: eight behind each of the smallest, one where a load takes as long as a step.
        """
        return len(self._seats) * (1 + math.ceil(_STEP_S / max(self._last_s, _QUICKEST_S)))

    def use_cache(self, make_room: Callable[[int], bool]) -> None:
        """See Loader.use_cache; here it frees ranges of the arena."""
        self._make_room = make_room

    def start(self, target: AdapterTarget) -> None:
        self._claims.expect()
        self.give_room()
        with self._changed:
            self._asked.append(target)
            self._changed.notify()

    def give_room(self) -> None:
        """See Loader.give_room; the next few loads of each process get room ahead."""
        self._claims.settle(self._make_room)

    def finished(self, timeout_s: float = 0.0) -> list[Finished]:
        """See Loader.finished; a load that begins to wait for room ends a wait, too."""
        told: list[Finished | None] = []
        try:
            told.append(self._finished.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                told.append(self._finished.get_nowait())
        except Empty:
            pass
        return [finished for finished in told if finished]

    def close(self) -> None:
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._claims.close()
        for seat in self._seats:
            seat.end()
        for thread in self._threads:
            thread.join()
        for seat in self._seats:
            seat.close()
        self._arena.close()

    # --- a thread for each process ---

    def _lead(self, seat: Seat) -> None:
        while (target := self._next(seat)) is not None:
            self._tell(self._load(seat, target))

    def _next(self, seat: Seat) -> AdapterTarget | None:
        """What was asked for first, once there is something and a process to load it; None: this seat gets no more.

        Of seats that are given up the last one stays, so that what is asked for fails and nobody waits for it.
        """
        while True:
            seat.fill()  # without the lock: it takes a while
            with self._changed:
                if seat.is_given_up and self._num_serving > 1:
                    self._num_serving -= 1
                    self._changed.notify()  # another one's turn
                    return None
                self._changed.wait_for(lambda: self._asked or self._is_closing)
                if self._is_closing:
                    return None
                if seat.is_filled or seat.is_given_up:
                    return self._asked.popleft()
                self._changed.notify()  # another one's turn, while this seat is filled again

    def _load(self, seat: Seat, target: AdapterTarget) -> Finished:
        start = None
        try:
            child = seat.child
            found = child.find(target)
            cell_elements = self._geometry.adapter_cell_elements
            num_bytes = found.num_cells * cell_elements * self._dtype.itemsize
            start = self._claims.take(num_bytes)
            packed = child.pack(start)
            self._last_s = packed.load_s
            return PackedAdapter(
                target.serving_digest,
                packed.table,
                cells_of(self._arena.memory, start, found.num_cells, cell_elements, self._dtype),
                self._geometry.pages_for_elements(packed.table.num_elements),
                load_s=packed.load_s,
                release=partial(self._arena.release, start, num_bytes),
            )
        except Exception as error:  # the thread goes on: others wait for what it loads next
            if start is None:
                self._claims.forgo()
            else:
                self._arena.release(start, num_bytes)
            return load_failed(target, error)

    def _tell(self, finished: Finished | None) -> None:
        self._finished.put(finished)
        self._on_finished()
