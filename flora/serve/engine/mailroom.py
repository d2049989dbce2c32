"""The engine's socket, on a thread of its own: a long step neither silences the engine nor deafens it.

front ends ◄─ ROUTER ─► mailroom thread ─ inbox ─► engine thread
                              ▲──────── outgoing ──────┘
"""

import logging
import math
import time
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from threading import Thread

import msgspec
import zmq

from flora.serve.engine.outbox import Outgoing
from flora.serve.messages import FromFrontEnd, Heartbeat, Hello, Ready

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
_OUTGOING = "inproc://outgoing"


class Gone(msgspec.Struct, frozen=True):
    """A front end no longer answers: its requests are nobody's."""


Mail = tuple[bytes, FromFrontEnd | Gone]


class Mailroom:
    """Answers Hello, sends heartbeats, and passes everything else on. `receive` and `send` are the engine thread's."""

    def __init__(
        self,
        endpoint: str,
        ready: Ready,
        heartbeat: Heartbeat,
        on_tick: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """on_tick  is called from the mailroom's thread before each heartbeat
        on_lost  is called from it if it ends though nobody has closed it: no mail comes or goes any more
        Raises zmq.ZMQError: cannot bind.
        """
        self.heartbeat = heartbeat  # the latest; the engine thread replaces it
        self._ready = ready
        self._on_tick = on_tick
        self._on_lost = on_lost
        self._inbox: SimpleQueue[Mail | None] = SimpleQueue()
        self._clients: set[bytes] = set()
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a front end that is gone is noticed, not ignored
        self._router.setsockopt(zmq.SNDHWM, 0)  # a full queue would drop tokens; it is bounded by max_tokens in flight
        self._router.bind(endpoint)
        self._outgoing = self._context.socket(zmq.PAIR)
        self._outgoing.setsockopt(zmq.SNDHWM, 0)
        self._outgoing.bind(_OUTGOING)
        self._thread = Thread(target=self._run, name="mailroom", daemon=True)
        self._thread.start()

    def receive(self, timeout_s: float = 0.0) -> list[Mail]:
        """What came since the last call; waits up to `timeout_s` for the first message, or for `wake`."""
        found: list[Mail | None] = []
        try:
            found.append(self._inbox.get(block=timeout_s > 0, timeout=timeout_s or None))
            while True:
                found.append(self._inbox.get_nowait())
        except Empty:
            return [mail for mail in found if mail]

    def wake(self) -> None:
        """Ends a wait in `receive`. Any thread and any signal handler may call it."""
        self._inbox.put(None)

    def send(self, messages: Iterable[Outgoing]) -> None:
        for client, message in messages:
            self._outgoing.send_multipart((client, self._encoder.encode(message)))

    def close(self) -> None:
        """Sends what is still to be sent, and ends the thread."""
        self._outgoing.send(b"")
        self._thread.join()
        self._outgoing.close()
        self._context.term()

    # --- the mailroom's thread ---

    def _run(self) -> None:
        try:
            self._carry()
        except Exception:
            logger.critical("mailroom lost: the engine is deaf and mute from now on", exc_info=True)
            self._on_lost()

    def _carry(self) -> None:
        outgoing = self._context.socket(zmq.PAIR)
        outgoing.setsockopt(zmq.RCVHWM, 0)
        outgoing.connect(_OUTGOING)
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(outgoing, zmq.POLLIN)
        decoder = msgspec.msgpack.Decoder(FromFrontEnd)
        encoder = msgspec.msgpack.Encoder()
        next_heartbeat_s = time.monotonic()
        is_open = True
        while is_open:
            wait_s = max(0.0, next_heartbeat_s - time.monotonic())
            ready = dict(poller.poll(math.ceil(wait_s * 1000)))
            if outgoing in ready:
                is_open = self._forward(outgoing)
            if self._router in ready:
                self._sort(decoder, encoder)
            if time.monotonic() >= next_heartbeat_s:
                next_heartbeat_s = time.monotonic() + HEARTBEAT_S
                self._on_tick()
                beat = encoder.encode(self.heartbeat)
                for client in list(self._clients):
                    self._post(client, beat)
        outgoing.close()
        self._router.close(linger=1000)

    def _forward(self, outgoing: zmq.Socket) -> bool:
        """Posts all that the engine has sent; False once it closes."""
        while True:
            try:
                client, *payload = outgoing.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            if not payload:
                return False
            self._post(client, payload[0])

    def _sort(self, decoder: msgspec.msgpack.Decoder, encoder: msgspec.msgpack.Encoder) -> None:
        """Takes all that front ends have sent."""
        while True:
            try:
                client, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = decoder.decode(b"".join(frames))
            except (ValueError, RecursionError) as error:  # msgspec's, a string that is not UTF-8, arrays in arrays
                logger.warning("message unread client=%s bytes=%d: %s", client.hex(), sum(map(len, frames)), error)
                continue
            self._clients.add(client)
            if isinstance(message, Hello):
                self._post(client, encoder.encode(self._ready))
                self._post(client, encoder.encode(self.heartbeat))
            else:
                self._inbox.put((client, message))

    def _post(self, client: bytes, payload: bytes) -> None:
        try:
            self._router.send_multipart((client, payload), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if client in self._clients:
                self._clients.discard(client)
                self._inbox.put((client, Gone()))
