"""An adapter out of the registry for whoever serves it: read and checked at once, and checked the quicker way."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flora.errors import StoreError
from flora.names import Digest
from flora.registry import changes, index
from flora.registry.formats.tensors import load_blob
from flora.registry.home import Home
from flora.registry.packing import assemble
from flora.registry.records import Version

if TYPE_CHECKING:
    from flora.adapter import Adapter


@contextmanager
def loading(home: Home, version: Version) -> "Iterator[Adapter]":
    """The adapter, whose weights are checked meanwhile; see BlobStore.verified_beside.

    The index says what their BLAKE3 is. Where it does not, or is wrong, they are checked by sha256, and it is told.
    """
    manifest = home.manifest(version)
    weights = manifest.weights.digest
    with home.reading() as connection:
        known = index.blake3_of(connection, version.digest, weights)
    with home.store.verified_beside(Digest(weights), known) as (mapped, check):
        yield assemble(home.store, manifest, load_blob(mapped))
    if blake3 := check.result():
        with contextlib.suppress(StoreError), home.noting() as connection:  # busy, or only to be read: another time
            changes.note_blake3(connection, version, weights, blake3)
