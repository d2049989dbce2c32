"""Text to token ids and back, with the base checkpoint's `tokenizer.json`.

There are two ways in. A plain prompt is encoded as transformers would: text that spells a control token becomes that
token. A rendered chat is encoded so that only unmarked control tokens count (`guard.py`): the tokenizer looks for them
in the text as it stands, and its first normalizer then drops the marks.
"""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from flora.errors import CheckpointError
from flora.serve.frontend.guard import MARK, Guard

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """The base's tokenizer; threads may share it."""

    def __init__(self, spec: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        """spec: the content of tokenizer.json;  config: that of tokenizer_config.json"""
        config = config or {}
        added = spec.get("added_tokens") or []
        self.control_tokens = frozenset(token["content"] for token in added if token["special"])
        self.added_tokens = frozenset(token["content"] for token in added)
        self.named_tokens = {name: text for name in _NAMED_TOKENS if (text := _text_of(config.get(name)))}
        self.has_byte_tokens = "ByteFallback" in json.dumps(spec.get("decoder"))
        self._is_byte_level = "ByteLevel" in json.dumps(spec.get("decoder"))
        self._plain = _build(spec)
        self._of_chats = _build(_for_chats(spec))

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer of a checkpoint folder. Raises CheckpointError."""
        spec = read_json(folder / "tokenizer.json")
        if spec is None:
            raise CheckpointError(
                f"{folder.name} has no tokenizer.json",
                cause="the server tokenizes with that file alone",
                fix="save it beside the weights: AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            )
        try:
            return cls(spec, read_json(folder / "tokenizer_config.json"))
        except Exception as error:  # tokenizers has no error of its own for a file that it cannot read
            raise CheckpointError(f"{folder.name}/tokenizer.json cannot be read", cause=str(error)) from error

    @property
    def vocab_size(self) -> int:
        return self._plain.get_vocab_size()

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, so a text has at least its length divided by this many tokens."""
        return max(map(len, self._plain.get_vocab()), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a plain prompt, as transformers' tokenizer gives them."""
        return self._plain.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered template: its control tokens are tokens, marked ones are text."""
        return self._of_chats.encode(rendered, add_special_tokens=False).ids

    def guard(self, tokens: frozenset[str]) -> Guard:
        """What keeps a user's text from becoming one of these. It refuses those that a mark does not break: tokens of
        one character, or plain words of the vocabulary.
        """
        mark = Guard(tokens).mark
        return Guard(tokens, [token for token in tokens if self.token_id(token) in self.encode_chat(mark(token))])

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        return self._plain.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def is_control(self, token_id: int) -> bool:
        return self._plain.id_to_token(token_id) in self.control_tokens

    def is_byte(self, token_id: int) -> bool:
        """Whether this is `<0x0A>` or another token of one raw byte, whose text depends on the bytes around it."""
        token = self._plain.id_to_token(token_id) if self.has_byte_tokens else None
        return token is not None and len(token) == 6 and token.startswith("<0x")

    def token_bytes(self, token_id: int) -> bytes:
        """What this token writes, or its name if it is a control token; parts of a character are possible."""
        token = self._plain.id_to_token(token_id)
        if token is None:
            return b""
        if token in self.added_tokens:
            return token.encode()
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        if self.has_byte_tokens:
            return token.replace("▁", " ").encode()
        if self._is_byte_level and all(char in _BYTE_OF for char in token):
            return bytes(_BYTE_OF[char] for char in token)
        return self.decode([token_id]).encode()


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of the base checkpoint; None if there is no such file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path.parent.name}/{path.name} is not JSON", cause=str(error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent.name}/{path.name} is JSON, but not an object")
    return value


def _build(spec: dict[str, Any]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _for_chats(spec: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer, which drops marks after it has looked for added tokens, and looks only in the raw text."""
    drop_marks = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    normalizers = [drop_marks, spec["normalizer"]] if spec.get("normalizer") else [drop_marks]
    added = [token | {"normalized": False} for token in spec.get("added_tokens") or []]
    return spec | {"normalizer": {"type": "Sequence", "normalizers": normalizers}, "added_tokens": added}


def _text_of(token: Any) -> str | None:
    """A special token is written as a string, or as an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _byte_level_alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level vocabulary: printable ones are themselves, others start at U+0100.
    Source: GPT-2's encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()
