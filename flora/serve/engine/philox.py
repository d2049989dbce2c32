"""Counter-based random numbers: the draw of (seed, index) is a pure function, whatever else is drawn.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011), Philox-4x64 with ten rounds.
"""

_MASK = (1 << 64) - 1
_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_ROUNDS = 10


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) with 53 random bits. The seed is taken modulo 2**64."""
    return (philox(seed & _MASK, index)[0] >> 11) * 2.0**-53


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """The four 64-bit words of one block, for a key and a counter below 2**64."""
    a, b, c, d = counter, 0, 0, 0
    key_low, key_high = key, 0
    for _ in range(_ROUNDS):
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (second >> 64) ^ b ^ key_low, second & _MASK, (first >> 64) ^ d ^ key_high, first & _MASK
        key_low = (key_low + _KEY_STEPS[0]) & _MASK
        key_high = (key_high + _KEY_STEPS[1]) & _MASK
    return a, b, c, d
