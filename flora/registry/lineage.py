"""Where a version comes from: base and tuned checkpoint, then each version that it was made of."""

from dataclasses import dataclass

from flora.errors import StoreError
from flora.names import Digest
from flora.registry import index
from flora.registry.home import Home
from flora.registry.manifest import Manifest, parse_manifest
from flora.registry.records import Version

_MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Ancestor:
    """One step back. What is no longer in the registry is known by its digest alone."""

    digest: str
    version: Version | None
    operation: str | None
    base: str | None  # where the line begins: name of the base, and below of the tuned checkpoint
    base_id: str | None
    tuned: str | None
    tuned_id: str | None
    parents: tuple["Ancestor", ...]


def lineage(home: Home, version: Version) -> Ancestor:
    """The version with all that it was made of, as far as manifests are here."""
    return _ancestor(home, version.digest, version, _MAX_DEPTH)


def _ancestor(home: Home, digest: str, known: Version | None, depth: int) -> Ancestor:
    if known is None:
        with home.reading() as connection:
            known = index.find_digest(connection, digest)
    manifest = _manifest(home, digest)
    if manifest is None:
        return Ancestor(digest, known, None, None, None, None, None, ())
    header, recipe = manifest.header, manifest.header.recipe
    parents = tuple(_ancestor(home, parent, None, depth - 1) for parent in recipe.parents) if depth else ()
    return Ancestor(
        digest,
        known,
        recipe.operation,
        header.base.name,
        header.base.base_id,
        recipe.tuned_name,
        recipe.tuned_id,
        parents,
    )


def _manifest(home: Home, digest: str) -> Manifest | None:
    """Removed versions keep theirs until a gc."""
    try:
        return parse_manifest(home.store.read(Digest(digest)), Digest(digest))
    except StoreError:
        return None
