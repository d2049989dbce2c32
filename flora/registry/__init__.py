"""The registry: adapters by content, names and aliases over them, and the only room that knows on-disk formats.

    store.py      blobs by sha256; the one file that makes a path from a digest
    manifest.py   the record of one version; its digest is the version's identity
    tables.py     the index as SQL, migrations/ how it got there, database.py how it is opened and locked
    index.py      questions to the index and changes of it, each within one transaction
    journal.py    names, versions and aliases in the order they were given, from which the index can be rebuilt
    registry.py   the door: add, resolve, load, aliases, remove
    collect.py, check.py, rebuild.py   gc, fsck, reindex
    formats/      PEFT folders and model cards;  remotes/  the Hugging Face Hub

Importing this package imports no torch.
"""

from flora.registry.records import UNSET, AliasMove, BaseEntry, Entry, GcReport, Problem, Unset, Version
from flora.registry.registry import Registry

__all__ = [
    "UNSET",
    "AliasMove",
    "BaseEntry",
    "Entry",
    "GcReport",
    "Problem",
    "Registry",
    "Unset",
    "Version",
]
