"""What must not work: every refusal is an OpenAI error, and the next request is served by the same engine."""

import json
from typing import Any

import httpx2
import openai
import pytest

from tests.serve.api.servers import BASE, Server, World, with_extras

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": BASE, "prompt": "hi", "max_tokens": 1}


@pytest.fixture(autouse=True)
def _alive(server: Server):
    """After each refusal a good request is answered, by the same engine."""
    pid = server.engine_pid
    yield
    assert server.post("/v1/completions", COMPLETION).status_code == 200
    assert server.get("/health").status_code == 200
    assert server.engine_pid == pid


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The envelope; every part of it is there, and nothing about this machine."""
    [error] = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    assert "/tmp" not in answer.text
    return error


HOSTILE_NAMES = [
    "nobody",
    "sql@v99",
    "sql:nowhere",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "%2e%2e",
    "x#/../",
    "file:///etc/passwd",
    "http://evil.example/x",
    "nul\0byte",
    "new\r\nline",
    "right\u202eleft",
    "cyrillic-ѕql",
    "con",
    "",
    " ",
    "sql@sha256:" + "0" * 63,
    "sql@sha256:" + "A" * 64,
    "sql@sha256:" + "0" * 64,
    f"{BASE}:../x",
    f"{BASE}:",
]


def test_who_asks_a_route_that_is_none_is_told_two_that_are(server: Server):
    message = error_of(server.get("/v1/nothing"))["message"]

    assert "/v1/models" in message
    assert "/v1/chat/completions" in message


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_an_unknown_model_is_not_found(server: Server, name: str):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        answer = server.post(path, body | {"model": name})

        error = error_of(answer)
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_the_official_client_raises_what_it_should(server: Server):
    client = server.client()

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="sgl", prompt="x")
    assert caught.value.code == "model_not_found"
    assert "sql" in caught.value.message  # a near name

    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt="x", temperature=3)
    assert caught.value.param == "temperature"

    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=BASE, prompt=[5] * 512, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert caught.value.param == "prompt"

    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BASE, messages=[{"role": "user", "content": "word " * 600}])
    assert caught.value.code == "context_length_exceeded"

    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=BASE, input="x")


@pytest.mark.parametrize(
    "field",
    [
        '"temperature": NaN',
        '"temperature": 1e999',
        '"n": 9223372036854775808',
        '"n": 1000000',
        '"max_tokens": 0',
        '"top_p": 0',
        '"logprobs": 21',
        '"stop": ""',
        '"seed": "1"',
        '"prompt": []',
        '"prompt": [[]]',
        '"prompt": [-1]',
        '"prompt": [321]',
        '"prompt": [9223372036854775808]',
        '"prompt": ["a", 1]',
        '"prompt": ""',
        '"prompt": "\\ud800"',
        '"tools": [{}]',
        '"chat_template": "{{ 1 }}"',
        '"prompt_embeds": "AAAA"',
        '"lora_path": "sql"',
    ],
)
def test_a_bad_field_is_a_bad_request(server: Server, field: str):
    content = json.dumps(COMPLETION)[:-1] + f", {field}}}"

    answer = server.http.post(
        f"{server.url}/v1/completions", content=content, headers={"content-type": "application/json"}
    )

    error = error_of(answer)
    assert answer.status_code == 400
    assert error["param"] is None or error["param"].split(".")[0] == field.split('"')[1]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 50_000, b'{"a":' * 50_000])
def test_a_body_that_is_no_object_is_a_bad_request(server: Server, content: bytes):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/load_lora_adapter"):
        answer = server.http.post(f"{server.url}{path}", content=content, headers={"content-type": "application/json"})

        assert answer.status_code == 400
        error_of(answer)


def test_ten_million_ids_or_ten_megabytes_of_text_are_refused(server: Server):
    for prompt in ([7] * 3_000_000, "x" * 10_000_000):
        answer = server.post("/v1/completions", COMPLETION | {"prompt": prompt})
        assert (answer.status_code, error_of(answer)["code"]) == (413, "body_too_large")
    for prompt in ([7] * 600_000, "the " * 900_000):
        answer = server.post("/v1/completions", COMPLETION | {"prompt": prompt})
        assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")


def test_a_request_that_no_pool_could_hold_is_refused(server: Server, world: World):
    answer = server.post("/v1/completions", COMPLETION | {"prompt": ["x"] * 128, "n": 2, "max_tokens": 1})
    assert answer.status_code == 200  # 256 sequences queue for their turn

    answer = server.post("/v1/completions", COMPLETION | {"prompt": ["x"] * 128, "n": 3})
    assert answer.status_code == 400


def test_a_template_that_refuses_or_never_ends_costs_its_own_request_only(server: Server, world: World):
    templates = {
        "refusing": b"{{ raise_exception('roles must alternate') }}",
        "endless": b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "reaching": b"{{ ''.__class__.__mro__ }}",
        "broken": b"{% for %}",
    }
    for seed, (name, template) in enumerate(templates.items()):
        world.add(with_extras(world.adapter(80 + seed), {"chat_template.jinja": template}), name)
        answer = server.post("/v1/chat/completions", CHAT | {"model": name})
        assert answer.status_code == 400, name
        assert error_of(answer)["param"] == "messages"
        assert server.post("/v1/completions", COMPLETION | {"model": name}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/models", 405),
        ("DELETE", "/v1/models/sql", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v1/models?limit=0", 400),
        ("GET", "/v1/models?limit=x", 400),
        ("GET", "/v1/models/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/models//etc/passwd", 404),
    ],
)
def test_other_routes_and_methods_are_refused_in_the_same_shape(server: Server, method: str, path: str, status: int):
    headers = {"content-type": "application/json", "origin": "https://evil.example"}

    answer = server.http.request(method, f"{server.url}{path}", headers=headers)

    assert answer.status_code == status
    error_of(answer)
    assert not any(name.startswith("access-control") for name in answer.headers)
    assert "server" not in answer.headers


def test_every_answer_has_a_request_id(server: Server):
    assert len(server.get("/version").headers["x-request-id"]) == 32
    assert server.get("/version", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert server.get("/nothing", headers={"x-request-id": "a b"}).headers["x-request-id"] != "a b"


def test_metrics_stay_small_whatever_was_asked(server: Server):
    before = len(server.get("/metrics").text)
    for index in range(50):
        server.get(f"/stranger/{index}")
        server.post("/v1/completions", COMPLETION | {"model": f"nobody-{index}"})

    assert len(server.get("/metrics").text) < before + 2000
    assert "nobody" not in server.get("/metrics").text


def test_an_unknown_route_is_told_of_those_that_are_there(server: Server):
    assert "v1/models" in error_of(server.get("/"))["message"]
