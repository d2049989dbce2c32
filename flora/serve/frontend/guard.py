"""Keeps what a user typed from becoming a control token.

Only a chat template may write `<|im_start|>`; the same characters in a message are text. So every control token in a
user's strings is broken, before the template sees them, by a mark behind its first character; and so is every half of
one at either end of a string, which the template's own text could complete. The tokenizer looks for control tokens
first and drops the marks afterwards, so nothing else about the text changes.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from flora.errors import RequestInvalid

MARK = "\ufdd0"  # a noncharacter, which Unicode reserves for a program's own use; one in a user's text is only dropped


class Guard:
    """Breaks one set of control tokens."""

    def __init__(self, tokens: Iterable[str], unbreakable: Iterable[str] = ()) -> None:
        """unbreakable: those that a tokenizer reads as control tokens even when they are marked"""
        tokens = sorted(tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._heads = tuple({token[:end] for token in tokens for end in range(1, len(token))})
        self._tails = tuple({token[start:] for token in tokens for start in range(1, len(token))})
        self._unbreakable = tuple(unbreakable)

    def mark(self, text: str) -> str:
        """`text` with a mark in every control token, and in every half of one at its ends. Raises RequestInvalid."""
        for token in self._unbreakable:
            if token in text:
                raise RequestInvalid(
                    f"a message contains {token!r}, which this model's tokenizer cannot tell from its control token",
                    fix="leave it out",
                    param="messages",
                )
        cuts = {start + 1 for start in self._starts(text)}
        if text.endswith(self._heads):
            cuts |= {len(text) - len(head) + 1 for head in self._heads if text.endswith(head)}
        if text.startswith(self._tails):
            cuts.add(0)
        borders = [0, *sorted(cuts), len(text)]
        return MARK.join(text[start:end] for start, end in pairwise(borders))

    def mark_all(self, value: Any) -> Any:
        """Plain JSON with every string in it marked, keys of objects excepted."""
        if isinstance(value, str):
            return self.mark(value)
        if isinstance(value, dict):
            return {key: self.mark_all(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark_all(item) for item in value]
        return value

    def _starts(self, text: str) -> Iterator[int]:
        """Where control tokens start; they may overlap."""
        at = 0
        while match := self._pattern.search(text, at):
            yield match.start()
            at = match.start() + 1
