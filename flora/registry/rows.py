"""Rows of the index that are versions: which tables they are joined from, their columns, and the Version they make."""

from datetime import datetime
from typing import Any

import msgspec

from flora.registry.records import Version
from flora.registry.tables import aliases, names, versions

DEFAULT_ALIASES = ("prod", "latest")  # what a bare name means, first hit
VERSION = (  # a Version's fields, in their order
    names.c.name, versions.c.number, versions.c.digest, versions.c.serving_digest, versions.c.created_at,
    versions.c.base_id, versions.c.base_name, versions.c.max_rank, versions.c.num_modules, versions.c.num_bytes,
    versions.c.kept_share, versions.c.operation, versions.c.parents,
)  # fmt: skip
NAMED = versions.join(names, names.c.id == versions.c.name_id)
POINTED = NAMED.join(aliases, aliases.c.version_id == versions.c.id)

_CREATED_AT = [column.name for column in VERSION].index("created_at")
_PARENTS = msgspec.json.Decoder(tuple[str, ...])


def version_of(row: Any) -> Version:
    """The version of a row with the columns of `VERSION`, by position: a listing may have 10,000 of them."""
    values = list(row)
    values[_CREATED_AT] = datetime.fromisoformat(values[_CREATED_AT])
    values[-1] = _PARENTS.decode(values[-1])
    return Version(*values)
