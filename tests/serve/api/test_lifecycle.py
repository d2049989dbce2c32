"""Starting, draining, dying: each test has a server of its own and looks at its processes from outside."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from flora.serve import ServeConfig
from tests.serve.api.serve_main import encode
from tests.serve.api.servers import BASE, PATIENCE_S, Server, World, eventually, running

LONG: dict[str, Any] = {"model": BASE, "prompt": "the", "max_tokens": 480, "temperature": 0, "n": 8}
ENDLESS = {"extra_body": {"ignore_eos": True}}


def start(config: ServeConfig, tmp: Path) -> subprocess.CompletedProcess[str]:
    """A server that is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "tests.serve.api.serve_main"],
        input=encode(config),
        env={"TMPDIR": str(tmp), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_drain_refuses_new_requests_and_lets_running_ones_finish(world: World, tmp_path: Path):
    with running(world.config(), env={"TMPDIR": str(tmp_path)}) as server:
        stream = server.client().completions.create(**LONG, **ENDLESS, stream=True)
        next(stream)

        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/health").status_code == 503)
        refused = server.post("/v1/completions", {"model": BASE, "prompt": "x"})
        reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices[0].finish_reason]

        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"]
        assert reasons == ["length"] * LONG["n"]
        assert server.process.wait(PATIENCE_S) == 0
        assert is_gone(server.engine_pid)
        assert not list(tmp_path.iterdir())


def test_what_a_drain_cannot_wait_for_is_told_so(world: World):
    with running(world.config(drain_s=0.05)) as server:
        stream = server.client().completions.create(**LONG, **ENDLESS, stream=True)
        next(stream)

        server.process.send_signal(signal.SIGINT)

        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        assert server.process.wait(PATIENCE_S) == 0


def test_a_second_signal_ends_the_server_at_once(world: World, tmp_path: Path):
    with running(world.config(drain_s=600.0), env={"TMPDIR": str(tmp_path)}) as server:
        stream = server.client().completions.create(**LONG | {"n": 16, "max_tokens": 500}, **ENDLESS, stream=True)
        next(stream)
        waiting = raw_request(server)
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: any("draining" in line for line in server.log))

        server.process.send_signal(signal.SIGTERM)

        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        head, _, body = b"".join(iter(lambda: waiting.recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert json.loads(body)["error"]["message"] == "the server is shutting down"
        assert server.process.wait(PATIENCE_S) == 0
        assert is_gone(server.engine_pid)
        assert not list(tmp_path.iterdir())
        assert not any("Traceback" in line or "heard again" in line for line in server.log)


def test_a_second_signal_ends_a_stream_with_its_last_event(world: World):
    with running(world.config(drain_s=600.0)) as server:
        body = LONG | {"n": 16, "max_tokens": 500, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            eventually(lambda: any("draining" in line for line in server.log))

            server.process.send_signal(signal.SIGINT)

            *_, error, end = [line for line in lines if line]
        assert "shutting down" in json.loads(error.removeprefix("data: "))["error"]["message"]
        assert end == "data: [DONE]"
        assert server.process.wait(PATIENCE_S) == 0


def test_health_tells_of_an_engine_that_hangs(world: World):
    with running(world.config(engine_silence_s=1.0)) as server:
        engine = psutil.Process(server.engine_pid)
        assert server.post("/v1/completions", {"model": "sql", "prompt": "x"}).status_code == 200
        stream = server.client().completions.create(**LONG, **ENDLESS, stream=True)
        next(stream)

        engine.suspend()
        with pytest.raises(openai.APIError, match="silent"):
            list(stream)
        assert server.get("/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().completions.create(model=BASE, prompt="x")
        assert caught.value.status_code == 503
        engine.resume()
        eventually(lambda: server.get("/health").status_code == 200)
        assert server.post("/v1/completions", {"model": BASE, "prompt": "x"}).status_code == 200
        server.settle()
        assert server.metric("flora:pages", use="kv") == 0  # what was given up in between was cancelled
        assert server.stop() == 0


def test_a_server_ends_with_its_engine_once_its_clients_know(world: World, tmp_path: Path):
    with running(world.config(), env={"TMPDIR": str(tmp_path)}) as server:
        engine = psutil.Process(server.engine_pid)
        stream = server.client().completions.create(**LONG, **ENDLESS, stream=True)
        next(stream)
        waiting = raw_request(server)
        engine.kill()
        with pytest.raises(openai.APIError, match="SIGKILL"):
            list(stream)
        answer = b"".join(iter(lambda: waiting.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"SIGKILL" in answer
        assert server.process.wait(PATIENCE_S) == 1
        eventually(lambda: any("error[FL-ENGINE]: the engine process ended" in line for line in server.log))
        assert not any("Traceback" in line for line in server.log)
        assert not list(tmp_path.iterdir())


def raw_request(server: Server) -> socket.socket:
    """A request that does not stream, under way."""
    before = server.metric("vllm:num_requests_running")
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    data = json.dumps(LONG | {"ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    eventually(lambda: server.metric("vllm:num_requests_running") > before)
    return connection


def test_what_is_preloaded_is_resident_and_the_engine_dies_with_its_parent(world: World):
    with running(world.config(preload=("sql@v1",))) as server:
        server.settle()
        assert server.get("/v1/models/sql@v1").json()["flora"]["residency"] == "cpu"
        pid = server.engine_pid

        server.process.kill()

        eventually(lambda: is_gone(pid))


def test_a_start_that_fails_says_why_and_leaves_nothing(world: World, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(world.base, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    config = world.config()

    ended = start(world.config(preload=("nobody",)), tmp)
    assert ended.returncode == 5
    assert "error[FL-ADAPTER]" in ended.stderr

    ended = start(world.config(preload=("sql@v1", BASE)), tmp)
    assert ended.returncode == 2
    assert f"{BASE} is the base" in ended.stderr
    assert "engine ready" not in ended.stderr

    ended = start(world.config(base_name="team/poems"), tmp)
    assert ended.returncode == 2
    assert "--base-name" in ended.stderr

    ended = start(world.config(engine={"base": broken}), tmp)
    assert ended.returncode == 1
    assert "error[FL-CHECKPOINT]" in ended.stderr
    assert "Traceback" not in ended.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = start(world.config(port=taken.getsockname()[1]), tmp)
    assert ended.returncode == 2
    assert "cannot listen" in ended.stderr

    ended = start(world.config(host="0.0.0.0"), tmp)
    assert ended.returncode == 2
    assert "API key" in ended.stderr

    assert not list(tmp.iterdir())
    assert config.port == 0


def test_a_signal_while_it_starts_ends_it_quietly(world: World, tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.api.serve_main"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"TMPDIR": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    process.stdin.write(encode(world.config()))
    process.stdin.close()
    eventually(lambda: bool(list(tmp_path.iterdir())))  # the engine's folder: it is on its way

    process.send_signal(signal.SIGTERM)

    assert process.wait(PATIENCE_S) == 0
    assert not list(tmp_path.iterdir())
