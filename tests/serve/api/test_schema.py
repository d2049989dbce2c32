import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora.errors import RequestInvalid
from flora.serve.api.parsing import parse
from flora.serve.api.schema import ChatBody, CompletionBody, LoadBody

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "hi"}


def completion(**fields: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps(COMPLETION | fields).encode())[0]


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps(CHAT | fields).encode())[0]


def refused(kind: type, data: dict[str, Any] | bytes) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        parse(kind, data if isinstance(data, bytes) else json.dumps(data).encode())
    return caught.value


def test_what_a_client_leaves_out_has_openais_defaults():
    [sampling] = completion(seed=1).samplings(max_tokens=16, end_tokens=(2,))

    assert completion().answer_tokens == 16
    assert chat().answer_tokens is None
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.logprobs) == (1.0, 1.0, None, None)
    assert sampling.stop_token_ids == (2,)


def test_null_is_as_good_as_absent():
    nothing = dict.fromkeys(["max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logprobs"])

    assert completion(**nothing).model_dump() == completion().model_dump()


def test_every_shape_of_prompt_becomes_a_list():
    assert completion(prompt="a").prompt == ["a"]
    assert completion(prompt=["a", "b"]).prompt == ["a", "b"]
    assert completion(prompt=[1, 2]).prompt == [[1, 2]]
    assert completion(prompt=[[1], [2, 3]]).prompt == [[1], [2, 3]]


def test_choices_differ_in_their_seed_only():
    samplings = completion(n=3, seed=7).samplings(max_tokens=4, end_tokens=())

    assert [sampling.seed for sampling in samplings] == [7, 8, 9]
    assert completion(seed=-1).samplings(max_tokens=4, end_tokens=())[0].seed == 2**63 - 1
    unseeded = completion().samplings(max_tokens=4, end_tokens=())[0].seed
    assert unseeded != completion().samplings(max_tokens=4, end_tokens=())[0].seed


def test_ignore_eos_leaves_the_clients_own_stop_tokens():
    [sampling] = completion(ignore_eos=True, stop_token_ids=[5]).samplings(max_tokens=4, end_tokens=(2,))
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((5,), False)

    [sampling] = completion(ignore_eos=True).samplings(max_tokens=4, end_tokens=(2,))
    assert (sampling.stop_token_ids, sampling.ignore_eos) == ((), True)


def test_parts_of_a_content_are_lines_of_one_text():
    message = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}

    assert chat(messages=[message]).messages[0].for_template() == {"role": "user", "content": "a\nb"}


OUT_OF_BOUNDS = [
    ("temperature", [-1, 2.1, "1", [], {}, True]),
    ("top_p", [-1, 0, 1.1, "1", []]),
    ("top_k", [-2, 2**31, 1.5, "1"]),
    ("n", [-1, 0, 17, 2**31, 2**63, 1.0, "1", []]),
    ("max_tokens", [-1, 0, 2**31, 2**63, 1.5, "1", []]),
    ("seed", [2**63, -(2**63) - 1, 0.5, "1", []]),
    ("stop", ["", [""], ["x"] * 17, "x" * 257, 3, [3], {}]),
    ("stop_token_ids", [[-1], ["x"], [2**31], [1] * 17, 3]),
    ("stream", [1, "true", []]),
    ("ignore_eos", [1, "true"]),
    ("model", [3, [], "x" * 513]),
]


@pytest.mark.parametrize(("field", "values"), OUT_OF_BOUNDS)
def test_a_field_out_of_its_bounds_is_named(field: str, values: list[Any]):
    for value in values:
        for kind, body in ((CompletionBody, COMPLETION), (ChatBody, CHAT)):
            assert refused(kind, body | {field: value}).param.split(".")[0] == field, value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e308", "1e400", "1" + "0" * 5000])
def test_a_number_that_is_none_is_refused(number: str):
    for field in ("temperature", "top_p", "n", "seed", "max_tokens"):
        refused(CompletionBody, f'{{"model": "m", "prompt": "x", "{field}": {number}}}'.encode())


@pytest.mark.parametrize(
    "prompt", [None, 3, {}, True, [True], [1, "a"], [["a"]], [[1, 2.5]], [None], ["x"] * 129, [[[1]]]]
)
def test_a_prompt_of_another_shape_is_refused(prompt: Any):
    assert refused(CompletionBody, {"model": "m", "prompt": prompt}).param == "prompt"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hi", "messages"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "root", "content": "x"}], "messages.0.role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "messages.0.content.0.type"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}], "messages.tool_calls"),
    ],
)
def test_messages_of_another_shape_are_refused(messages: Any, param: str):
    assert refused(ChatBody, {"model": "m", "messages": messages}).param == param


UNSUPPORTED = [
    ("tools", [{"type": "function"}], []),
    ("tool_choice", "required", "none"),
    ("logit_bias", {"5": 1}, {}),
    ("frequency_penalty", 0.5, 0.0),
    ("presence_penalty", 0.5, 0),
    ("repetition_penalty", 1.1, 1.0),
    ("best_of", 2, 1),
    ("echo", True, False),
    ("suffix", "x", None),
    ("min_p", 0.1, 0),
    ("min_tokens", 3, 0),
    ("chat_template", "{{ 1 }}", None),
    ("prompt_embeds", "AAAA", None),
    ("lora_path", "x", None),
    ("structured_outputs", {"json": {}}, None),
]


@pytest.mark.parametrize(("field", "value", "neutral"), UNSUPPORTED)
def test_what_would_have_to_change_the_answer_is_refused_and_its_neutral_value_is_not(
    field: str, value: Any, neutral: Any
):
    assert refused(CompletionBody, COMPLETION | {field: value}).param == field
    assert refused(ChatBody, CHAT | {field: value}).param == field
    assert parse(CompletionBody, json.dumps(COMPLETION | {field: neutral}).encode())[1] == []


@pytest.mark.parametrize("content", [5, None, {"type": "text", "text": "x"}, ["x"], [5]])
def test_content_of_another_type_is_told_what_to_be(content: Any):
    refusal = refused(ChatBody, CHAT | {"messages": [{"role": "user", "content": content}]})

    assert refusal.what == (
        'messages.0.content: give a string, or a list of parts such as {"type": "text", "text": "hi"}'
    )


@pytest.mark.parametrize("stop", [3, "", [""], [3], {}, "x" * 257])
def test_a_stop_string_of_another_type_is_told_what_to_be(stop: Any):
    refusal = refused(CompletionBody, COMPLETION | {"stop": stop})

    assert refusal.what == "stop: give a string of 1 to 256 characters, or a list of up to 16 of them"


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_json_output_is_refused_by_that_name(kind: str):
    told = refused(ChatBody, CHAT | {"response_format": {"type": kind}}).what

    assert "JSON output is not supported by this server" in told
    assert 'give {"type": "text"}' in refused(ChatBody, CHAT | {"response_format": kind}).what


def test_a_response_format_other_than_text_is_refused():
    assert chat(response_format={"type": "text"}).messages
    assert refused(ChatBody, CHAT | {"response_format": {"type": "json_schema"}}).param == "response_format.type"


def test_an_unknown_field_is_ignored_and_named():
    data = CHAT | {"frobnicate": 1, "user": "me", "messages": [CHAT["messages"][0] | {"mood": "good"}] * 2}

    assert parse(ChatBody, json.dumps(data).encode())[1] == ["frobnicate", "messages.mood"]


def test_template_arguments_are_plain_and_small():
    assert chat(chat_template_kwargs={"enable_thinking": False, "n": [1, {"a": "b"}]}).template_kwargs["n"]
    deep: Any = 1
    for _ in range(20):
        deep = [deep]
    for value in ({"a": deep}, {"a": [0] * 2000}, {str(i): i for i in range(65)}, [], "x"):
        assert refused(ChatBody, CHAT | {"chat_template_kwargs": value}).param.startswith("chat_template_kwargs")


def test_fields_that_need_each_other_are_checked_together():
    assert refused(ChatBody, CHAT | {"top_logprobs": 3}).param == "top_logprobs"
    assert refused(CompletionBody, COMPLETION | {"stream_options": {"include_usage": True}}).param == "stream_options"
    assert refused(CompletionBody, COMPLETION | {"prompt": ["x"] * 128, "n": 3}).param == "n"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "\\ud800", "prompt": "x"}', b"[" * 100_000]
)
def test_a_body_that_is_no_json_object_is_refused(data: bytes):
    for kind in (CompletionBody, ChatBody, LoadBody):
        refused(kind, data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(fields=st.dictionaries(st.sampled_from([*CompletionBody.model_fields, "echo", "tools"]), json_values))
def test_any_json_is_either_accepted_or_refused_in_words(fields: dict[str, Any]):
    data = json.dumps(COMPLETION | fields).encode()
    with contextlib.suppress(RequestInvalid):
        body, _ = parse(CompletionBody, data)
        assert len(body.samplings(max_tokens=body.answer_tokens, end_tokens=())) == body.num_choices
