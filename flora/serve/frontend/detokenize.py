"""Token ids to text as they come: the pieces joined are the text of all tokens decoded at once.

A token's text can depend on its neighbours: a character may be spread over several tokens, and a leading space is cut
only at the very start. So new tokens are decoded together with a few before them, and what may still change is kept.
"""

from collections.abc import Iterable

from flora.serve.frontend.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8  # kept before the new ones: an unfinished character lies in the last three
_WINDOW_TOKENS = 32
_UNFINISHED = "\ufffd"  # what the decoder writes for bytes that are no character, or not yet


class Detokenizer:
    """The text of one growing answer."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._sent = 0  # characters of the window's text that were given out

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        self._window += token_ids
        if self._in_byte_run():
            return ""  # bytes that follow decide whether this run of byte tokens is text at all
        text = self._decode(self._window)
        # a whole character never changes any more; only the last mark may stand for bytes that are still to come
        end = len(text) - 1 if text.endswith(_UNFINISHED) else len(text)
        return self._take(text, end)

    def flush(self) -> str:
        """What was kept back, at the end of the answer."""
        text = self._decode(self._window)
        return self._take(text, len(text))

    def _in_byte_run(self) -> bool:
        if not self._tokenizer.has_byte_tokens:
            return False
        heard = (token for token in reversed(self._window) if not (self._skip and self._tokenizer.is_control(token)))
        last = next(heard, None)
        return last is not None and self._tokenizer.is_byte(last)

    def _take(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        if len(self._window) > _WINDOW_TOKENS:
            self._shrink(text)
        return piece

    def _shrink(self, text: str) -> None:
        """Forget all but the last tokens. Both texts end alike, so what was not given out is as long in either."""
        kept = self._window[-_CONTEXT_TOKENS:]
        sent = len(self._decode(kept)) - (len(text) - self._sent)
        if sent > 0:  # without a character before the new ones, a leading space would be cut again
            self._window, self._sent = kept, sent

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
