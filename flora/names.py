"""Names, digests and references: parsed here once, and never joined into a path anywhere else.

    reference  =  [namespace/]name[:alias | @vN | @sha256:<64 hex>]

A name is what a person types; only a digest ever names a file, and only `registry/store.py` makes that path.
"""

import re
from dataclasses import dataclass

from flora.errors import NameInvalid

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"  # neither end is a dot or a dash, 64 characters at most
_ALIAS = r"[A-Za-z](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9_])?"
_HEX = r"[0-9a-f]{64}"
_REFERENCE = re.compile(
    rf"(?P<name>(?:{_PART}/)?{_PART})(?::(?P<alias>{_ALIAS})|@v(?P<version>[1-9][0-9]{{0,8}})|@(?P<digest>sha256:{_HEX}))?"
)
_DIGEST = re.compile(rf"sha256:({_HEX})")
_RESERVED_ALIAS = re.compile(r"v[0-9]+")


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """A sha256, written `sha256:<64 lower-case hex digits>`."""

    text: str

    def __post_init__(self) -> None:
        if not _DIGEST.fullmatch(self.text):
            raise NameInvalid(
                f"{self.text[:80]!r} is not a digest",
                fix="write sha256: and 64 lower-case hexadecimal digits, as `flora show` prints them",
            )

    @property
    def hex(self) -> str:
        return self.text.removeprefix("sha256:")

    @property
    def short(self) -> str:
        return self.hex[:12]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Reference:
    """One adapter version as a person names it; at most one of alias, version and digest is given."""

    name: str
    alias: str | None = None
    version: int | None = None
    digest: Digest | None = None

    def __str__(self) -> str:
        if self.alias is not None:
            return f"{self.name}:{self.alias}"
        if self.version is not None:
            return f"{self.name}@v{self.version}"
        if self.digest is not None:
            return f"{self.name}@{self.digest}"
        return self.name


def parse_reference(text: str) -> Reference:
    """The reference that `text` spells. Raises NameInvalid."""
    match = _REFERENCE.fullmatch(text)
    if not match or ".." in text:
        raise NameInvalid(
            f"{text[:80]!r} is not an adapter reference",
            fix="write NAME, NAME:ALIAS, NAME@vN or NAME@sha256:…; a name has letters, digits, '.', '_' and '-', "
            "and at most one '/'",
        )
    alias, version, digest = match["alias"], match["version"], match["digest"]
    if alias is not None:
        check_alias(alias)
    return Reference(
        name=match["name"],
        alias=alias,
        version=int(version) if version else None,
        digest=Digest(digest) if digest else None,
    )


def check_name(text: str) -> str:
    """`text` itself if it is a bare name, without alias, version or digest. Raises NameInvalid."""
    reference = parse_reference(text)
    if text != reference.name:
        raise NameInvalid(f"{text!r} names a version or an alias", fix=f"give the bare name, {reference.name}")
    return text


def check_alias(text: str) -> str:
    """`text` itself if it may be an alias; `v1`, `v2`, … are reserved for versions. Raises NameInvalid."""
    if not re.fullmatch(_ALIAS, text) or _RESERVED_ALIAS.fullmatch(text) or ".." in text:
        raise NameInvalid(
            f"{text[:80]!r} cannot be an alias",
            fix="an alias starts with a letter, has letters, digits, '.', '_' and '-', and is not v1, v2, …",
        )
    return text
