"""What an adapter version brings besides weights: its chat template and end tokens.

That never changes, so it is read once and kept by version digest.
"""

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flora.adapter import CHAT_TEMPLATE, GENERATION_CONFIG
from flora.errors import AdapterInvalid
from flora.registry import Registry, Version
from flora.serve.frontend.template import decode_template
from flora.serve.frontend.tokenizer import Tokenizer, read_json

_KEPT_VERSIONS = 1024


@dataclass(frozen=True, slots=True)
class Sidecars:
    """None where the version has the base's."""

    template: str | None
    end_tokens: tuple[int, ...] | None


class Carried:
    """Read from the registry, and kept in memory for the versions that were asked for last. Any thread may ask."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: OrderedDict[str, Sidecars] = OrderedDict()
        self._lock = threading.Lock()

    def by(self, version: Version) -> Sidecars:
        """Raises AdapterInvalid, StoreError."""
        with self._lock:
            if kept := self._kept.get(version.digest):
                self._kept.move_to_end(version.digest)
                return kept
        read = self._read(version)
        with self._lock:
            self._kept[version.digest] = read
            if len(self._kept) > _KEPT_VERSIONS:
                self._kept.popitem(last=False)
        return read

    def _read(self, version: Version) -> Sidecars:
        template = self._registry.extra(version, CHAT_TEMPLATE)
        generation = self._registry.extra(version, GENERATION_CONFIG)
        try:
            end_tokens = _end_tokens(json.loads(generation)) if generation else None
        except ValueError as error:
            raise AdapterInvalid(f"the {GENERATION_CONFIG} of {version.ref} is not JSON", cause=str(error)) from error
        return Sidecars(decode_template(template, where=version.ref) if template else None, end_tokens)


def base_end_tokens(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """End-of-sequence ids as `generate` of transformers takes them: of generation_config.json, else of config.json;
    the tokenizer's where neither has any.
    """
    for file in ("generation_config.json", "config.json"):
        found = _end_tokens(read_json(folder / file) or {})
        if found is not None:
            return found
    eos = tokenizer.token_id(tokenizer.named_tokens.get("eos_token", ""))
    return () if eos is None else (eos,)


def _end_tokens(config: dict[str, Any]) -> tuple[int, ...] | None:
    """The end-of-sequence ids that a configuration names; None where it names none."""
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    ids = value if isinstance(value, list) else [value]
    found = tuple(token_id for token_id in ids if isinstance(token_id, int))
    return found or None
