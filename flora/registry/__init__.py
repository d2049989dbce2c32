"""The registry: adapters by content, names and aliases over them, and the only room that knows on-disk formats.

    registry.py   the door: add, resolve, load, aliases, remove
    home.py       what stands behind it, held together:
    store.py        blobs by sha256; the one file that makes a path from a digest;  verified.py  those that were hashed;
                  mapped.py  where their bytes lie
    database.py     the index, opened and locked; tables.py its SQL, migrations/ how it got there
    journal.py      what was given and taken, in order, from which the index can be rebuilt
    manifest.py   the record of one version, whose digest is the version's identity; packing.py writes and reads it
    loading.py    an adapter on its way to a server, checked while it is read
    sharing.py    equal large tensors stored once: cutting.py cuts files up, parts.py lists where their bytes lie
    index.py      questions to the index: listing.py what it lists, lookups.py many names at once, needs.py its blobs;
                  changes.py  its changes;  refusals.py  what it says no to
    adding.py, aliases.py, removal.py      what the door does under the write lock
    labels.py, lineage.py, requirements.py    what is noted, what it was made of, what it must keep
    mismatches.py  what was served on another base, because an operator let it
    care.py       gc, fsck, reindex: collect.py, check.py, rebuild.py;  leases.py  what running servers use
    promises.py   what any registry must keep;  conformance.py  whether this one does
    binding.py    an import's base, proven
    formats/      safetensors files, PEFT folders, model cards;  remotes/  the Hugging Face Hub

Importing this package imports no torch.
"""

from flora.registry.records import (
    UNSET,
    AliasMove,
    BaseEntry,
    Entry,
    GcReport,
    Mismatch,
    Problem,
    Search,
    Unset,
    Version,
)
from flora.registry.registry import Registry

__all__ = [
    "UNSET",
    "AliasMove",
    "BaseEntry",
    "Entry",
    "GcReport",
    "Mismatch",
    "Problem",
    "Registry",
    "Search",
    "Unset",
    "Version",
]
