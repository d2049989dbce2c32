"""One choice of an answer: token events in, pieces of text out, ended by the model or by a stop string."""

from dataclasses import dataclass
from typing import Literal

from flora.errors import ServeError
from flora.serve.frontend.detokenize import Detokenizer
from flora.serve.frontend.stop import Passed, StopStrings
from flora.serve.frontend.tokenizer import Tokenizer
from flora.serve.messages import TokenEvent, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScoredToken:
    token_id: int
    offset: int  # characters of the answer's text before it
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event added. The last piece has a finish reason; text behind a stop string is in none."""

    text: str
    tokens: tuple[ScoredToken, ...] = ()  # empty unless log probabilities were asked for
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None  # the stop string, or the client's own stop token; None for the model's end

    @property
    def is_empty(self) -> bool:
        return not self.text and self.finish_reason is None


class Choice:
    """Turns the events of one sequence into pieces, and counts its tokens."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
        skip_special_tokens: bool = True,
    ) -> None:
        """stop_token_ids: the client's own, to be named as the reason when one of them ended the answer"""
        self.num_tokens = 0  # up to the one that completed a stop string; the model's end token is not counted
        self.cached_tokens = 0
        self.finish_reason: Literal["stop", "length"] | None = None
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop = StopStrings(stop)
        self._stop_token_ids = stop_token_ids
        self._num_chars = 0
        self._scored: list[ScoredToken] = []  # whose text is still held back

    def push(self, event: TokenEvent) -> Piece:
        """The piece that this event adds. Raises ServeError when the engine gave the sequence up."""
        if event.finish_reason == "error" or event.finish_reason == "cancelled":
            raise ServeError(event.error or f"the engine ended the request: {event.finish_reason}")
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        text = ""
        for position, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            if event.logprobs:
                self._scored.append(ScoredToken(token_id, self._num_chars, event.logprobs[position]))
            passed = self._pass(self._detokenizer.push([token_id]))
            text += passed.text
            if passed.stopped_by is not None:
                return self._finish(text, "stop", passed.stopped_by)
        if event.finish_reason is None:
            return Piece(text, self._take_scored() if text else ())
        passed = self._pass(self._detokenizer.flush())
        text += passed.text
        if passed.stopped_by is not None:
            return self._finish(text, "stop", passed.stopped_by)
        stop_token = event.stop_token if event.stop_token in self._stop_token_ids else None
        return self._finish(text + self._stop.flush(), event.finish_reason, stop_token)

    def _pass(self, text: str) -> Passed:
        self._num_chars += len(text)
        return self._stop.push(text)

    def _finish(self, text: str, reason: Literal["stop", "length"], stop_reason: str | int | None) -> Piece:
        self.finish_reason = reason
        return Piece(text, self._take_scored(), reason, stop_reason)

    def _take_scored(self) -> tuple[ScoredToken, ...]:
        scored, self._scored = tuple(self._scored), []
        return scored
