"""What uvicorn alone does not bound, and who is let in: raw sockets against a server with short deadlines and a key."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest

from flora.errors import UsageError
from flora.serve.api.access import check_exposure, is_loopback
from tests.serve.api.servers import BASE, PATIENCE_S, Server, World, eventually, running

KEY = "flora_sk_test_0123456789"
MAX_BODY = 64 << 10
LONG: dict[str, Any] = {"model": BASE, "prompt": "the", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
BUSY: dict[str, Any] = {  # for the official client: four times as many answers as the guarded server works on at once
    "model": BASE, "prompt": "the", "max_tokens": 500, "n": 16, "stream": True, "extra_body": {"ignore_eos": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def guarded(world: World) -> Iterator[Server]:
    """Four sequences at a time, deadlines of a second, and two keys."""
    config = world.config(
        engine={"max_sequences": 4, "max_waiting": 20},
        api_keys=("another", KEY),
        max_body_bytes=MAX_BODY,
        header_timeout_s=1.0,
        body_timeout_s=1.0,
        write_timeout_s=1.0,
        keepalive_s=0.1,
    )
    with running(config) as server:
        server.http.headers["authorization"] = f"Bearer {KEY}"
        yield server
        assert server.get("/health").status_code == 200
        assert server.stop() == 0


def send(server: Server, data: bytes) -> bytes:
    """Everything that comes back until the server closes the connection."""
    with connect(server) as connection:
        connection.sendall(data)
        return read_all(connection)


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while piece := connection.recv(65536):
            data += piece
    except ConnectionResetError:
        pass  # closed with our bytes unread
    return data


def post_head(*headers: str) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEY}",
        "Content-Type: application/json",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def test_a_head_that_never_ends_is_dropped(guarded: Server):
    for beginning in (b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
        assert send(guarded, beginning) == b""


def test_a_head_that_trickles_is_dropped(guarded: Server):
    with connect(guarded) as connection, pytest.raises(ConnectionError):
        trickle(connection)


def trickle(connection: socket.socket) -> None:
    """A byte every 50 ms, until the other side hangs up: then a ConnectionError."""
    connection.settimeout(0.05)
    started = time.monotonic()
    while time.monotonic() - started < PATIENCE_S:
        connection.sendall(b"X")
        with contextlib.suppress(TimeoutError):
            if not connection.recv(1):
                raise ConnectionError("closed")


def test_a_body_that_never_comes_is_given_up(guarded: Server):
    answer = send(guarded, post_head("Content-Length: 100") + b'{"model"')

    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer.lower()


def test_a_body_over_the_cap_is_refused_however_it_is_declared(guarded: Server):
    declared = send(guarded, post_head(f"Content-Length: {MAX_BODY + 1}"))
    chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
    undeclared = send(guarded, post_head("Transfer-Encoding: chunked") + chunk * 20)

    for answer in (declared, undeclared):
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"body_too_large" in answer


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * (1 << 20) + b"\r\n\r\n",
        post_head("Content-Length: 2", *["X: y"] * 3000) + b"{}",
        post_head("Content-Length: 2", "Transfer-Encoding: chunked") + b"{}",
        post_head("Content-Length: 2", "Content-Length: 3") + b"{}",
        post_head("Content-Length: -1"),
        post_head("Content-Length: " + "9" * 40),
        post_head("Transfer-Encoding: chunked") + b"zz\r\n{}\r\n0\r\n\r\n",
        post_head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"NOT HTTP AT ALL\r\n\r\n",
    ],
)
def test_what_is_no_proper_request_is_refused_and_the_connection_closed(guarded: Server, data: bytes):
    answer = send(guarded, data)

    assert answer == b"" or answer.split(b" ", 2)[1] in (b"400", b"413", b"431", b"501")
    assert guarded.get("/version").status_code == 200


def test_only_plain_json_is_read(guarded: Server):
    body = json.dumps({"model": BASE, "prompt": "a"})
    for headers in (
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ):
        answer = guarded.http.post(f"{guarded.url}/v1/completions", content=body, headers=headers)
        assert answer.status_code == 415

    charset = {"content-type": "application/json; charset=utf-8"}
    assert guarded.http.post(f"{guarded.url}/v1/completions", content=body, headers=charset).status_code == 200


def test_a_waiting_stream_is_kept_alive_by_comments(guarded: Server):
    client = guarded.client(api_key=KEY)
    with client.completions.create(**BUSY) as first:
        next(first)
        with guarded.http.stream("POST", f"{guarded.url}/v1/completions", json=LONG | {"stream": True}) as second:
            assert second.status_code == 200
            assert next(second.iter_bytes()).startswith(b": keep-alive\n\n")


def test_more_requests_than_the_queue_holds_are_sent_away_with_a_time_to_come_back(guarded: Server):
    client = guarded.client(api_key=KEY)
    with client.completions.create(**BUSY) as first:
        next(first)

        answer = guarded.post("/v1/completions", LONG | {"n": 16})

    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "overloaded"


def test_a_client_that_reads_nothing_is_dropped_and_its_pages_come_back(guarded: Server):
    before = guarded.aborts()
    data = json.dumps(LONG | {"stream": True, "logprobs": 20, "n": 16}).encode()
    with connect(guarded) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(post_head(f"Content-Length: {len(data)}") + data)

        eventually(lambda: guarded.aborts() > before)

    guarded.settle()
    assert guarded.metric("flora:pages", use="kv") == 0


def test_without_a_key_only_health_answers(guarded: Server):
    refusals = set()
    paths = [
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/metrics",
        "/version",
        "/tokenize",
        "/detokenize",
    ]
    paths += ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/models/sql", "/nothing", "/docs", "/"]
    paths += ["//health", "/health/", "/HEALTH", "/health;x", "/health%2f", "/v1/../health", "/health/../v1/models"]
    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"):
            for key in (
                None,
                "",
                "Bearer",
                "Bearer wrong",
                f"Bearer {KEY}x",
                f"Bearer {KEY[:-1]}",
                f"Basic {KEY}",
                KEY,
            ):
                headers = {} if key is None else {"authorization": key}
                answer = bare(guarded, method, path, headers)
                assert answer.status_code == 401, (method, path, key)
                refusals.add(answer.content)

    assert len(refusals) == 2  # HEAD has no body
    assert bare(guarded, "GET", "/health", {}).status_code == 200
    assert guarded.get("/version").status_code == 200
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client(api_key="wrong").models.list()
    assert caught.value.code == "invalid_api_key"


def bare(server: Server, method: str, path: str, headers: dict[str, str]) -> httpx2.Response:
    """A request whose path is sent as it is written, without the client's key."""
    request = httpx2.Request(method, f"{server.url}/", headers=headers, extensions={"target": path.encode()})
    return server.http.send(request)


def test_a_name_that_is_not_this_machines_is_refused_on_loopback(server: Server):
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        answer = server.get("/health", headers={"host": host})
        assert answer.status_code == 400, host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert server.get("/health", headers={"host": host}).status_code == 200


def test_a_server_that_everyone_could_reach_needs_a_key(world: World):
    for host in ("0.0.0.0", "::", "192.0.2.7", "flora.example"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match="API key"):
            check_exposure(world.config(host=host))
        check_exposure(world.config(host=host, api_keys=("k",)))
        check_exposure(world.config(host=host, insecure=True))
        with pytest.raises(UsageError, match="empty"):
            check_exposure(world.config(host=host, api_keys=("k", " ")))
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        check_exposure(world.config(host=host))
