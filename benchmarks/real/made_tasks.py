"""Tasks that need no data: questions are drawn from a seed, and any language model can be tuned on them.

    spell  a number to its English words      "spell: 40312 ->"    " forty thousand three hundred twelve"
    sort   a made-up word to its letters      "sort: kdazcab ->"   " a a b c d k z"

A checksum puts one item in sixteen on the test side, whoever draws it. All is lower case, so that a tokenizer of single
characters, such as that of `flora demo`, can say it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from zlib import crc32

_HELD_OUT_ONE_IN = 16
_TEST_SEED = 0
_ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
         "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MadeTask:
    name: str
    draw: Callable[[Random], str]  # an item
    answer: Callable[[str], str]

    def train(self, count: int, seed: int) -> list[Example]:
        """Different questions of the training side."""
        return self._examples(count, Random(seed), is_test=False)

    def test(self, count: int) -> list[Example]:
        """Different questions that no training draws: always the same ones, so the first of more."""
        return self._examples(count, Random(_TEST_SEED), is_test=True)

    def _examples(self, count: int, random: Random, *, is_test: bool) -> list[Example]:
        items: dict[str, None] = {}
        while len(items) < count:
            item = self.draw(random)
            if (crc32(item.encode()) % _HELD_OUT_ONE_IN == 0) == is_test:
                items[item] = None
        return [Example(f"{self.name}: {item} ->", (self.answer(item),)) for item in items]


def spelled(number: int) -> str:
    """The words of a number below a million, without "and" or hyphens."""
    if number >= 1000:
        rest = f" {spelled(number % 1000)}" if number % 1000 else ""
        return f"{spelled(number // 1000)} thousand{rest}"
    if number >= 100:
        rest = f" {spelled(number % 100)}" if number % 100 else ""
        return f"{_ONES[number // 100]} hundred{rest}"
    if number >= 20:
        rest = f" {_ONES[number % 10]}" if number % 10 else ""
        return f"{_TENS[number // 10 - 2]}{rest}"
    return _ONES[number]


TASKS = {
    "spell": MadeTask("spell", lambda random: str(random.randrange(1_000_000)), lambda item: spelled(int(item))),
    "sort": MadeTask(
        "sort",
        lambda random: "".join(random.choices(ascii_lowercase, k=random.randint(4, 8))),
        lambda item: " ".join(sorted(item)),
    ),
}
