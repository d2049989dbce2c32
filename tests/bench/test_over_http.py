"""The client against bytes as servers may cut them, and against a real Flora server with adapters drawn at random."""

import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import msgspec
import pytest

from flora.bench.asks import Ask
from flora.bench.engines import make_world
from flora.bench.facts import Surroundings
from flora.bench.http_stream import ChunkedBody, Endpoint, EventSplitter
from flora.bench.over_http import drive_server, run
from flora.bench.own_server import running_server
from flora.bench.serving_http import Clients, measure_own_server, measure_url
from flora.bench.settings import ServeBench, Setting
from flora.bench.shapes import write_tokenizer
from flora.bench.timeline import check_timelines
from flora.errors import CheckFailed, DeadlineMissed, RemoteError, ServeError, UsageError
from flora.serve import EngineConfig, ServeConfig
from flora.serve.api.errors import envelope

TINY = Setting("tiny", "attention", ranks=(8, 4), adapters=(3,), num_requests=10, lengths=(4, 16))
ENGINE = EngineConfig(base=Path(), registry="", cache_dir=Path(), pool_bytes=32 << 20, max_context=512, num_threads=1)
WHERE = Surroundings(commit="abc", gpu=None)


def ask(*, num_tokens: int, adapter: int | None = None, cancel_after: int | None = None) -> Ask:
    return Ask(prompt=(10, 11, 12), num_tokens=num_tokens, due_s=0.0, adapter=adapter, cancel_after=cancel_after)


def model_of(adapter: int | None) -> str:
    return "tiny" if adapter is None else f"attention-{adapter}"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_chunked_body_is_whole_however_the_reads_cut_it(size):
    sent = b"5\r\nhello\r\n1;why=not\r\n \r\n10\r\nworld, how is it\r\n0\r\n\r\n"
    body = ChunkedBody()

    got = b"".join(body.feed(sent[start : start + size]) for start in range(0, len(sent), size))

    assert got == b"hello world, how is it"
    assert body.is_over


def test_a_chunk_without_a_size_is_refused():
    with pytest.raises(ValueError, match="invalid literal"):
        ChunkedBody().feed(b"what\r\n")


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_events_are_whole_however_the_reads_cut_them_and_comments_are_none(size):
    sent = b': keep-alive\n\ndata: {"a": 1}\n\ndata: one\r\ndata: two\r\n\r\ndata: [DONE]\n\ndata: cut of'
    events = EventSplitter()

    got = [event for start in range(0, len(sent), size) for event in events.feed(sent[start : start + size])]

    assert got == [b'{"a": 1}', b"one\ntwo", b"[DONE]"]


def test_what_is_no_address_is_refused_before_anything_is_sent():
    with pytest.raises(UsageError, match="no address"):
        Endpoint("ftp://127.0.0.1")


def test_a_server_that_is_not_there_is_named(unused_port):
    endpoint = Endpoint(f"http://127.0.0.1:{unused_port}")

    with pytest.raises(RemoteError, match=f"127.0.0.1:{unused_port}"):
        run(drive_server(endpoint, [ask(num_tokens=2)], model_of))


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that is bound and does not listen, so nobody answers there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a Flora server over a tiny base, with adapters attention-0 to attention-10."""
    folder = tmp_path_factory.mktemp("server")
    world = make_world(folder, ServeBench(setting=TINY, engine=ENGINE), range(11))
    write_tokenizer(folder / "base", TINY.shape)
    config = ServeConfig(engine=world.config(range(11)), base_name="tiny", port=0)
    with running_server(config, folder / "log") as url:
        yield url


def test_a_server_is_measured_by_its_url_with_at_most_so_many_clients(server):
    bench = ServeBench(setting=TINY, engine=ENGINE)

    rows = list(measure_url(bench, Endpoint(server), Clients(most=2), WHERE, adapter_name="attention-{}"))

    [row] = rows
    assert (row.system, row.order, row.clients, row.completed) == ("flora-http", "unknown", 2, 10)
    assert row.kv_pages_left == 0
    assert row.send_delay_ms_p99 == 0.0  # a request's time begins when a client is free to send it, not at t = 0


def test_no_more_requests_are_under_way_than_there_are_clients(server):
    asks = [ask(num_tokens=4)] * 10

    timelines = run(drive_server(Endpoint(server), asks, model_of, clients=2))

    check_timelines(asks, timelines)
    changes = sorted([(seen.sent_s, +1) for seen in timelines] + [(seen.end_s, -1) for seen in timelines])
    assert max(accumulate(change for _, change in changes)) == 2


def test_a_client_that_has_seen_enough_hangs_up_and_the_server_hears_of_it(server):
    asks = [ask(num_tokens=400, cancel_after=3), ask(num_tokens=5)]

    timelines = run(drive_server(Endpoint(server), asks, model_of))

    check_timelines(asks, timelines)
    assert [timeline.outcome for timeline in timelines] == ["cancelled", "length"]
    assert timelines[1].prompt_tokens == 3


def test_what_is_drawn_says_how_and_the_others_are_greedy(server):
    bodies: list[dict] = []

    class Heard(Endpoint):
        def request(self, method: str, path: str, body: bytes = b"") -> bytes:
            bodies.append(json.loads(body))
            return super().request(method, path, body)

    asks = [ask(num_tokens=2), replace(ask(num_tokens=2), temperature=0.7, top_p=0.9)]

    check_timelines(asks, run(drive_server(Heard(server), asks, model_of)))

    greedy, drawn = bodies
    assert {"temperature": 0.7, "top_p": 0.9, "seed": 1}.items() <= drawn.items()
    assert greedy["temperature"] == 0.0
    assert not {"top_p", "seed"} & greedy.keys()


def test_an_answer_that_is_refused_fails_with_the_servers_words(server):
    asks = [ask(num_tokens=2, adapter=99)]

    timelines = run(drive_server(Endpoint(server), asks, model_of))

    assert timelines[0].outcome == "failed"
    with pytest.raises(CheckFailed) as caught:
        check_timelines(asks, timelines)
    assert "status 404" in str(caught.value.cause)


def test_floras_own_server_gives_rows_and_no_page_is_left(tmp_path):
    """Cold and warm, Gamma arrivals, clients that go away midway."""
    bench = ServeBench(setting=TINY, engine=ENGINE, seeds=(42, 43), rate=100.0, cancel=0.3)

    rows = list(measure_own_server(bench, Clients(), WHERE, scratch=tmp_path))

    assert [(row.system, row.order) for row in rows] == [("flora-http", "cold"), ("flora-http", "warm")]
    assert all(row.completed + row.cancelled == row.requests == 10 and row.cancelled > 0 for row in rows)
    assert all(row.kv_pages_left == 0 for row in rows)
    assert rows[0].loads == rows[0].distinct
    assert (rows[0].kernels or {})["paged_attention"] == "cpu"
    assert rows[0].version
    assert rows[0].steps
    assert not list(tmp_path.iterdir()), "no folder is left behind"


def test_a_server_that_does_not_come_up_is_quoted(tmp_path):
    engine = msgspec.structs.replace(ENGINE, base=tmp_path, registry=str(tmp_path / "registry"), cache_dir=tmp_path)

    with (
        pytest.raises(ServeError) as caught,
        running_server(ServeConfig(engine=engine, base_name="x", port=0), tmp_path / "log"),
    ):
        pass

    assert "holds no safetensors weights" in str(caught.value.cause)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A server that gives every connection this answer, and ends it."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_request_that_the_server_gives_up_for_its_objective_is_an_abort():
    body = json.dumps(envelope(DeadlineMissed("the first token would come too late"))).encode()
    head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Length: {len(body)}\r\n\r\n"

    with answering(head.encode() + body) as url:
        [timeline] = run(drive_server(Endpoint(url), [ask(num_tokens=2)], model_of))

    assert timeline.outcome == "aborted"


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        (b"", "the connection ended within the answer"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "this is not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhal", "the connection ended within the answer"),
    ],
)
def test_what_is_no_whole_answer_is_an_error_with_the_servers_address(answer, named):
    with answering(answer) as url, pytest.raises(RemoteError) as caught:
        run(drive_server(Endpoint(url), [ask(num_tokens=2)], model_of))

    assert url in str(caught.value)
    assert named in str(caught.value.cause)


def test_a_stream_that_breaks_off_with_an_error_fails_with_its_words():
    events = b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "weights overflow"}}\n\n'

    with answering(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events) as url:
        [timeline] = run(drive_server(Endpoint(url), [ask(num_tokens=2)], model_of))

    assert (timeline.outcome, len(timeline.piece_s)) == ("failed", 1)
    assert "weights overflow" in timeline.message
