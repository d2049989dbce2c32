import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flora.serve.frontend.detokenize import Detokenizer
from flora.serve.frontend.tokenizer import Tokenizer
from tests.serve.frontend.vocabularies import byte_fallback, byte_level

TOKENIZERS = {"byte-level": byte_level(), "byte-fallback": byte_fallback()}
token_ids = st.lists(st.integers(0, 270), max_size=120)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(ids=token_ids, skip=st.booleans())
@example(ids=[200] * 90, skip=True)
def test_the_pieces_of_any_tokens_join_to_the_text_of_all_at_once(kind: str, ids: list[int], skip: bool):
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)

    pieces = [detokenizer.push([token]) for token in ids]

    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(max_size=60))
def test_half_a_character_is_never_given_out(kind: str, text: str):
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)

    pieces = [detokenizer.push([token]) for token in ids]

    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_a_character_goes_out_with_its_last_byte():
    tokenizer = TOKENIZERS["byte-level"]
    ids = tokenizer.encode("é☃", add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer)

    pieces = [detokenizer.push([token]) for token in ids]

    assert pieces[-1] == "☃"
    assert "".join(pieces) == "é☃"


def test_a_long_answer_is_decoded_in_a_window_of_bounded_size(monkeypatch: pytest.MonkeyPatch):
    tokenizer = TOKENIZERS["byte-level"]
    sizes: list[int] = []
    decode = Tokenizer.decode

    def counting(self: Tokenizer, ids: list[int], **options: bool) -> str:
        sizes.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    detokenizer = Detokenizer(tokenizer)
    for token in tokenizer.encode("the quick brown fox " * 100):
        detokenizer.push([token])

    assert max(sizes) <= 40
