"""An adapter as a command names it: a reference of the registry, or a PEFT folder by its path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flora.cli.options import open_registry

if TYPE_CHECKING:
    from flora.adapter import Adapter
    from flora.registry import Version


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One adapter, loaded, and what to call it."""

    label: str  # NAME@vN, or the folder
    adapter: Adapter
    version: Version | None  # None: a folder


def is_folder(text: str) -> bool:
    """Whether this names a folder: it starts with `.`, `/` or `~`, which no name of the registry does."""
    return text.startswith((".", "/", "~"))


def open_source(text: str, registry_url: str | None) -> Source:
    """The adapter behind REF. Raises what the registry, or reading a PEFT folder, does."""
    if is_folder(text):
        from flora.registry.formats.peft import load_peft

        return Source(text, load_peft(Path(text).expanduser()), None)
    with open_registry(registry_url) as store:
        version = store.resolve(text)
        return Source(version.ref, store.load(version), version)
