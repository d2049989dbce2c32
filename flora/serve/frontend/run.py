"""One client request on its way: its sequences in the engine, and what became of each of its choices."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flora.errors import FloraError
from flora.serve.frontend.answer import Choice, Piece
from flora.serve.frontend.client import EngineClient
from flora.serve.messages import TokenEvent
from flora.serve.request import AdapterTarget, SamplingParams


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one client request. A prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of one request as its client saw them."""

    first_token_s: float | None
    whole_s: float


class Run:
    """The sequences of one request: every prompt with every sampling, numbered in that order."""

    def __init__(
        self,
        client: EngineClient,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[SamplingParams],
        adapter: AdapterTarget | None,
        new_choice: Callable[[], Choice],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Submits them. Raises EngineDead, Overloaded."""
        self.choices = [new_choice() for _ in prompts for _ in samplings]
        self.gaps_s: list[float] = []  # between two tokens of a choice
        self.has_failed = False
        self._prompt_tokens = sum(map(len, prompts))
        self._clock = clock
        self._started_s = clock()
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self._generation = client.submit(
            [prompt for prompt in prompts for _ in samplings], [*samplings] * len(prompts), adapter
        )

    @property
    def is_finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def outcomes(self) -> list[str]:
        """What became of each choice: stop, length, abort (nobody wanted it any more) or error."""
        unfinished = "error" if self.has_failed else "abort"
        return [choice.finish_reason or unfinished for choice in self.choices]

    async def next(self, timeout_s: float) -> tuple[int, Piece] | None:
        """The next piece with the number of its choice; None if nothing came in time. Raises a choice's error."""
        try:
            mail = await self._generation.next(timeout_s)
            return None if mail is None else (mail[0], self._take(*mail))
        except FloraError:
            self.has_failed = True
            raise

    def take(self) -> tuple[int, Piece] | None:
        """The next piece, if it is there already. Raises a choice's error."""
        try:
            mail = self._generation.take()
            return None if mail is None else (mail[0], self._take(*mail))
        except FloraError:
            self.has_failed = True
            raise

    def _take(self, index: int, event: TokenEvent) -> Piece:
        choice = self.choices[index]
        if choice.finish_reason is not None:
            return Piece("")  # it came while the cancel was under way
        if event.token_ids:
            self._note_time(index)
        piece = choice.push(event)
        if choice.finish_reason is not None:
            self._generation.cancel(index)  # a stop string: the engine does not know of it
        return piece

    def close(self) -> None:
        """Cancel what still runs. Safe to call again."""
        self._generation.close()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=max(choice.cached_tokens for choice in self.choices),
        )

    @property
    def timings(self) -> Timings:
        first_s = None if self._first_s is None else self._first_s - self._started_s
        return Timings(first_s, self._clock() - self._started_s)

    def _note_time(self, index: int) -> None:
        now = self._clock()
        if self._first_s is None:
            self._first_s = now
        if index in self._last_s:
            self.gaps_s.append(now - self._last_s[index])
        self._last_s[index] = now
