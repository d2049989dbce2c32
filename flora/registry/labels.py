"""Labels: what people note of a version, as key=value. No part of its identity."""

import re
from collections.abc import Mapping

from flora.errors import NameInvalid
from flora.names import Reference
from flora.registry import changes, index
from flora.registry.home import Home
from flora.registry.journal import Labeled
from flora.registry.records import Version
from flora.registry.refusals import not_found

_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,62}[A-Za-z0-9])?")
_MAX_VALUE = 256


def set_labels(home: Home, version: Version, wanted: Mapping[str, str | None]) -> None:
    """Gives the version those labels; a value of None takes one away. Raises NameInvalid, AdapterNotFound."""
    for key, value in wanted.items():
        check_label(key, value)
    with home.writing() as connection:
        reference = Reference(version.name, version=version.number)
        current = index.find(connection, reference)
        if current is None or current.digest != version.digest:
            raise not_found(connection, reference)
        have = index.labels_of(connection, version)
        for key, value in wanted.items():
            if have.get(key) != value:
                changes.set_label(connection, version, key, value)
                home.journal.note(connection, [Labeled(version.name, version.number, key, value)])


def check_label(key: str, value: str | None) -> None:
    """Raises NameInvalid where the key, or the value that is not None, is too long or has other characters."""
    if not _KEY.fullmatch(key):
        raise NameInvalid(f"{key[:80]!r} cannot be a label", fix="letters, digits, '.', '_', '-' and '/', 64 at most")
    if value is not None and (len(value) > _MAX_VALUE or not value.isprintable()):
        raise NameInvalid(f"the value of label {key} is too long, or cannot be shown", fix="256 printable characters")
