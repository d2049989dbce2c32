"""One server: an engine process, a front end in this process, and an end that leaves nothing behind.

start   port bound ─► private folder ─► engine process ─► Ready ─► preload ─► listen
end     SIGTERM or Ctrl-C: new requests get 503, running ones have `drain_s` to finish; a second signal: at once, with
        an error to each of them
        the engine's own end: running requests hear of it, and the server ends with the engine's error
"""

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal, NoReturn

import uvicorn

from flora.checkpoint import open_checkpoint
from flora.errors import EngineDead, UsageError
from flora.identity import base_record
from flora.registry import Registry
from flora.serve.api.access import check_exposure
from flora.serve.api.app import create_app
from flora.serve.api.metrics import Metrics
from flora.serve.api.protocol import timed_protocol
from flora.serve.api.state import ServerState
from flora.serve.config import ServeConfig
from flora.serve.frontend.client import EngineClient
from flora.serve.frontend.engine_process import EngineProcess, started_engine
from flora.serve.frontend.models import Models, check_base_name
from flora.serve.frontend.prompts import Prompts
from flora.serve.frontend.template import TemplateRenderer
from flora.serve.frontend.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10  # of a request
_BACKLOG = 2048
_SEND_BUFFER_BYTES = 256 << 10  # of a connection, in the kernel: enough for text, and bounded for who reads nothing
_KEEP_ALIVE_S = 5  # an idle connection
_LAST_WORDS_S = 2.0  # for answers that were cut short, and for connections, to get out
_ENGINE_END_S = 5.0  # for a drained engine to end by itself


def serve(config: ServeConfig) -> None:
    """Serve until a signal. Raises UsageError, what the base or the registry raise, and what the engine died of."""
    check_exposure(config)
    _check_names(config)
    _allow_many_sockets()
    with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(_serve(config))
    logger.info("server ended")


def _check_names(config: ServeConfig) -> None:
    """Before the engine starts, which may take minutes."""
    engine = config.engine
    if engine.merge is None:  # else there is one model, and it has the adapter's name
        takes_any = engine.allow_base_mismatch or engine.dummy_weights
        with Registry.open(engine.registry) as registry:
            record = None if takes_any else lambda: base_record(open_checkpoint(engine.base), engine.cache_dir)
            check_base_name(registry, config.base_name, config.preload, record)


class _Shutdown:
    """The first signal asks for a drain once there is something to drain, the second to hurry; others end the task."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()
        self.can_drain = False
        self._task = task

    def on_signal(self) -> None:
        if not self.can_drain or self.hurried.is_set():
            self._task.cancel()
        elif self.asked.is_set():
            self.hurried.set()
        else:
            self.asked.set()


@contextlib.contextmanager
def _signals() -> Iterator[_Shutdown]:
    task = asyncio.current_task()
    assert task is not None
    shutdown, loop = _Shutdown(task), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, shutdown.on_signal)
    try:
        yield shutdown
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _serve(config: ServeConfig) -> None:
    with _signals() as shutdown, _bound_socket(config) as listener, _private_folder() as folder:
        async with started_engine(config.engine, folder) as engine, _connected(engine, config) as client:
            async with _front_end(config, client) as state:
                await _preload(state)
                await _listen(state, listener, shutdown)
            client.drain()
            await engine.end(0.0 if shutdown.hurried.is_set() else _ENGINE_END_S)


@contextlib.asynccontextmanager
async def _connected(engine: EngineProcess, config: ServeConfig) -> AsyncIterator[EngineClient]:
    """A client of a ready engine, which hears of its end. Raises what the engine died of."""
    client = EngineClient(engine.endpoint, silence_s=config.engine_silence_s)
    await client.connect()
    watch = asyncio.create_task(_tell_of_end(engine, client))
    try:
        await client.wait_ready()
        yield client
    finally:
        watch.cancel()
        await client.close()


async def _tell_of_end(engine: EngineProcess, client: EngineClient) -> None:
    client.engine_ended(await engine.ended())


@contextlib.asynccontextmanager
async def _front_end(config: ServeConfig, client: EngineClient) -> AsyncIterator[ServerState]:
    tokenizer = Tokenizer.load(config.engine.base)
    ready = await client.wait_ready()
    registry = Registry.open(config.engine.registry)
    renderer = TemplateRenderer()
    prompts = Prompts(tokenizer, renderer, max_context=ready.max_context, vocab_size=ready.vocab_size)
    models = Models(
        registry,
        base_name=config.base_name,
        base_id=ready.base_id,
        base_folder=config.engine.base,
        tokenizer=tokenizer,
        merged=config.engine.merge,
        allow_base_mismatch=config.engine.allow_base_mismatch,
    )
    metrics = Metrics(client, config.base_name, config.engine.max_adapters)
    try:
        yield ServerState(config, client, models, prompts, tokenizer, metrics)
    finally:
        models.close()
        prompts.close()
        await renderer.close()
        registry.close()


async def _preload(state: ServerState) -> None:
    """Raises what keeps one of them from being resident."""
    for reference in state.config.preload:
        served = await state.models.resolve(reference)
        if served.target is not None:
            await state.client.load_adapter(served.target)
            logger.info("adapter preloaded ref=%s", served.version.ref if served.version else reference)


async def _listen(state: ServerState, listener: socket.socket, shutdown: _Shutdown) -> None:
    """Answer requests until a shutdown is asked for and the drain is over.

    Raises EngineDead if the engine ends before, once the requests that it leaves have their error.
    """
    config = state.config
    protocol = timed_protocol(head_timeout_s=config.header_timeout_s, write_timeout_s=config.write_timeout_s)
    server = _Server(
        uvicorn.Config(
            create_app(state),
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(_LAST_WORDS_S),
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    asked = asyncio.create_task(shutdown.asked.wait())
    hurried = asyncio.create_task(shutdown.hurried.wait())
    ended = asyncio.create_task(state.client.ended())
    shutdown.can_drain = True
    await _announce(state, listener)
    try:
        await asyncio.wait({serving, asked, ended}, return_when=asyncio.FIRST_COMPLETED)
        if ended.done() and not asked.done():
            await _end_with_engine(state, ended.result())
        await _drain(state, hurried, ended)
    finally:
        for waiting in (asked, hurried, ended):
            waiting.cancel()
        server.should_exit = True
        await serving


async def _end_with_engine(state: ServerState, error: EngineDead) -> NoReturn:
    """Raises the error, once it has reached those who wait."""
    logger.error("engine ended requests=%d", state.num_requests)
    state.is_draining = True
    await state.wait_idle(_LAST_WORDS_S)
    raise error


async def _drain(state: ServerState, hurried: "asyncio.Task[Literal[True]]", ended: "asyncio.Task[EngineDead]") -> None:
    """New requests are refused, and running ones may finish; those that do not are told so.

    hurried  nobody wants to wait for them
    ended    the engine is gone, and they know: a signal to all processes of a group drains it, too
    """
    logger.info("draining requests=%d", state.num_requests)
    state.is_draining = True
    idle = asyncio.create_task(state.wait_idle(state.config.drain_s))
    await asyncio.wait({idle, hurried, ended}, return_when=asyncio.FIRST_COMPLETED)
    idle.cancel()
    if state.num_requests:
        logger.warning("drain incomplete requests=%d", state.num_requests)
        if not ended.done():
            state.client.give_up("the server is shutting down")
        await state.wait_idle(_LAST_WORDS_S)


async def _announce(state: ServerState, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    entries, has_more = await state.models.page(after=None, limit=10)
    names = [state.models.default_name, *(entry.name for entry in entries)]
    logger.info("serving at http://%s:%d models: %s%s", shown, port, ", ".join(names), ", …" if has_more else "")


class _Server(uvicorn.Server):
    """uvicorn without signal handlers of its own: it would raise the signal again after its end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _bound_socket(config: ServeConfig) -> Iterator[socket.socket]:
    """The port, taken before the engine starts and refusing connections until uvicorn listens. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(
            f"{config.host} is no address of this machine", cause=str(error), fix="change --host"
        ) from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        try:
            listener.bind(address)
        except OSError as error:
            raise UsageError(
                f"cannot listen on {config.host} port {config.port}",
                cause=error.strerror,
                fix="stop what uses the port, or choose another with --port",
            ) from error
        yield listener


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="flora-") as folder:  # mode 0700
        yield Path(folder)


def _allow_many_sockets() -> None:
    """As many open files as the system lets this process have: each client is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65_536 if hard == resource.RLIM_INFINITY else min(hard, 65_536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
