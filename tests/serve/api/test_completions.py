"""/v1/completions, judged by the official client and by transformers' generate."""

import math

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from flora.serve.frontend.tokenizer import Tokenizer
from tests.serve.api.servers import BASE, Server, World

PROMPTS = ["the quick brown fox", "héllo wörld", "system said so 你好", "a"]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Tokenizer:
    return Tokenizer.load(world.base)


def test_greedy_text_is_that_of_transformers(client: openai.OpenAI, world: World, tokenizer: Tokenizer):
    judge = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        expected = judge.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()

        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=24, temperature=0)

        ends = expected[-1] == 2
        assert answer.choices[0].text == tokenizer.decode(expected)
        assert answer.choices[0].finish_reason == ("stop" if ends else "length")
        assert answer.usage.completion_tokens == len(expected) - ends


def test_an_answer_says_what_it_is(client: openai.OpenAI):
    answer = client.completions.create(model=BASE, prompt="the quick", max_tokens=3, temperature=0)

    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.model == BASE
    assert answer.choices[0].index == 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 3
    assert answer.system_fingerprint.endswith("-base")


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI):
    asked = {
        "model": BASE,
        "prompt": PROMPTS[1],
        "max_tokens": 40,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.completions.create(**asked)

    chunks = list(client.completions.create(**asked, stream=True))

    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert len(chunks) > 10
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI):
    asked = {"model": BASE, "prompt": "the", "max_tokens": 5, "stream": True, "extra_body": {"ignore_eos": True}}

    *chunks, last = client.completions.create(**asked, stream_options={"include_usage": True})

    assert last.choices == []
    assert last.usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks)

    running = client.completions.create(**asked, stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in running]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_every_form_of_prompt_is_answered_in_order(client: openai.OpenAI, tokenizer: Tokenizer):
    def texts(prompt: object) -> list[str]:
        answer = client.completions.create(model=BASE, prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.index for choice in answer.choices] == list(range(len(answer.choices)))
        return [choice.text for choice in answer.choices]

    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    alone = [texts(prompt)[0] for prompt in PROMPTS]

    assert texts(PROMPTS) == alone
    assert texts(ids) == alone
    assert texts(ids[0]) == alone[:1]


def test_n_choices_of_each_prompt(client: openai.OpenAI):
    asked = {"model": BASE, "prompt": PROMPTS[:2], "max_tokens": 12, "seed": 5, "extra_body": {"ignore_eos": True}}

    answer = client.completions.create(**asked, n=2)

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text != answer.choices[1].text
    assert answer.usage.completion_tokens == 4 * 12
    one = client.completions.create(**asked, n=1)
    assert [choice.text for choice in one.choices] == [answer.choices[0].text, answer.choices[2].text]
    assert one.usage.prompt_tokens == answer.usage.prompt_tokens

    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == [choice.text for choice in answer.choices]


def test_a_seed_gives_the_same_text_again_and_none_does_not(client: openai.OpenAI):
    def text(**options: int) -> str:
        asked = {"model": BASE, "prompt": "the", "max_tokens": 24, "temperature": 1.5}
        return client.completions.create(**asked, **options, extra_body={"ignore_eos": True}).choices[0].text

    assert text(seed=11) == text(seed=11)
    assert text(seed=11) != text(seed=12)
    assert text() != text()


def test_top_k_of_one_is_greedy(client: openai.OpenAI):
    asked = {"model": BASE, "prompt": "the fox", "max_tokens": 12}
    greedy = client.completions.create(**asked, temperature=0).choices[0].text

    assert client.completions.create(**asked, temperature=2, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**asked, temperature=2, top_p=1e-9).choices[0].text == greedy
    assert client.completions.create(**asked, temperature=0, extra_body={"top_k": -1}).choices[0].text == greedy


def test_logprobs_have_openais_shape(client: openai.OpenAI, tokenizer: Tokenizer):
    asked = {"model": BASE, "prompt": "the", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}

    choice = client.completions.create(**asked, logprobs=3).choices[0]

    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 8
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values()) == top[token]
        assert math.exp(sum(top.values())) < 1
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)

    pieces = list(client.completions.create(**asked, logprobs=3, stream=True))
    streamed = [token for piece in pieces for token in piece.choices[0].logprobs.tokens]
    assert streamed == logprobs.tokens
    assert client.completions.create(**asked).choices[0].logprobs is None
    assert len(client.completions.create(**asked, logprobs=0).choices[0].logprobs.top_logprobs[0]) == 1


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: openai.OpenAI):
    asked = {
        "model": BASE,
        "prompt": "the quick",
        "max_tokens": 48,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    text = client.completions.create(**asked).choices[0].text
    stop = text[12:15]
    at = text.index(stop)

    answer = client.completions.create(**asked, stop=[stop, "never to be seen"])

    assert answer.choices[0].text == text[:at]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop
    assert answer.usage.completion_tokens < 48
    pieces = list(client.completions.create(**asked, stop=stop, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == text[:at]
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_a_stop_token_of_the_client_ends_the_answer(client: openai.OpenAI, tokenizer: Tokenizer):
    asked = {"model": BASE, "prompt": "the quick", "max_tokens": 16, "temperature": 0}
    first = client.completions.create(**asked, logprobs=0).choices[0].logprobs.tokens[0]
    token = next(token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token) == first.encode())

    choice = client.completions.create(**asked, extra_body={"stop_token_ids": [token]}).choices[0]

    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("", "stop", token)


def test_the_context_ends_an_answer(client: openai.OpenAI):
    answer = client.completions.create(
        model=BASE, prompt=[5] * 500, max_tokens=400, temperature=0, extra_body={"ignore_eos": True}
    )

    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"


def test_unknown_fields_are_ignored_and_named_in_a_header(server: Server):
    body = {"model": BASE, "prompt": "the", "max_tokens": 1, "frobnicate": 1, "bad\r\nname": 2, "user": "me"}

    answer = server.post("/v1/completions", body)

    assert answer.status_code == 200
    assert answer.headers["x-flora-ignored-fields"] == "frobnicate, ?"
