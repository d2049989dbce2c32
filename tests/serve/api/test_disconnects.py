"""A client that leaves gives everything back: pages, places in the batch, and the engine's time."""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.api.servers import BASE, Server, eventually

LONG: dict[str, Any] = {"prompt": "the", "max_tokens": 500, "temperature": 0, "ignore_eos": True, "n": 8}


@pytest.fixture(autouse=True)
def _nothing_is_held(server: Server) -> Iterator[None]:
    yield
    server.settle()
    assert server.metric("flora:pages", use="kv") == 0
    assert server.metric("vllm:num_requests_running") == 0
    assert server.metric("vllm:num_requests_waiting") == 0


def connect(server: Server, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), timeout=60)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    connection.sendall(head.encode() + data)
    return connection


@pytest.mark.parametrize("model", [BASE, "sql"])
def test_a_stream_that_is_closed_midway_is_cancelled(server: Server, model: str):
    before, made = server.aborts(), server.metric("flora:engine_generated_tokens_total")
    client = server.client()

    with client.completions.create(model=model, stream=True, **split(LONG)) as stream:
        next(stream)

    eventually(lambda: server.aborts() == before + LONG["n"])
    server.settle()
    assert server.metric("flora:engine_generated_tokens_total") - made < LONG["max_tokens"] * LONG["n"]


def test_a_request_that_does_not_stream_is_cancelled_too(server: Server):
    before = server.aborts()

    connection = connect(server, LONG | {"model": BASE})
    eventually(lambda: server.metric("vllm:num_requests_running") > 0)
    connection.close()

    eventually(lambda: server.aborts() == before + LONG["n"])


def test_a_connection_that_is_reset_is_cancelled(server: Server):
    before = server.aborts()

    connection = connect(server, LONG | {"model": BASE, "stream": True})
    connection.recv(1024)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()

    eventually(lambda: server.aborts() == before + LONG["n"])


def test_requests_that_wait_in_the_queue_are_cancelled(server: Server):
    before = server.aborts()
    connections = [connect(server, LONG | {"model": BASE, "n": 16, "stream": True}) for _ in range(6)]
    eventually(lambda: server.metric("vllm:num_requests_waiting") > 0)

    for connection in connections:
        connection.close()

    eventually(lambda: server.aborts() == before + 6 * 16)


def test_a_stop_string_ends_the_work_of_the_engine(server: Server):
    client, made = server.client(), server.metric("flora:engine_generated_tokens_total")
    asked = {"model": BASE, "prompt": "the quick", "temperature": 0, "extra_body": {"ignore_eos": True}}
    first = client.completions.create(**asked, max_tokens=8).choices[0].text[:1]

    client.completions.create(**asked, max_tokens=500, stop=first)

    server.settle()
    assert 0 < server.metric("flora:engine_generated_tokens_total") - made < 8 + 500


def test_a_client_that_reads_nothing_holds_up_nobody(server: Server):
    sleeper = connect(server, LONG | {"model": BASE, "stream": True, "n": 16})

    for _ in range(5):
        answer = server.post("/v1/completions", {"model": BASE, "prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 2
    sleeper.close()


def split(body: dict[str, Any]) -> dict[str, Any]:
    """For the official client, which takes fields that OpenAI does not have apart."""
    return {name: value for name, value in body.items() if name != "ignore_eos"} | {"extra_body": {"ignore_eos": True}}
