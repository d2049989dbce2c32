"""What the scheduler's switches look like from outside: usage, metrics, and one sentence for who is refused."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from flora.serve.request import AdapterTarget
from tests.serve.api.servers import BASE, Server, World, running

PROMPT = "the quick brown fox jumps over the lazy dog, and then it sleeps for a while"
ASKED: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}


# --- the prefix cache ---


def test_usage_and_metrics_tell_what_came_from_the_prefix_cache(world: World):
    with running(world.config()) as server:
        client = server.client()
        first, again, adapted = (client.completions.create(model=model, **ASKED) for model in (BASE, BASE, "sql"))
        chat = [
            client.chat.completions.create(
                model=BASE, messages=[{"role": "user", "content": PROMPT}], max_tokens=4, stream=True,
                stream_options={"include_usage": True},
            )
            for _ in range(2)
        ]  # fmt: skip
        streamed = [list(chunks)[-1].usage for chunks in chat]
        server.settle()

        assert first.usage.prompt_tokens_details.cached_tokens == 0
        cached = again.usage.prompt_tokens_details.cached_tokens
        assert cached == (first.usage.prompt_tokens - 1) // 16 * 16 > 0
        assert again.choices[0].text == first.choices[0].text
        assert adapted.usage.prompt_tokens_details.cached_tokens == 0
        assert streamed[0].prompt_tokens_details.cached_tokens == 0
        assert streamed[1].prompt_tokens_details.cached_tokens > 0
        hits = cached + streamed[1].prompt_tokens_details.cached_tokens
        assert server.metric("vllm:prefix_cache_hits_total") == hits
        asked = 3 * first.usage.prompt_tokens + 2 * streamed[0].prompt_tokens
        assert server.metric("vllm:prefix_cache_queries_total") == asked
        assert server.metric("flora:pages", use="kv") == 0
        assert server.metric("flora:pages", use="prefix") > 0
        assert server.metric("vllm:kv_cache_usage_perc") < server.metric("flora:pages", use="adapter")
        assert server.stop() == 0


def test_without_the_prefix_cache_nothing_is_kept(world: World):
    with running(world.config(engine={"prefix_cache": False})) as server:
        usages = [server.client().completions.create(model=BASE, **ASKED).usage for _ in range(2)]
        server.settle()

        assert {usage.prompt_tokens_details.cached_tokens for usage in usages} == {0}
        assert server.metric("flora:pages", use="prefix") == 0


# --- early abort ---


@pytest.mark.parametrize("stream", [False, True])
def test_who_cannot_be_answered_in_time_hears_of_it_with_503(world: World, stream: bool):
    """No first token comes within a microsecond."""
    with running(world.config(engine={"slo_ttft_s": 1e-6})) as server:
        answer = server.post("/v1/completions", {"model": BASE, "stream": stream} | ASKED)
        server.settle()

        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        error = answer.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "first_token_too_late")
        assert error["message"].startswith("the first token cannot come within 1e-06 s. Cause: the request waited")
        assert server.metric("flora:requests_aborted_total") == 1


# --- merge mode ---


@pytest.fixture(scope="module")
def merged(world: World) -> Iterator[Server]:
    with world.registry as registry:
        version = registry.resolve("sql@v2")
    target = AdapterTarget(serving_digest=version.serving_digest, version_digest=version.digest, label="sql@v2")
    with running(world.config(engine={"merge": target})) as server:
        yield server
        assert server.stop() == 0


def test_the_merged_adapter_answers_to_every_name_of_its_weights(world: World, merged: Server, server: Server):
    expected = server.client().completions.create(model="sql@v2", logprobs=1, **ASKED)

    for name in ("sql@v2", "sql", f"{BASE}:sql@v2"):
        answer = merged.client().completions.create(model=name, logprobs=1, **ASKED)
        assert answer.choices[0].text == expected.choices[0].text
        assert answer.model == name
        assert answer.choices[0].logprobs.token_logprobs == pytest.approx(
            expected.choices[0].logprobs.token_logprobs, abs=1e-4
        )
        assert answer.system_fingerprint == expected.system_fingerprint
    assert merged.post("/v1/completions", ASKED).json()["model"] == "sql@v2"


@pytest.mark.parametrize("name", [BASE, "sql@v1", "team/poems", "nobody"])
def test_a_merged_server_refuses_every_other_model(merged: Server, name: str):
    with pytest.raises(openai.NotFoundError) as refused:
        merged.client().completions.create(model=name, **ASKED)

    assert refused.value.code == "model_not_found"
    if name != "nobody":
        assert "serves sql@v2 only, merged into its base" in refused.value.message


def test_a_merged_server_lists_one_model_and_loads_none(merged: Server):
    [card] = merged.get("/v1/models").json()["data"]
    loaded = merged.post("/v1/load_lora_adapter", {"lora_name": "team/poems"})
    unloaded = merged.post("/v1/unload_lora_adapter", {"lora_name": "sql@v2"})

    assert (card["id"], card["root"], card["flora"]["residency"]) == ("sql@v2", "sql@v2", "cpu")
    assert loaded.status_code == unloaded.status_code == 400
    assert "merged into its base" in loaded.json()["error"]["message"]
    assert "is merged into the base, and cannot be unloaded" in unloaded.json()["error"]["message"]
