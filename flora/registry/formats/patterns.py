"""PEFT's rank_pattern and alpha_pattern: which entry of such a table holds for a module.

PEFT's rule: the first key for which the regular expression `(.*\\.)?(KEY)$` fits the module's path. Strangers write
these keys, and Python's `re` takes exponential time over some: plain keys are compared by hand, others must be tame.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from flora.errors import AdapterInvalid

Value = TypeVar("Value", int, float)

_MAX_KEY = 512  # characters
_MAX_KEYS = 4096  # each may be tried on each module
_MAX_REGEX_KEYS = 64
_MAX_UNBOUNDED = 2  # of * and + in one key: matching is then at most cubic in the length of a name
_PLAIN = re.compile(r"\^?(?:\\[.\-]|[\w.\-])+\$?")
_WILD = re.compile(r"\)[*+]|\(\?(?!:)|\{")  # a repeated group; lookaround or flags; a counted repeat
_BACK_REFERENCE = re.compile(r"\\[1-9]")


@dataclass(frozen=True, slots=True)
class Patterns(Generic[Value]):
    """A table of patterns, ready to ask. Built by `compile_patterns`."""

    exact: Mapping[str, Value]  # when every key is ^ and an escaped path: one look-up
    ordered: tuple[tuple[Callable[[str], bool], Value], ...]

    def get(self, module: str) -> Value | None:
        if module in self.exact:
            return self.exact[module]
        return next((value for fits, value in self.ordered if fits(module)), None)


def compile_patterns(table: Mapping[str, Value], field: str) -> Patterns[Value]:
    """The table of the config's `field`. Raises AdapterInvalid on a key that is no regular expression or not tame."""
    if all(key == "^" + re.escape(_unescape(key[1:])) for key in table):
        return Patterns({_unescape(key[1:]): value for key, value in table.items()}, ())
    if len(table) > _MAX_KEYS or sum(not _PLAIN.fullmatch(key) for key in table) > _MAX_REGEX_KEYS:
        raise AdapterInvalid(f"{field} has more keys than can be tried: {len(table)}", field=field)
    matchers = [(_matcher(key, field), value) for key, value in table.items()]
    return Patterns({}, tuple(matchers))


def anchored(module: str) -> str:
    """The key that fits this module and no other."""
    return "^" + re.escape(module)


def _matcher(key: str, field: str) -> Callable[[str], bool]:
    if _PLAIN.fullmatch(key):
        return _plain_matcher(key)
    bare = re.sub(r"\\.", "_", key)  # what is escaped stands for itself
    is_tame = len(re.findall(r"[*+]", bare)) <= _MAX_UNBOUNDED and not _WILD.search(bare)
    if len(key) > _MAX_KEY or not is_tame or _BACK_REFERENCE.search(key):
        raise AdapterInvalid(
            f"{field} has the key {key[:80]!r}, a regular expression that could take very long to match",
            fix="write module names instead, each with its own value",
            field=field,
        )
    try:
        pattern = re.compile(rf"(.*\.)?({key})$")
    except re.error as error:
        raise AdapterInvalid(
            f"{field} has the key {key[:80]!r}, which is no regular expression", cause=str(error), field=field
        ) from error
    return lambda module: pattern.match(module) is not None


def _plain_matcher(key: str) -> Callable[[str], bool]:
    """A key of letters, digits and dots: its characters against the end of the path, an unescaped dot fitting any."""
    is_anchored = key.startswith("^")
    wanted = [
        None if part == "." else part[-1] for part in re.findall(r"\\.|.", key.removeprefix("^").removesuffix("$"))
    ]

    def fits(module: str) -> bool:
        start = len(module) - len(wanted)
        if start < 0 or (start and (is_anchored or module[start - 1] != ".")):
            return False
        return all(want in (None, char) for want, char in zip(wanted, module[start:], strict=True))

    return fits


def _unescape(key: str) -> str:
    return re.sub(r"\\(.)", r"\1", key)
