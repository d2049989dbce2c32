"""What does one streamed token cost the front end: how many tokens a second can one process of it pass on?

    python benchmarks/bench_front_end.py --streams 256 --interval-ms 25

Three processes: an engine that computes nothing and tells every running sequence one token each interval, the real
front end, and clients that read. Each stream's text is checked. The figure is the front end's CPU time, from before the
first request to after the last, over the tokens that it sent; what a core can pass on is its inverse.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from flora.bench.http_stream import Endpoint
from flora.bench.shapes import write_config, write_tokenizer
from flora.serve.config import EngineConfig, ServeConfig
from flora.serve.messages import Cancel, FromFrontEnd, Heartbeat, Hello, Ready, StepEvents, Submit, TokenEvent

SHAPE = "llama3-8b"
VOCAB = 128_256
PROMPT = [1, 2, 3]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128, help="of each answer")
    parser.add_argument("--interval-ms", type=float, default=25.0, help="between the steps of the engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chat", action="store_true", help="ask for chat completions")
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, help="append one JSON line here")
    parser.add_argument("--role", choices=("engine", "front-end"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "engine":
        pretend_engine(endpoint(arguments.folder), arguments.interval_ms / 1000)
    elif arguments.role == "front-end":
        front_end(arguments.folder)
    else:
        measure(arguments)


def endpoint(folder: Path) -> str:
    return f"ipc://{folder}/engine"


# --- the engine's place ---


def pretend_engine(at: str, interval_s: float) -> None:
    """Answers as an engine does; the n-th token of a sequence is its prompt's last token plus n."""
    import zmq

    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.bind(at)
    decoder, encoder = msgspec.msgpack.Decoder(FromFrontEnd), msgspec.msgpack.Encoder()
    running: dict[tuple[bytes, str], list[int]] = {}  # tokens told, tokens asked for, first token
    next_step_s, next_beat_s = time.monotonic(), 0.0
    while True:
        wait_ms = max(0.0, next_step_s - time.monotonic()) * 1000
        while socket.poll(wait_ms):
            client, frame = socket.recv_multipart()
            match decoder.decode(frame):
                case Hello():
                    socket.send_multipart([client, encoder.encode(ready())])
                case Submit(request_id=name, sampling=sampling, prompt=prompt):
                    running[client, name] = [0, sampling.max_tokens, prompt[-1]]
                case Cancel(request_id=name):
                    running.pop((client, name), None)
            wait_ms = 0
        next_step_s = max(next_step_s + interval_s, time.monotonic())
        told: dict[bytes, list[TokenEvent]] = {}
        for (client, name), state in list(running.items()):
            state[0] += 1
            is_last = state[0] == state[1]
            token = (state[2] + state[0]) % VOCAB
            event = TokenEvent(request_id=name, token_ids=(token,), finish_reason="length" if is_last else None)
            told.setdefault(client, []).append(event)
            if is_last:
                del running[client, name]
        for client, events in told.items():
            socket.send_multipart([client, encoder.encode(StepEvents(events=tuple(events)))])
        if time.monotonic() >= next_beat_s and told:
            next_beat_s = time.monotonic() + 0.5
            for client in told:
                socket.send_multipart([client, encoder.encode(heartbeat())])


def ready() -> Ready:
    return Ready(
        base_id="sha256:" + "0" * 64,
        max_context=8192,
        vocab_size=VOCAB,
        num_pages=1000,
        page_tokens=16,
        page_bytes=1 << 16,
        device="none",
        dtype="none",
        kernels={},
        engine_pid=os.getpid(),
    )


def heartbeat() -> Heartbeat:
    zeros = {name: 0 for name, kind in Heartbeat.__annotations__.items() if kind in (int, float)}
    return Heartbeat(**zeros | {"waiting_by_adapter": {}, "resident": ()})


# --- the front end, as `flora serve` runs it ---


class PretendedProcess:
    """What the front end knows of an engine's process; this one ends with the script."""

    def __init__(self, at: str) -> None:
        self.endpoint = at

    async def ended(self) -> Any:
        await asyncio.Event().wait()

    async def end(self, patience_s: float = 0.0) -> None:
        pass


def front_end(folder: Path) -> None:
    import logging

    from flora.serve import launch

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)

    @contextlib.asynccontextmanager
    async def started_engine(_: EngineConfig, __: Path) -> AsyncIterator[PretendedProcess]:
        yield PretendedProcess(endpoint(folder))

    launch.started_engine = started_engine  # type: ignore[assignment]
    engine = EngineConfig(base=folder / "base", registry=str(folder / "registry"), cache_dir=folder / "cache")
    launch.serve(ServeConfig(engine=engine, base_name="base", port=0, engine_silence_s=600.0))


# --- clients, and the clock ---


def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="flora-front-") as name:
        folder = Path(name)
        write_config(folder / "base", SHAPE)
        write_tokenizer(folder / "base", SHAPE)
        me = [sys.executable, __file__, "--folder", str(folder), "--interval-ms", str(arguments.interval_ms)]
        engine = subprocess.Popen([*me, "--role", "engine"])
        server = subprocess.Popen([*me, "--role", "front-end"], stderr=subprocess.PIPE, text=True)
        try:
            rounds = list(measured_rounds(server, arguments))
        finally:
            server.kill()
            engine.kill()
    best = min(rounds, key=lambda found: found["us_per_token"])
    row = {
        "benchmark": "front_end",
        "streams": arguments.streams,
        "tokens": arguments.tokens,
        "interval_ms": arguments.interval_ms,
        "chat": arguments.chat,
        **best,
        "rounds_us_per_token": [found["us_per_token"] for found in rounds],
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "commit": arguments.commit,
    }
    print(json.dumps(row))
    if arguments.out:
        with arguments.out.open("a") as out:
            out.write(json.dumps(row) + "\n")


def measured_rounds(server: subprocess.Popen[str], arguments: argparse.Namespace) -> Any:
    assert server.stderr is not None
    url = None
    for line in server.stderr:
        if found := re.search(r"serving at (http://\S+)", line):
            url = found[1]
            break
    if url is None:
        raise SystemExit("the front end did not come up")
    asyncio.run(ask_all(url, 8, 8, chat=arguments.chat))  # warm
    for _ in range(arguments.rounds):
        before_s, started_s = cpu_seconds(server.pid), time.monotonic()
        tokens = asyncio.run(ask_all(url, arguments.streams, arguments.tokens, chat=arguments.chat))
        spent_s = cpu_seconds(server.pid) - before_s
        yield {
            "us_per_token": round(spent_s / tokens * 1e6, 1),
            "tokens_per_core_s": round(tokens / spent_s),
            "tok_s": round(tokens / (time.monotonic() - started_s)),
        }


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, its threads among it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask_all(url: str, streams: int, tokens: int, *, chat: bool) -> int:
    """Tokens of all answers. Raises SystemExit if one is not whole."""
    at = Endpoint(url)
    body: dict[str, Any] = {"max_tokens": tokens, "stream": True, "ignore_eos": True}
    body |= {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": PROMPT}
    request = at.request("POST", "/v1/chat/completions" if chat else "/v1/completions", json.dumps(body).encode())

    async def one() -> int:
        pieces = 0

        def on_event(data: bytes) -> bool:
            nonlocal pieces
            pieces += data != b"[DONE]"
            return True

        answer = await at.send(request, on_event)
        if answer.status != 200 or pieces < tokens:
            raise SystemExit(f"an answer is not whole: status {answer.status}, {pieces} events, {answer.body[:300]!r}")
        return tokens

    return sum(await asyncio.gather(*(one() for _ in range(streams))))


if __name__ == "__main__":
    main()
