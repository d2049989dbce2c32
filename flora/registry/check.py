"""fsck: rows against blobs, blobs against their digests, weights against their headers. Changes nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec
import sqlalchemy as sa

from flora.errors import AdapterInvalid, StoreError
from flora.identity import BaseRecord
from flora.names import Digest
from flora.registry import index, listing, needs
from flora.registry.binding import altered, misfits
from flora.registry.formats.tensors import to_exact, to_factors
from flora.registry.journal import Change, Journal, live_versions
from flora.registry.manifest import Manifest, parse_manifest
from flora.registry.packing import describe_version, get_report, load_weights
from flora.registry.records import BaseEntry, Problem, Version
from flora.registry.store import BlobStore

_REINDEX = "move the index file aside: the next command rebuilds it from the journal and the manifests"
_AGAIN = "extract or import it again under the same name: that replaces the blob"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the index says at one moment."""

    versions: list[Version]
    bases: list[BaseEntry]
    required: set[str]  # digests
    in_use: set[str]
    dangling: list[tuple[str, str]]  # (name, alias)
    pending: list[Change]  # on their way to the journal


def snapshot(connection: sa.Connection, journal: Journal) -> Snapshot:
    return Snapshot(
        versions=index.every_version(connection),
        bases=listing.base_entries(connection),
        required=needs.blobs_required(connection),
        in_use=needs.blobs_in_use(connection),
        dangling=index.dangling_aliases(connection),
        pending=journal.pending(connection),
    )


def check(known: Snapshot, store: BlobStore, journal: Journal) -> list[Problem]:
    """Every problem of index, store and journal, the harmless ones last. Reads every blob."""
    files = list(store.files())
    found = {digest: store.is_sound(Digest(digest)) for digest in sorted({str(file.digest) for file in files})}
    problems: list[Problem] = []
    records: dict[str, BaseRecord] = {}
    for base in known.bases:
        if base.base_id in known.required or base.base_id in found:
            problems += _check_base(store, base, found, records)
    for version in known.versions:
        problems += _check_version(store, version, found, known.required, records)
    for name, alias in known.dangling:
        problems.append(Problem("alias", f"{name}:{alias}", "it points to no version of that name", _REINDEX))
    problems += _check_journal(known, journal)
    lists = {str(file.digest) for file in files if file.is_list}
    parts = {part.digest for digest in lists & known.in_use for part in store.parts(Digest(digest)) or ()}
    for digest in sorted(set(found) - known.in_use - parts):
        problems.append(Problem("orphan", digest, "a blob that nothing refers to", "flora gc"))
    for digest in sorted(lists & known.in_use & {str(file.digest) for file in files if not file.is_list}):
        problems.append(Problem("leftover", digest, "it is stored whole and in parts", "flora gc"))
    for leftover in store.leftovers():
        problems.append(Problem("leftover", leftover.name, "a write that was not finished", "flora gc"))
    return problems


def _check_blob(subject: str, role: str, digest: str, found: dict[str, bool]) -> Iterator[Problem]:
    if not found.get(digest):
        kind: Literal["missing", "damaged"] = "damaged" if digest in found else "missing"
        yield Problem(kind, subject, f"its {role}, blob {digest}, is {kind}", _AGAIN)


def _check_base(
    store: BlobStore, base: BaseEntry, found: dict[str, bool], records: dict[str, BaseRecord]
) -> Iterator[Problem]:
    """Problems of the base's record; a sound one goes into `records`, for its adapters to be checked against."""
    subject = f"base {base.name}"
    problems = list(_check_blob(subject, "record", base.base_id, found))
    if not problems:
        try:
            records[base.base_id] = msgspec.json.decode(store.read(Digest(base.base_id)), type=BaseRecord)
        except msgspec.DecodeError as error:
            fix = "register that base again: extract something from it"
            yield Problem("damaged", subject, f"its record, blob {base.base_id}, is none: {error}", fix)
    yield from problems


def _check_version(
    store: BlobStore, version: Version, found: dict[str, bool], required: set[str], records: dict[str, BaseRecord]
) -> Iterator[Problem]:
    problems = list(_check_blob(version.ref, "manifest", version.digest, found))
    if not problems:
        try:
            manifest = parse_manifest(store.read(Digest(version.digest)), Digest(version.digest))
        except StoreError as error:
            yield Problem("damaged", version.ref, error.what, error.fix or _AGAIN)
            return
        roles = {"weights": manifest.weights} | ({"report": manifest.report} if manifest.report else {})
        for role, blob in (roles | manifest.extras).items():
            problems += _check_blob(version.ref, role, blob.digest, found)
        if not {blob.digest for blob in manifest.blobs} <= required:
            problems.append(Problem("index", version.ref, "the index does not list all of its blobs", _REINDEX))
        if not problems:
            problems += _check_content(store, version, manifest)
            problems += _check_fit(version, manifest, records.get(manifest.header.base.base_id or ""))
    yield from problems


def _check_content(store: BlobStore, version: Version, manifest: Manifest) -> Iterator[Problem]:
    """What a version whose blobs are all sound says of itself: in its row, its header and its weights."""
    if manifest.serving_digest != str(manifest.header.serving_digest):
        yield Problem("damaged", version.ref, "its serving digest is not that of its header", _AGAIN)
    try:
        report = get_report(store, manifest)
    except StoreError as error:
        yield Problem("damaged", version.ref, error.what, _AGAIN)
        return
    described = describe_version(
        manifest,
        report,
        name=version.name,
        number=version.number,
        digest=version.digest,
        created_at=version.created_at,
    )
    if described != version:
        yield Problem("index", version.ref, "its row says something else than its manifest", _REINDEX)
    try:
        tensors = load_weights(store, manifest)
        to_factors(manifest.header, tensors)
        to_exact(manifest.header, tensors)
    except AdapterInvalid as error:
        yield Problem("shape", version.ref, error.what, _AGAIN)
        return
    for name, tensor in tensors.items():
        if not bool(tensor.float().isfinite().all()):  # fp8 has no isfinite
            yield Problem("not_finite", version.ref, f"{name} holds NaN or infinity", f"flora rm {version.ref}")


def _check_fit(version: Version, manifest: Manifest, record: BaseRecord | None) -> Iterator[Problem]:
    """Whether the base that the version names has a place for all of it, where that base's record is here."""
    if record is None:
        return
    fix = f"flora rm {version.ref}, and make it again from the base that it belongs to"
    for misfit in misfits(manifest.header, record):
        yield Problem("base", version.ref, str(misfit), fix)
    for name in altered(manifest.header, record):
        yield Problem("base", version.ref, f"{name} of its base has another sha256 than it was made from", fix)


def _check_journal(known: Snapshot, journal: Journal) -> Iterator[Problem]:
    live = live_versions([*journal.read(), *known.pending])
    digests = {(added.name, added.number): added.digest for added in live}
    for version in known.versions:
        if digests.get((version.name, version.number)) != version.digest:
            yield Problem(
                "journal",
                version.ref,
                "the journal does not know it, so a rebuilt index would lose it",
                f"remove it and add it again: flora rm {version.ref}",
            )
