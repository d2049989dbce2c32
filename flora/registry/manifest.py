"""The manifest: one version's record. Its canonical JSON is a blob, and that blob's digest is the version digest.

It holds no clock, host or path: what was made where and when is provenance, which the index and the journal keep.
"""

import msgspec

from flora.adapter import AdapterHeader
from flora.canonical import canonical_json
from flora.errors import AdapterInvalid, StoreError
from flora.names import Digest
from flora.registry.store import Blob
from flora.soundness import check_header

KIND = "flora.adapter"
SCHEMA_VERSION = 1


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version: all of its adapter but the bytes of its blobs, which it names by digest and size."""

    header: AdapterHeader
    weights: Blob  # safetensors, under PEFT's names
    report: Blob | None
    extras: dict[str, Blob]
    serving_digest: str  # of the header; written out so that other tools need not derive it
    kind: str = KIND
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> bytes:
        return canonical_json(msgspec.to_builtins(self))

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All that this version needs beside the manifest itself."""
        return (self.weights, *((self.report,) if self.report else ()), *self.extras.values())


def parse_manifest(data: bytes, digest: Digest) -> Manifest:
    """The manifest that `data`, the blob of `digest`, holds. Raises StoreError if it is none that this Flora reads."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, RecursionError) as error:
        raise StoreError(f"blob {digest} is not a manifest", cause=str(error), fix="run `flora fsck`") from error
    if manifest.kind != KIND or manifest.schema_version > SCHEMA_VERSION:
        raise StoreError(
            f"manifest {digest} is of kind {manifest.kind!r}, schema {manifest.schema_version}",
            cause=f"this Flora reads {KIND!r} up to schema {SCHEMA_VERSION}: a newer one wrote it",
            fix="upgrade Flora: pip install -U flora-adapters",
        )
    try:
        check_header(manifest.header, f"manifest {digest}")
    except AdapterInvalid as error:
        raise StoreError(error.what, cause=error.cause, fix="run `flora fsck`", **error.values) from error
    return manifest
