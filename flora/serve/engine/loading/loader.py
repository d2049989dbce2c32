"""Loads beside the engine's loop: none ever holds up a running step, and a failure concerns one adapter alone."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Protocol

from flora.errors import FloraError, ServeError
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.request import AdapterTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadFailed:
    digest: str
    error: FloraError


Finished = PackedAdapter | LoadFailed


def load_failed(target: AdapterTarget, error: Exception) -> LoadFailed:
    """Whatever it is that is handled now, it concerns this adapter's requests and nobody else: logged if unforeseen."""
    if not isinstance(error, FloraError):
        logger.exception("adapter load failed label=%s", target.label)
        error = ServeError(f"adapter {target.label} could not be loaded", cause=repr(error))
    return LoadFailed(target.serving_digest, error)


class Loader(Protocol):
    """Loads run elsewhere and finish in any order; the engine asks between steps."""

    @property
    def max_loading(self) -> int:
        """How many to ask for at once: no more than a step's, since what is asked for later can still be cancelled."""
        ...

    def use_cache(self, make_room: Callable[[int], bool]) -> None:
        """make_room  forgets packed adapters, at best as many bytes as asked; whether it forgot any"""
        ...

    def start(self, target: AdapterTarget) -> None: ...

    def give_room(self) -> None:
        """Makes room for loads that wait for it, as far as the cache can forget anything now."""
        ...

    def finished(self, timeout_s: float = 0.0) -> list[Finished]:
        """What finished since the last call; waits up to `timeout_s` for the first."""
        ...

    def close(self) -> None: ...


class ThreadLoader:
    """One thread, one load at a time, in the order they were asked for, into memory of its own."""

    max_loading = 2  # one being read, one behind it

    def __init__(self, load: Callable[[AdapterTarget], PackedAdapter], on_finished: Callable[[], None]) -> None:
        """on_finished  is called from the thread after each load: it wakes whoever waits"""
        self._load = load
        self._on_finished = on_finished
        self._asked: SimpleQueue[AdapterTarget | None] = SimpleQueue()
        self._finished: SimpleQueue[Finished] = SimpleQueue()
        self._thread = Thread(target=self._run, name="adapter-loader", daemon=True)
        self._thread.start()

    def use_cache(self, make_room: Callable[[int], bool]) -> None:
        """Memory is the process's own: nothing to ask the cache for."""

    def start(self, target: AdapterTarget) -> None:
        self._asked.put(target)

    def give_room(self) -> None:
        """Nobody waits for it."""

    def finished(self, timeout_s: float = 0.0) -> list[Finished]:
        found: list[Finished] = []
        try:
            found.append(self._finished.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                found.append(self._finished.get_nowait())
        except Empty:
            return found

    def close(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (target := self._asked.get()) is not None:
            self._finished.put(self._attempt(target))
            self._on_finished()

    def _attempt(self, target: AdapterTarget) -> Finished:
        try:
            return self._load(target)
        except Exception as error:
            return load_failed(target, error)
