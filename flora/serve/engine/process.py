"""The engine as a process: a loop between the mailroom and `Engine.step`, and an end that leaves nothing behind.

It ends with code 0 when it was drained (Drain, SIGTERM) and its requests are done, with 1 when its own state can no
longer be trusted, and at once when the process that started it is gone, or its mailroom.
"""

import logging
import os
import signal
import time
from functools import partial
from pathlib import Path

from flora.errors import FloraError, ServeError
from flora.serve.config import EngineConfig, decode_engine_config
from flora.serve.engine.build import build_engine
from flora.serve.engine.engine import Engine
from flora.serve.engine.garbage import keep_collections_short
from flora.serve.engine.mailroom import Gone, Mail, Mailroom
from flora.serve.messages import AdapterLoaded, AdapterUnloaded, Cancel, Drain, LoadAdapter, Submit, UnloadAdapter

logger = logging.getLogger(__name__)

_LOOK_S = 0.25  # how often a stalled or idle engine looks around unasked


def run(config_file: Path, endpoint: str, parent: int) -> int:
    """The exit code. Raises what build_engine raises.

    parent  the id of the process that started this one, as it said itself: it may be gone already
    """
    end_without(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group: the parent decides
    Shell(decode_engine_config(config_file.read_bytes()), endpoint, parent).run()
    return 0


class Shell:
    """Brings mail to the engine and its words back."""

    def __init__(self, config: EngineConfig, endpoint: str, parent: int) -> None:
        self._mailroom: Mailroom | None = None
        self._engine = build_engine(config, on_loaded=self._wake)
        self._mailroom = Mailroom(
            endpoint,
            self._engine.ready,
            self._engine.heartbeat(),
            on_tick=partial(end_without, parent),
            on_lost=partial(os._exit, 1),  # nobody can be told anything, nor ask for an end
        )
        self._drain_asked = False
        signal.signal(signal.SIGTERM, self._on_sigterm)

    def run(self) -> None:
        """Serves until drained."""
        engine, mailroom = self._engine, self._mailroom
        assert mailroom is not None
        keep_collections_short()
        logger.info("engine ready pid=%d pages=%d", os.getpid(), engine.ready.num_pages)
        next_look_s = 0.0
        while not (engine.is_draining and engine.is_idle):
            for mail in mailroom.receive(_LOOK_S if engine.is_idle or engine.is_stalled else 0.0):
                handle(engine, mail)
            if self._drain_asked:
                engine.drain()
            told = engine.step()
            if changed := {client for client, message in told if isinstance(message, AdapterLoaded | AdapterUnloaded)}:
                mailroom.heartbeat = beat = engine.heartbeat()  # whoever hears of the change sees it, too
                told = [*((client, beat) for client in changed), *told]
            mailroom.send(told)
            if time.monotonic() >= next_look_s:  # not after every step: it grows with the resident adapters
                next_look_s = time.monotonic() + _LOOK_S
                mailroom.heartbeat = engine.heartbeat()
        logger.info("engine drained")
        mailroom.close()
        engine.close()

    def _wake(self) -> None:
        if self._mailroom:
            self._mailroom.wake()

    def _on_sigterm(self, *_: object) -> None:
        self._drain_asked = True
        self._wake()


def end_without(parent: int) -> None:
    """Ends this process at once if the one that started it is gone: nobody waits for the result of a running step."""
    if os.getppid() != parent:
        logger.critical("engine ends: its parent is gone parent=%d", parent)
        os._exit(1)


def handle(engine: Engine, mail: Mail) -> None:
    """Gives one message to the engine. Whatever goes wrong in it ends that request only."""
    client, message = mail
    try:
        match message:
            case Submit():
                engine.submit(message, client)
            case Cancel():
                engine.cancel(message, client)
            case LoadAdapter():
                engine.load_adapter(message, client)
            case UnloadAdapter():
                engine.unload_adapter(message, client)
            case Drain():
                engine.drain()
            case Gone():
                engine.abandon(client)
    except Exception as error:
        logger.exception("message failed kind=%s", type(message).__name__)
        refusal: FloraError = ServeError("the engine failed at this request", cause=repr(error))
        engine.refuse(client, getattr(message, "request_id", None), refusal)
