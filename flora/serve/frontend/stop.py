"""Stop strings, found where they first appear in a growing text, also across the borders of tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passed:
    """Text that is free to go out, and the stop string that ended it, which is no part of it."""

    text: str
    stopped_by: str | None = None


class StopStrings:
    """Looks for the stop strings of one choice. Text that may be the start of one is held back."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> Passed:
        """What can go out now that `text` has come."""
        if not self._strings:
            return Passed(text)
        held = self._held + text
        found = [(at + len(string), at, string) for string in self._strings if (at := held.find(string)) >= 0]
        if found:
            _, at, string = min(found)  # the first to be complete, however the text was cut into pieces
            self._held = ""
            return Passed(held[:at], stopped_by=string)
        safe = len(held) - self._longest_start(held)
        self._held = held[safe:]
        return Passed(held[:safe])

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, text: str) -> int:
        """Characters at the end of `text` that could be the start of a stop string."""
        return max(
            (size for string in self._strings for size in range(1, len(string)) if text.endswith(string[:size])),
            default=0,
        )
