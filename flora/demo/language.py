"""The demo's language: one line names a skill and a word, and ends with the answer: `copy:saberu=saberu`.

The base model learns some skills. Each task is an old cipher that it was never shown, so that before
fine-tuning it answers none of it. Words are six random letters; a checksum puts one word in sixteen on the held-out
side, whoever draws it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import ascii_lowercase as LETTERS
from zlib import crc32

WORD_LENGTH = 6
_HELD_OUT_ONE_IN = 16


@dataclass(frozen=True, slots=True)
class Example:
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Skill:
    name: str
    meaning: str  # for people
    answer: Callable[[str], str]

    def example(self, word: str) -> Example:
        return Example(f"{self.name}:{word}=", self.answer(word))


def shifted(word: str, by: int) -> str:
    """Every letter `by` places on in the alphabet, from z back to a."""
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in word)


def mirrored(word: str) -> str:
    """Every letter as far from z as it was from a: a and z change places."""
    return "".join(LETTERS[-1 - LETTERS.index(letter)] for letter in word)


def keyed(word: str, key: str) -> str:
    """Each letter moved on by the key's letter over it, where a moves nothing, b one place, and the key repeats."""
    return "".join(shifted(letter, by=LETTERS.index(key[i % len(key)])) for i, letter in enumerate(word))


BASE_SKILLS = (
    Skill("copy", "the word itself", lambda word: word),
    Skill("next", "every letter one place on", lambda word: shifted(word, 1)),
    Skill("prev", "every letter one place back", lambda word: shifted(word, -1)),
    Skill("first", "the first letter", lambda word: word[0]),
    Skill("head", "all letters but the last", lambda word: word[:-1]),
)

TASKS = (
    Skill("caesar", "every letter three places on", lambda word: shifted(word, 3)),
    Skill("atbash", "every letter mirrored in the alphabet", mirrored),
    Skill("vigenere", "every letter moved by a letter of the key `flora`", lambda word: keyed(word, "flora")),
)


def training_examples(skills: Sequence[Skill], seed: int) -> Iterator[Example]:
    """Examples without end, of words that are not on the held-out side."""
    rng = random.Random(seed)
    while True:
        word = _draw_word(rng)
        if not _is_held_out(word):
            yield rng.choice(skills).example(word)


def held_out(skill: Skill, count: int, seed: int) -> list[Example]:
    """`count` examples of words that no training ever draws, all different."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < count:
        word = _draw_word(rng)
        if _is_held_out(word):
            words[word] = None
    return [skill.example(word) for word in words]


def _draw_word(rng: random.Random) -> str:
    return "".join(rng.choices(LETTERS, k=WORD_LENGTH))


def _is_held_out(word: str) -> bool:
    return crc32(word.encode()) % _HELD_OUT_ONE_IN == 0
