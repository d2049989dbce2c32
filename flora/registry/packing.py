"""An adapter as blobs: weights, report, extras, and the manifest that names them."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from flora.adapter import ChangeReport, to_json
from flora.canonical import canonical_json
from flora.names import Digest
from flora.registry.formats.tensors import encode, load_tensors, to_exact, to_factors, to_tensors
from flora.registry.manifest import Manifest
from flora.registry.records import Version
from flora.registry.store import BlobStore

if TYPE_CHECKING:
    from flora.adapter import Adapter


def put_adapter(store: BlobStore, adapter: "Adapter") -> tuple[Manifest, str]:
    """Stores every blob of the adapter, the manifest last; returns it with its digest. Raises StoreError."""
    manifest = Manifest(
        header=adapter.header,
        weights=store.put(encode(to_tensors(adapter))),
        report=store.put([canonical_json(to_json(adapter.report))]) if adapter.report else None,
        extras={name: store.put([data]) for name, data in sorted(adapter.extras.items())},
        serving_digest=str(adapter.header.serving_digest),
    )
    return manifest, store.put([manifest.to_json()]).digest


def get_adapter(store: BlobStore, manifest: Manifest) -> "Adapter":
    """The adapter that `manifest` describes, every blob checked. Raises StoreError."""
    return _read_adapter(store, manifest, store.verified_path(Digest(manifest.weights.digest)))


@contextmanager
def reading_adapter(store: BlobStore, manifest: Manifest) -> Iterator["Adapter"]:
    """As get_adapter, with the weights checked while the caller uses them. See BlobStore.verified_beside."""
    with store.verified_beside(Digest(manifest.weights.digest)) as path:
        yield _read_adapter(store, manifest, path)


def _read_adapter(store: BlobStore, manifest: Manifest, path: Path) -> "Adapter":
    from flora.adapter import Adapter

    tensors = load_tensors(path)
    return Adapter(
        header=manifest.header,
        factors=to_factors(manifest.header, tensors),
        exact=to_exact(manifest.header, tensors),
        report=get_report(store, manifest),
        extras={name: store.read(Digest(blob.digest)) for name, blob in manifest.extras.items()},
    )


def get_report(store: BlobStore, manifest: Manifest) -> ChangeReport | None:
    if manifest.report is None:
        return None
    return msgspec.json.decode(store.read(Digest(manifest.report.digest)), type=ChangeReport)


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
