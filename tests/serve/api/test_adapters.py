"""Adapters by name: mixed in one batch, added and moved while the server runs, listed, loaded and unloaded."""

import asyncio
from typing import Any

import openai
import pytest
import torch

from flora.adapter import make_adapter
from flora.lowrank import LowRank
from tests.serve.api.servers import BASE, Server, World, eventually

ASKED: dict[str, Any] = {"prompt": "the quick brown fox", "max_tokens": 32, "temperature": 0}
ENDLESS = {"extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def text(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, **ASKED, **ENDLESS).choices[0].text


async def stream_text(client: openai.AsyncOpenAI, model: str, max_tokens: int = 32) -> str:
    asked = ASKED | {"max_tokens": max_tokens}
    stream = await client.completions.create(model=model, **asked, **ENDLESS, stream=True)
    return "".join([chunk.choices[0].text async for chunk in stream])


def test_every_way_to_name_a_version_is_understood(client: openai.OpenAI, world: World):
    with world.registry as registry:
        first, second = registry.versions("sql")
        registry.set_alias("sql", "stable", first)
    by_name = {
        name: text(client, name)
        for name in ("sql", "sql@v1", "sql@v2", "sql:latest", "sql:stable", f"sql@{first.digest}", f"{BASE}:sql@v2")
    }

    assert by_name["sql"] == by_name["sql@v2"] == by_name["sql:latest"] == by_name[f"{BASE}:sql@v2"]
    assert by_name["sql@v1"] == by_name["sql:stable"] == by_name[f"sql@{first.digest}"]
    assert len({by_name["sql@v1"], by_name["sql@v2"], text(client, "team/poems"), text(client, BASE)}) == 4
    assert first.serving_digest != second.serving_digest


def test_the_answer_echoes_the_name_and_its_fingerprint_names_the_weights(client: openai.OpenAI, world: World):
    with world.registry as registry:
        version = registry.resolve("sql@v1")

    answer = client.completions.create(model=f"{BASE}:sql@v1", **ASKED)

    assert answer.model == f"{BASE}:sql@v1"
    assert answer.system_fingerprint.endswith(version.serving_digest.removeprefix("sha256:")[:12])


def test_mixed_streams_are_each_what_they_are_alone(server: Server, client: openai.OpenAI):
    models = [BASE, "sql@v1", "sql@v2", "team/poems"]
    alone = {model: text(client, model) for model in models}

    async def together() -> list[tuple[str, str]]:
        async with server.async_client() as client:
            wanted = models * 4
            return list(zip(wanted, await asyncio.gather(*(stream_text(client, m) for m in wanted)), strict=True))

    for model, answer in asyncio.run(together()):
        assert answer == alone[model], model


def test_an_adapter_added_while_streams_run_is_served(server: Server, client: openai.OpenAI, world: World):
    alone = {model: text(client, model) for model in (BASE, "sql")}

    async def add_meanwhile() -> tuple[list[str], str]:
        async with server.async_client() as client:
            running = [asyncio.create_task(stream_text(client, model, 64)) for model in alone]
            with pytest.raises(openai.NotFoundError):
                await stream_text(client, "newcomer")
            await asyncio.to_thread(world.add, world.adapter(21), "newcomer")
            newcomer = await stream_text(client, "newcomer")
            return await asyncio.gather(*running), newcomer

    streams, newcomer = asyncio.run(add_meanwhile())

    assert [stream.startswith(expected) for stream, expected in zip(streams, alone.values(), strict=True)] == [True] * 2
    assert newcomer == text(client, "newcomer")
    assert newcomer not in alone.values()


def test_a_moved_alias_and_a_new_version_count_from_the_next_request(client: openai.OpenAI, world: World):
    world.add(world.adapter(31), "moving")
    first = text(client, "moving")
    world.add(world.adapter(32), "moving")
    second = text(client, "moving")
    assert first != second

    with world.registry as registry:
        registry.set_alias("moving", "prod", registry.resolve("moving@v1"))
    assert text(client, "moving") == first

    with world.registry as registry:
        registry.remove("moving@v2")
    with pytest.raises(openai.NotFoundError):
        text(client, "moving@v2")


def test_models_are_listed_with_their_cards(client: openai.OpenAI, server: Server, world: World):
    text(client, "team/poems")
    eventually(lambda: client.models.retrieve("team/poems").flora["residency"] == "cpu")
    with world.registry as registry:
        version = registry.resolve("team/poems")

    cards = {card.id: card for card in client.models.list()}

    assert (cards[BASE].root, cards[BASE].parent, cards[BASE].max_model_len) == (BASE, None, 512)
    card = cards["team/poems"]
    assert (card.object, card.root, card.parent) == ("model", "team/poems@v1", BASE)
    assert card.created == int(version.created_at.timestamp())
    assert card.flora["rank"] == version.max_rank
    assert card.flora["digest"] == version.digest
    assert card.flora["aliases"] == {"latest": 1}
    assert client.models.retrieve("sql@v1").flora["version"] == 1
    assert client.models.retrieve(BASE).id == BASE
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_a_long_list_comes_in_pages(server: Server):
    everything = [card["id"] for card in server.get("/v1/models").json()["data"]]

    found: list[str] = []
    query = "?limit=2"
    while True:
        page = server.get(f"/v1/models{query}").json()
        found += [card["id"] for card in page["data"]]
        assert page["last_id"] == found[-1]
        if not page["has_more"]:
            break
        query = f"?limit=2&after={page['last_id']}"

    assert found == everything
    assert found[0] == BASE
    assert server.get("/v1/models?after=zzz").json()["data"] == []


def test_load_makes_an_adapter_resident_and_unload_gives_its_pages_back(server: Server, world: World):
    world.add(world.adapter(41), "loaded")

    answer = server.post("/v1/load_lora_adapter", {"lora_name": "loaded", "lora_path": "loaded@v1"})

    assert answer.status_code == 200
    assert answer.json()["success"] is True
    assert answer.json()["loaded_adapters"]["loaded"] == "loaded@v1"
    eventually(lambda: server.get("/v1/models/loaded").json()["flora"]["residency"] == "cpu")

    answer = server.post("/v1/unload_lora_adapter", {"lora_name": "loaded"})

    assert answer.json()["was_resident"] is True
    assert "loaded" not in answer.json()["loaded_adapters"]
    eventually(lambda: server.get("/v1/models/loaded").json()["flora"]["residency"] == "disk")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "loaded"}).json()["was_resident"] is False


def test_what_no_name_means_any_more_is_told_and_unloaded_by_its_digest(server: Server, world: World):
    def resident() -> dict[str, dict[str, Any]]:
        return {adapter["label"]: adapter for adapter in server.get("/v1/models").json()["flora"]["resident"]}

    version = world.add(world.adapter(42), "gone")
    assert server.post("/v1/load_lora_adapter", {"lora_name": "gone"}).status_code == 200
    with world.registry as registry:
        registry.remove("gone@v1", force=True)
    eventually(lambda: "gone" in resident())
    told = resident()["gone"]

    assert server.post("/v1/unload_lora_adapter", {"lora_name": "gone"}).status_code == 404
    answer = server.post("/v1/unload_lora_adapter", {"lora_name": told["serving_digest"]})

    assert told["serving_digest"] == version.serving_digest
    assert (told["rank"], told["residency"]) == (version.max_rank, "cpu")
    assert told["bytes"] > 0
    assert answer.json()["was_resident"] is True
    eventually(lambda: "gone" not in resident())
    again = server.post("/v1/unload_lora_adapter", {"lora_name": told["serving_digest"]})
    assert again.status_code == 404
    assert "no adapter of that digest is loaded" in again.json()["error"]["message"]


def test_a_loaded_name_may_be_the_clients_own(server: Server, client: openai.OpenAI):
    server.post("/v1/load_lora_adapter", {"lora_name": "nick", "lora_path": "sql@v1", "load_inplace": True})

    assert text(client, "nick") == text(client, "sql@v1")
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "nick"}).status_code == 200
    with pytest.raises(openai.NotFoundError):
        text(client, "nick")


@pytest.mark.parametrize(
    ("lora_name", "lora_path", "status"),
    [
        ("x", "/etc/passwd", 400),
        ("x", "../../secret", 400),
        ("x", "https://evil.example/adapter", 400),
        ("x", "nobody", 404),
        ("sql", "team/poems", 400),
        ("sql", "sql@v1", 400),
        (BASE, "sql", 400),
        ("a b", "sql", 400),
        (BASE, BASE, 400),
    ],
)
def test_load_takes_references_only_and_names_that_are_free(
    server: Server, lora_name: str, lora_path: str, status: int
):
    answer = server.post("/v1/load_lora_adapter", {"lora_name": lora_name, "lora_path": lora_path})

    assert answer.status_code == status
    assert not any(part in answer.text for part in ("passwd", "secret", "evil"))
    assert server.post("/v1/completions", {"model": "x", "prompt": "a"}).status_code == 404


def test_a_refused_load_names_the_field_that_is_wrong(server: Server):
    def param(route: str, **body: str) -> str:
        return server.post(f"/v1/{route}_lora_adapter", body).json()["error"]["param"]

    assert param("load", lora_name="nobody") == "lora_name"
    assert param("load", lora_name="x", lora_path="nobody") == "lora_path"
    assert param("load", lora_name=BASE) == "lora_name"
    assert param("unload", lora_name="nobody") == "lora_name"


def test_unload_of_an_unknown_name_or_the_base_is_refused(server: Server):
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "nobody"}).status_code == 404
    assert server.post("/v1/unload_lora_adapter", {"lora_name": BASE}).status_code == 400


def test_an_adapter_of_another_base_is_refused_with_the_reason(client: openai.OpenAI, world: World):
    world.add(world.adapter(51, base_id="sha256:" + "0" * 64), "foreign")

    with pytest.raises(openai.BadRequestError) as caught:
        text(client, "foreign")

    assert caught.value.param == "model"
    assert "base" in caught.value.message
    assert "foreign" not in [card.id for card in client.models.list()]
    text(client, "sql")


def test_a_damaged_adapter_fails_alone(client: openai.OpenAI, world: World):
    before = text(client, "sql")
    known = set(world.blobs())
    world.add(world.adapter(61), "damaged")
    weights = max(set(world.blobs()) - known, key=lambda blob: blob.stat().st_size)
    weights.chmod(0o600)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(openai.InternalServerError) as caught:
        text(client, "damaged")

    assert str(world.home) not in caught.value.message
    assert text(client, "sql") == before


def test_an_adapter_with_a_part_that_cannot_be_applied_is_refused(client: openai.OpenAI, world: World):
    plain = world.adapter(71)
    embedding = LowRank(A=torch.ones(1, 64), B=torch.ones(321, 1), scale=1.0)
    factors = dict(plain.factors) | {"model.embed_tokens": embedding}
    world.add(make_adapter(factors, plain.header.base, plain.header.recipe), "embedding")

    with pytest.raises(openai.UnprocessableEntityError, match="embed_tokens"):
        text(client, "embedding")
