"""Taking versions out of the index. Their blobs stay until `gc`."""

from flora.errors import UsageError
from flora.names import Reference
from flora.registry import changes, index
from flora.registry.aliases import point
from flora.registry.home import Home
from flora.registry.journal import Removed
from flora.registry.records import Version
from flora.registry.refusals import not_found


def remove(home: Home, reference: Reference, *, force: bool) -> list[Version]:
    """Removes the version that `reference` names, or for a bare name all of them."""
    if reference.alias is not None:
        raise UsageError(
            f"{reference} is an alias, and removal is of versions",
            fix=f"name the version, as `flora show {reference.name}` lists it",
        )
    with home.writing() as connection:
        everything = index.versions_of(connection, reference.name)
        doomed = _named(everything, reference)
        if not doomed:
            raise not_found(connection, reference)
        pointing = {
            alias: version
            for alias, version in index.aliases_of(connection, reference.name).items()
            if version in doomed
        }
        if not force:
            _check_unprotected(reference, pointing)
        left = [version for version in everything if version not in doomed]
        for alias in pointing:
            successor = left[-1].digest if left and alias == "latest" else None
            point(home, connection, alias, [(reference.name, successor, "removal of its version")], force=force)
        home.journal.note(connection, [Removed(version.name, version.number) for version in doomed])
        for version in doomed:
            changes.delete_version(connection, version)
    return doomed


def _named(versions: list[Version], reference: Reference) -> list[Version]:
    if reference.version is not None:
        return [version for version in versions if version.number == reference.version]
    if reference.digest is not None:
        return [version for version in versions if version.digest == str(reference.digest)]
    return versions


def _check_unprotected(reference: Reference, pointing: dict[str, Version]) -> None:
    """`latest` moves by itself and protects nothing; any other alias was given by a person."""
    protecting = sorted(alias for alias in pointing if alias != "latest")
    if protecting:
        raise UsageError(
            f"{reference} is in use: {pointing[protecting[0]].ref} has the alias {protecting[0]}",
            fix="move the alias to another version first (`flora tag`), or repeat with --force",
            aliases=protecting,
        )
