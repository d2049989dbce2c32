"""What the command line says where something else than a Flora server answers, with a small server of that kind."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.cli.conftest import Flora

HTML = b"<html><body>" + b"<p>It works!</p>" * 100 + b"</body></html>"
CHUNK = {"choices": [{"text": "half an ans", "finish_reason": None}]}
Answering = Callable[[int, str, bytes], AbstractContextManager[str]]


@pytest.fixture
def paths() -> list[str]:
    """What was asked for."""
    return []


@pytest.fixture
def answering(paths: list[str]) -> Answering:
    """A server that answers every request alike; its URL."""

    @contextmanager
    def server(status: int, media_type: str, body: bytes) -> Iterator[str]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_response(status)
                self.send_header("content-type", media_type)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.do_GET()

            def log_message(self, *_: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
            thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"http://127.0.0.1:{listening.server_port}"
            finally:
                listening.shutdown()
                thread.join()

    return server


VERBS = [["run", "sql", "x"], ["run", "sql", "x", "--chat"], ["ps"], ["load", "sql"], ["unload", "sql"]]
STRANGERS = [
    (200, "text/html; charset=utf-8", HTML),
    (404, "text/html", HTML),
    (200, "application/json", b"[1, 2]"),
    (200, "application/json", b"{}"),
    (200, "text/event-stream", b"data: tick\n\n"),
    (404, "application/json", b'{"detail": "Not Found"}'),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize(("status", "media_type", "body"), STRANGERS)
def test_another_program_is_no_flora_server(
    flora: Flora, answering: Answering, verb: list[str], status: int, media_type: str, body: bytes
):
    with answering(status, media_type, body) as url:
        done = flora(*verb, "--server", url, code=1)

    assert done.out == ""
    assert done.err.startswith(f"error[FL-REMOTE]: no Flora server answers at {url}\n")
    assert "cause: " in done.err
    assert "fix: start one with `flora serve`, or name another with --server URL" in done.err
    assert "It works!" not in done.err


@pytest.mark.parametrize(
    "body",
    [
        b'{"data": ["a"]}',
        b'{"data": [{"type": "models"}]}',
        b'{"data": [{"id": "a", "flora": 1}]}',
        b'{"data": [], "flora": {"resident": [{}]}}',
        b'{"data": [], "has_more": true}',
    ],
)
def test_a_list_of_something_else_is_no_list_of_models(flora: Flora, answering: Answering, body: bytes):
    with answering(200, "application/json", body) as url:
        done = flora("ps", "--server", url, code=1)

    assert done.err.startswith(f"error[FL-REMOTE]: no Flora server answers at {url}\n")


@pytest.mark.parametrize("verb", ["load", "unload"])
@pytest.mark.parametrize("body", [b'{"flora": {}}', b'{"flora": {"ref": "sql@v1"}}'])
def test_an_answer_that_does_not_say_what_was_done_is_no_flora_servers(
    flora: Flora, answering: Answering, verb: str, body: bytes
):
    with answering(200, "application/json", body) as url:
        done = flora(verb, "sql", "--server", url, code=1)

    assert done.err.startswith(f"error[FL-REMOTE]: no Flora server answers at {url}\n")


@pytest.mark.parametrize("chat", [[], ["--chat"]])
@pytest.mark.parametrize(
    "event", [b'{"choices": 1}', b'{"choices": ["a"]}', b'{"choices": [{"text": 1, "delta": {"content": 1}}]}']
)
def test_events_of_something_else_are_no_pieces_of_an_answer(
    flora: Flora, answering: Answering, chat: list[str], event: bytes
):
    with answering(200, "text/event-stream", b"data: " + event + b"\n\ndata: [DONE]\n\n") as url:
        done = flora("run", "sql", "x", *chat, "--server", url, code=1)

    assert done.err.startswith(f"error[FL-REMOTE]: no Flora server answers at {url}\n")


def test_an_error_amid_a_stream_is_told_whatever_its_form(flora: Flora, answering: Answering):
    for told in (b'{"error": {"message": "out of memory"}}', b'{"error": "out of memory"}'):
        with answering(200, "text/event-stream", b"data: " + told + b"\n\ndata: [DONE]\n\n") as url:
            done = flora("run", "sql", "x", "--server", url, code=1)

        assert "the server refused: " in done.err
        assert "out of memory" in done.err


def test_a_page_of_a_broken_gateway_is_not_shown(flora: Flora, answering: Answering):
    with answering(502, "text/html", HTML) as url:
        done = flora("ps", "--server", url, code=1)

    assert "the server refused: status 502" in done.err
    assert "<html>" not in done.err


def test_a_stream_that_ends_without_done_is_an_error(flora: Flora, answering: Answering):
    body = b"data: " + json.dumps(CHUNK).encode() + b"\n\n"

    with answering(200, "text/event-stream", body) as url:
        broken = flora("run", "sql", "x", "--server", url, code=1)
    with answering(200, "text/event-stream", body + b"data: [DONE]\n\n") as url:
        whole = flora("run", "sql", "x", "--server", url)

    assert "error[FL-REMOTE]" in broken.err
    assert "broke off" in broken.err
    assert whole.out == "half an ans\n"


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/", ""])
def test_a_servers_url_may_have_the_version_that_other_clients_want(
    flora: Flora, answering: Answering, monkeypatch: pytest.MonkeyPatch, paths: list[str], end: str
):
    with answering(200, "application/json", b'{"data": [], "has_more": false}') as url:
        monkeypatch.setenv("FLORA_SERVER_URL", url + end)
        flora("ps")

    assert {path.partition("?")[0] for path in paths} == {"/v1/models"}
