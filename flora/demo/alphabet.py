"""Characters to token ids and back, and the `tokenizer.json` that tells others the same."""

import json
from string import ascii_lowercase, digits
from typing import Any

UNKNOWN, START, END = 0, 1, 2
_SPECIALS = ("<unk>", "<s>", "</s>")
_CHARACTERS = ascii_lowercase + digits + " :=.,;!?-+*/()'\"_<>&%#@$"
VOCABULARY = (*_SPECIALS, *_CHARACTERS)
_IDS = {token: i for i, token in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """One id for each character, without start or end."""
    return [_IDS.get(character, UNKNOWN) for character in text]


def decode(ids: list[int]) -> str:
    return "".join(VOCABULARY[i] for i in ids if i >= len(_SPECIALS))


def tokenizer_files() -> dict[str, str]:
    """File name -> contents, as `tokenizers` and transformers read them."""
    return {
        "tokenizer.json": json.dumps(_tokenizer_json(), ensure_ascii=False, indent=1),
        "tokenizer_config.json": json.dumps(_tokenizer_config(), indent=1),
    }


def _tokenizer_json() -> dict[str, Any]:
    """Byte-pair encoding without a single merge: every character stays a token of its own."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, token in enumerate(_SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [START], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": _IDS, "merges": []},
    }  # fmt: skip


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
