"""How an adapter comes to the device: registry ─ loader ─► host cache ─ copy ─► pages; for requests, and on demand."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flora.errors import EngineDead, FloraError, ServeError
from flora.serve.engine.loading.host_cache import HostCache
from flora.serve.engine.loading.loader import Loader, LoadFailed
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.outbox import Outbox
from flora.serve.engine.runner import Runner
from flora.serve.engine.schedule.pages import PagePool
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.schedule.scheduler import Scheduler
from flora.serve.engine.schedule.sequence import Sequence
from flora.serve.messages import AdapterLoaded, AdapterUnloaded, LoadAdapter, UnloadAdapter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Order:
    """A LoadAdapter that is not answered yet."""

    client: bytes
    message: LoadAdapter
    asked_s: float

    @property
    def digest(self) -> str:
        return self.message.adapter.serving_digest


class AdapterSupply:
    """Starts loads, keeps what they bring, and writes it to the pages that residency gives."""

    def __init__(
        self,
        scheduler: Scheduler,
        pages: PagePool,
        host: HostCache,
        loader: Loader,
        runner: Runner,
        outbox: Outbox,
        clock: Callable[[], float],
    ) -> None:
        self.num_loads = 0
        self.load_s = 0.0
        self._scheduler = scheduler
        self._pages = pages
        self._residency = scheduler.residency
        self._host = host
        self._loader = loader
        self._runner = runner
        self._outbox = outbox
        self._clock = clock
        self._loading: set[str] = set()
        self._orders: list[_Order] = []
        loader.use_cache(lambda num_bytes: host.free(num_bytes, self._is_wanted))

    @property
    def is_idle(self) -> bool:
        return not self._loading and not self._orders

    # --- orders of front ends ---

    def load(self, message: LoadAdapter, client: bytes) -> None:
        self._orders.append(_Order(client, message, self._clock()))

    def unload(self, message: UnloadAdapter, client: bytes) -> None:
        """Forgets the adapter here and on the device; running sequences keep it to their end."""
        digest = message.serving_digest
        was_resident = self._residency.get(digest) is not None
        if was_resident:
            self._residency.retire(digest)
        self._host.discard(digest)
        self._scheduler.prefixes.forget(digest)
        self._scheduler.adapter_left(digest)
        unloaded = AdapterUnloaded(request_id=message.request_id, serving_digest=digest, was_resident=was_resident)
        self._outbox.send(client, unloaded)

    # --- between steps ---

    def receive(self, wait_s: float) -> list[tuple[Sequence, FloraError]]:
        """Takes what the loader finished; the waiting sequences that can never run, and why."""
        if not self._loading:
            return []
        refused: list[tuple[Sequence, FloraError]] = []
        for finished in self._loader.finished(wait_s):
            self._loading.discard(finished.digest)
            if isinstance(finished, LoadFailed):
                refused += self._give_up(finished)
            else:
                refused += self._keep(finished)
        return refused

    def fill_orders(self) -> None:
        """Answers every LoadAdapter whose adapter is resident, or can be made so now. Raises EngineDead."""
        for order in list(self._orders):
            try:
                is_answered = self._fill(order)
            except EngineDead:
                raise
            except Exception as error:
                is_answered = True
                self._outbox.reject((order.client, order.message.request_id), _not_filled(order, error))
            if is_answered:
                self._orders.remove(order)

    def start_loads(self) -> None:
        """Asks for what is wanted and neither here nor on its way, in order of arrival.

        What has come since the last step, and is on the device now, may go for those that wait for host memory.
        """
        room = self._host.trim(self._is_wanted)
        if self._loading:
            self._loader.give_room()
        for target in [*self._scheduler.wanted_adapters(), *(order.message.adapter for order in self._orders)]:
            if not room or len(self._loading) >= self._loader.max_loading:
                return
            digest = target.serving_digest
            here = self._residency.get(digest) or self._host.num_pages(digest) is not None
            if not here and digest not in self._loading:
                self._loading.add(digest)
                self._loader.start(target)

    def write(self, placed: Iterable[Resident]) -> None:
        """Copies newly placed adapters into their pages, once what has left is cleared.

        Whatever it raises: those that are not written are no longer resident once no sequence needs them.
        """
        unwritten = deque(placed)
        try:
            self.sync()
            while unwritten:
                self._write(unwritten[0])
                unwritten.popleft()
        except Exception:
            for resident in unwritten:
                self._residency.retire(resident.digest)
            raise

    def sync(self) -> None:
        """Clears evicted slots and poisons freed pages: always before anything new is written to them."""
        for resident in self._residency.take_evicted():
            self._runner.remove_adapter(resident.slot)
            self._scheduler.adapter_left(resident.digest)
            logger.info("adapter evicted label=%s digest=%s", resident.label, resident.digest)
        self._runner.pool.poison(self._pages.take_freed())

    def _write(self, resident: Resident) -> None:
        packed = self._host.get(resident.digest)
        assert packed is not None, "an adapter is placed from host memory"
        self._runner.write_adapter(resident, packed)
        resident.rank = packed.table.max_rank
        logger.info(
            "adapter resident label=%s digest=%s rank=%d pages=%d load_ms=%.1f",
            resident.label,
            resident.digest,
            resident.rank,
            len(resident.pages),
            packed.load_s * 1000,
        )

    def _is_wanted(self, digest: str) -> bool:
        return self._scheduler.is_awaited(digest) or any(order.digest == digest for order in self._orders)

    def _keep(self, packed: PackedAdapter) -> list[tuple[Sequence, FloraError]]:
        self.num_loads += 1
        self.load_s += packed.load_s
        self._host.put(packed)
        self._scheduler.adapter_arrived(packed.digest)
        refused = []
        for sequence in self._scheduler.waiting_for(packed.digest):
            try:
                self._scheduler.room.check_sequence(sequence, packed.num_pages)
            except FloraError as error:
                refused.append((sequence, error))
        return refused

    def _give_up(self, failed: LoadFailed) -> list[tuple[Sequence, FloraError]]:
        logger.warning("adapter load failed digest=%s %s", failed.digest, failed.error)
        for order in [order for order in self._orders if order.digest == failed.digest]:
            self._orders.remove(order)
            self._outbox.reject((order.client, order.message.request_id), failed.error)
        return [(sequence, failed.error) for sequence in self._scheduler.waiting_for(failed.digest)]

    def _fill(self, order: _Order) -> bool:
        """Whether the order is answered. Raises OutOfPages, and what the device does."""
        message, digest = order.message, order.digest
        room = self._scheduler.room
        num_pages = room.for_adapter(digest)
        if num_pages is None:
            return False  # still to come
        if message.pinned:
            room.check_pin(digest, num_pages, self._scheduler.live)
        room.check_adapter(digest, num_pages)
        if self._residency.get(digest) is None:
            if not self._residency.can_place(num_pages):
                return False
            self.write([self._residency.place(message.adapter, num_pages)])
        if message.pinned:
            self._residency.pin(digest)
        else:
            self._residency.keep(digest)
        load_ms = (self._clock() - order.asked_s) * 1000
        loaded = AdapterLoaded(request_id=message.request_id, serving_digest=digest, load_ms=load_ms)
        self._outbox.send(order.client, loaded)
        return True


def _not_filled(order: _Order, error: Exception) -> FloraError:
    """What whoever ordered is told; logged if unforeseen."""
    if isinstance(error, FloraError):
        return error
    label = order.message.adapter.label
    logger.exception("adapter write failed label=%s digest=%s", label, order.digest)
    return ServeError(
        f"adapter {label} could not be copied to the device",
        cause=repr(error),
        fix="load it again; if that fails too, the server's log says where",
    )
