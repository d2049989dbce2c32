"""OpenAI's answer objects, built from pieces: whole, or in chunks.

A shape knows one request's id, time and model name, and how its kind of answer is written. The two kinds differ in
names only, so whoever sends them does not ask which it has.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from flora.serve.frontend.answer import Piece, ScoredToken
from flora.serve.frontend.run import Usage
from flora.serve.frontend.tokenizer import Tokenizer

_LOWEST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON cannot


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What every object of one answer has in common."""

    model: str  # as the client wrote it
    tokenizer: Tokenizer
    fingerprint: str  # of the weights that answer
    num_logprobs: int | None
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        raise NotImplementedError

    def opening(self, index: int) -> list[dict[str, Any]]:
        """Chunks before a choice's first piece."""
        raise NotImplementedError

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """A choice's next piece."""
        raise NotImplementedError

    def closing(self, usage: Usage) -> dict[str, Any]:
        """The chunk that only tells the usage."""
        return self._chunk([]) | {"usage": usage_object(usage)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        raise NotImplementedError

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape(Shape):
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        objects = [self._choice(index, join(pieces)) for index, pieces in enumerate(choices)]
        return self._chunk(objects) | {"usage": usage_object(usage)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        return [self._chunk([self._choice(index, piece)])]

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("text_completion", choices)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": None if self.num_logprobs is None else self._logprobs(piece.tokens),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _logprobs(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [_finite(token.logprobs.chosen) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ScoredToken) -> dict[str, float]:
        """The likeliest tokens, and the chosen one, so one more than were asked for where it is not among them."""
        pairs = zip(token.logprobs.top_ids, token.logprobs.top, strict=True)
        return {self._name(token_id): _finite(logprob) for token_id, logprob in pairs} | {
            self._name(token.token_id): _finite(token.logprobs.chosen)
        }

    def _name(self, token_id: int) -> str:
        """The token's text; of a token that is part of a character, its bytes, as OpenAI writes them."""
        data = self.tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape(Shape):
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")

    def whole(self, choices: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        objects = []
        for index, pieces in enumerate(choices):
            piece = join(pieces)
            message = {"role": "assistant", "content": piece.text, "refusal": None}
            objects.append({"index": index, "message": message} | self._rest(piece))
        return self._object("chat.completion", objects) | {"usage": usage_object(usage)}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._delta(index, {"role": "assistant", "content": ""}, Piece(""))]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        chunks = []
        if piece.text or piece.tokens:
            chunks.append(self._delta(index, {"content": piece.text}, Piece(piece.text, piece.tokens)))
        if piece.finish_reason is not None:
            end = Piece("", finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
            chunks.append(self._delta(index, {}, end))
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object("chat.completion.chunk", choices)

    def _delta(self, index: int, delta: dict[str, Any], piece: Piece) -> dict[str, Any]:
        return self._chunk([{"index": index, "delta": delta} | self._rest(piece)])

    def _rest(self, piece: Piece) -> dict[str, Any]:
        scored = self.num_logprobs is not None and piece.tokens
        return {
            "logprobs": {"content": list(map(self._score, piece.tokens)), "refusal": None} if scored else None,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }

    def _score(self, token: ScoredToken) -> dict[str, Any]:
        top = zip(token.logprobs.top_ids, token.logprobs.top, strict=True)
        return self._token(token.token_id, token.logprobs.chosen) | {
            "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in top]
        }

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": _finite(logprob), "bytes": list(data)}


def join(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    last = pieces[-1]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        last.finish_reason,
        last.stop_reason,
    )


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
