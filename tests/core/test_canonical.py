"""Canonical JSON, judged by the library that wrote it until now: digests must stay what they are."""

import math
import random
import struct
from typing import Any

import pytest
import rfc8785

from flora.canonical import canonical_json
from flora.errors import AdapterInvalid

TEXTS = ("", "model.layers.0", 'a"b', "back\\slash", "\n\t\b\f\r\x00\x1f\x7f", "é", "\u2028", "😀", "1e5", "</script>")
NUMBERS = (0, -0.0, 1.0, -1, 1e16, 1e21, 1e22, 123456789012345680000.0, 1e-6, 1e-7, 1.5e-7, 5e-324,
           1.7976931348623157e308, 2**53 - 1, 1 - 2**53, 0.1, 4.35, -3.5e-9, 1e15, 999999999999999900000.0,
           2.0**60)  # fmt: skip


def any_float(dice: random.Random) -> float:
    """Of any bits, of any size, or whole."""
    bits: float = struct.unpack("d", struct.pack("Q", dice.getrandbits(64)))[0]
    sized = dice.choice((-1, 1)) * dice.random() * 10.0 ** dice.randint(-12, 24)
    whole = float(dice.randint(-(10 ** dice.randint(1, 24)), 10 ** dice.randint(1, 24)))
    return dice.choice((bits if math.isfinite(bits) else 0.0, sized, whole))


def any_value(dice: random.Random, depth: int = 4) -> Any:
    if depth and dice.random() < 0.5:
        values = [any_value(dice, depth - 1) for _ in range(dice.randrange(4))]
        return dice.choice((values, tuple(values), dict(zip(dice.sample(TEXTS, len(values)), values, strict=True))))
    return dice.choice((dice.choice(TEXTS), dice.choice(NUMBERS), any_float(dice), None, True, False))


def test_every_number_has_the_librarys_spelling():
    dice = random.Random(0)

    for number in (*NUMBERS, *(any_float(dice) for _ in range(20_000))):
        assert canonical_json(number) == rfc8785.dumps(number), number


def test_every_value_has_the_librarys_spelling():
    dice = random.Random(1)

    for _ in range(2_000):
        value = any_value(dice)
        assert canonical_json(value) == rfc8785.dumps(value), value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2**53, {1: "a"}, {"a": b"x"}, "\ud800", {1}])
def test_what_the_library_refuses_is_refused(value):
    with pytest.raises(rfc8785.CanonicalizationError):
        rfc8785.dumps(value)

    with pytest.raises(AdapterInvalid, match="JSON"):
        canonical_json([value])
