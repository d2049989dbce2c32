"""An adapter as blobs: weights, report, extras, and the manifest that names them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import msgspec

from flora.adapter import ChangeReport, to_json
from flora.canonical import canonical_json
from flora.errors import AdapterInvalid, FloraError, StoreError
from flora.names import Digest
from flora.registry.cutting import large_tensors, put_cut
from flora.registry.formats.tensors import as_bytes, encode, load_blob, stored_pieces, to_exact, to_factors, to_tensors
from flora.registry.manifest import Manifest
from flora.registry.parts import Part
from flora.registry.records import Version
from flora.registry.store import BlobStore
from flora.soundness import check_header, check_report

if TYPE_CHECKING:
    from blake3 import blake3
    from torch import Tensor

    from flora.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Packed:
    """An adapter whose blobs are in the store."""

    manifest: Manifest
    digest: str  # of the manifest: the version's
    tensors: Mapping[str, int]  # sizes in bytes of the tensors that are shared where others have them too, by digest
    blake3: str  # of the weights
    parts: Sequence[Part] | None  # where the bytes of its weights lie, if they have no file; the caller lets them count


def put_adapter(store: BlobStore, adapter: "Adapter", *, is_whole: bool = False) -> Packed:
    """Stores every blob of the adapter, the manifest last. Raises AdapterInvalid, before anything is written: what
    could not be read again is not stored; StoreError.

    Tensors that others have too are not written again, unless the weights are to be a file, with `is_whole`.
    """
    from blake3 import blake3

    check_header(adapter.header, "the adapter")
    if adapter.report is not None:
        check_report(adapter.report, adapter.header.recipe.operation, "the adapter")
    tensors = to_tensors(adapter)
    shareable = large_tensors(adapter.header, ((name, as_bytes(tensor)) for name, tensor in tensors.items()))
    known = set() if is_whole else {digest for digest in shareable if store.size(Digest(digest)) is not None}
    hasher = blake3()
    pieces = _hashed(encode(tensors), hasher)
    weights, parts = put_cut(store, pieces, known) if known else (store.put(pieces), None)
    manifest = Manifest(
        header=adapter.header,
        weights=weights,
        report=store.put([canonical_json(to_json(adapter.report))]) if adapter.report else None,
        extras={name: store.put([data]) for name, data in sorted(adapter.extras.items())},
        serving_digest=str(adapter.header.serving_digest),
    )
    return Packed(manifest, store.put([manifest.to_json()]).digest, shareable, hasher.hexdigest(), parts)


def _hashed(pieces: Iterable[bytes | memoryview], hasher: "blake3") -> Iterator[bytes | memoryview]:
    for piece in pieces:
        hasher.update(piece)
        yield piece


def get_adapter(store: BlobStore, manifest: Manifest) -> "Adapter":
    """The adapter that `manifest` describes, every blob checked. Raises StoreError."""
    store.verified(Digest(manifest.weights.digest))
    return assemble(store, manifest, load_weights(store, manifest))


def assemble(store: BlobStore, manifest: Manifest, tensors: "Mapping[str, Tensor]") -> "Adapter":
    """The adapter whose weights are these tensors; all else is read, and checked. Raises StoreError, AdapterInvalid."""
    from flora.adapter import Adapter

    return Adapter(
        header=manifest.header,
        factors=to_factors(manifest.header, tensors),
        exact=to_exact(manifest.header, tensors),
        report=get_report(store, manifest),
        extras={name: store.read(Digest(blob.digest)) for name, blob in manifest.extras.items()},
    )


def load_weights(store: BlobStore, manifest: Manifest) -> "dict[str, Tensor]":
    """The tensors of the weights, not checked, backed by file maps. Raises StoreError, AdapterInvalid."""
    return load_blob(store.mapped(Digest(manifest.weights.digest)))


def shareable_tensors(store: BlobStore, manifest: Manifest) -> dict[str, int]:
    """As Packed.tensors, of what is stored; none if it cannot be read."""

    def stored() -> Iterator[tuple[str, memoryview]]:
        yield from stored_pieces(store.mapped(Digest(manifest.weights.digest)))

    try:
        return large_tensors(manifest.header, stored())
    except FloraError:
        return {}


def get_report(store: BlobStore, manifest: Manifest) -> ChangeReport | None:
    """The report that `manifest` names, if any. Raises StoreError if it is none, or cannot be true."""
    if manifest.report is None:
        return None
    where = f"report {manifest.report.digest}"
    try:
        report = msgspec.json.decode(store.read(Digest(manifest.report.digest)), type=ChangeReport)
        check_report(report, manifest.header.recipe.operation, where)
    except (msgspec.DecodeError, RecursionError) as error:
        raise StoreError(f"{where} cannot be read", cause=str(error), fix="run `flora fsck`") from error
    except AdapterInvalid as error:
        raise StoreError(error.what, cause=error.cause, fix="run `flora fsck`", **error.values) from error
    return report


def describe_version(
    manifest: Manifest, report: ChangeReport | None, *, name: str, number: int, digest: str, created_at: datetime
) -> Version:
    """What the index says of the manifest under that name and number."""
    header = manifest.header
    return Version(
        name=name,
        number=number,
        digest=digest,
        serving_digest=manifest.serving_digest,
        created_at=created_at,
        base_id=header.base.base_id,
        base_name=header.base.name,
        max_rank=header.max_rank,
        num_modules=len(header.modules),
        num_bytes=manifest.weights.size,
        kept_share=report.kept_share if report else None,
        operation=header.recipe.operation,
        parents=header.recipe.parents,
    )
