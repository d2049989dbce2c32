import pytest

from flora.errors import ServeError
from flora.serve.frontend.answer import Choice, Piece
from flora.serve.messages import TokenEvent, TokenLogprobs
from tests.serve.frontend.vocabularies import byte_level

TOKENIZER = byte_level()


def event(text: str = "", **fields: object) -> TokenEvent:
    ids = tuple(TOKENIZER.encode(text, add_special_tokens=False))
    return TokenEvent(request_id="r", token_ids=ids, **fields)


def test_text_and_tokens_add_up():
    choice = Choice(TOKENIZER)

    pieces = [choice.push(event("the quick ")), choice.push(event("fox", finish_reason="length"))]

    assert [piece.text for piece in pieces] == ["the quick ", "fox"]
    assert pieces[-1].finish_reason == choice.finish_reason == "length"
    assert choice.num_tokens == len(TOKENIZER.encode("the quick ")) + len(TOKENIZER.encode("fox"))


def test_tokens_behind_a_stop_string_are_neither_shown_nor_counted():
    choice = Choice(TOKENIZER, stop=("ov",))
    before = len(TOKENIZER.encode("ab ov", add_special_tokens=False))

    piece = choice.push(event("ab over the lazy dog"))

    assert piece == Piece("ab ", (), "stop", "ov")
    assert choice.num_tokens <= before + 1


def test_a_stop_string_that_only_the_end_completes_is_found():
    choice = Choice(TOKENIZER, stop=("\ufffd",))
    assert len(event("☃").token_ids) > 1
    half = TokenEvent(request_id="r", token_ids=event("☃").token_ids[:1], finish_reason="length")

    piece = choice.push(half)

    assert (piece.text, piece.finish_reason, piece.stop_reason) == ("", "stop", "\ufffd")


def test_the_models_end_is_told_from_the_clients_stop_token():
    by_model = Choice(TOKENIZER, stop_token_ids=(7,)).push(event("a", finish_reason="stop", stop_token=2))
    by_client = Choice(TOKENIZER, stop_token_ids=(7,)).push(event("a", finish_reason="stop", stop_token=7))

    assert (by_model.finish_reason, by_model.stop_reason) == ("stop", None)
    assert (by_client.finish_reason, by_client.stop_reason) == ("stop", 7)


def test_scores_go_out_with_the_text_of_their_tokens():
    choice = Choice(TOKENIZER, stop=("zzz",))
    scores = tuple(TokenLogprobs(-float(index)) for index in range(8))
    ids = event("z").token_ids

    held = choice.push(TokenEvent(request_id="r", token_ids=ids, logprobs=scores[: len(ids)]))
    freed = choice.push(event("a", logprobs=scores[-1:]))

    assert held == Piece("")
    assert freed.text == "za"
    assert [token.offset for token in freed.tokens] == [0, 1]


def test_a_sequence_that_the_engine_gave_up_is_an_error():
    for reason in ("error", "cancelled"):
        with pytest.raises(ServeError):
            Choice(TOKENIZER).push(event("", finish_reason=reason, error="the weights overflow"))
