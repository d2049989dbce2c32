"""Files beside the weights that change answers: the chat template, the end-of-sequence ids, the vocabulary."""

import json
from typing import Any

from flora.adapter import CHAT_TEMPLATE, GENERATION_CONFIG
from flora.canonical import canonical_json
from flora.checkpoint import Checkpoint
from flora.errors import CheckpointError


def changed_extras(base: Checkpoint, tuned: Checkpoint) -> dict[str, bytes]:
    """What an adapter must carry beside its factors: the tuned checkpoint's template and end tokens where they differ.

    Of generation_config.json only eos_token_id, as a list: sampling defaults are the user's choice, not the weights'.
    """
    extras = {}
    template = chat_template(tuned)
    if template is not None and template != chat_template(base):
        extras[CHAT_TEMPLATE] = template.encode()
    end_ids = end_token_ids(tuned)
    if end_ids and set(end_ids) != set(end_token_ids(base)):
        extras[GENERATION_CONFIG] = canonical_json({"eos_token_id": end_ids})
    return extras


def chat_template(checkpoint: Checkpoint) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's entry; of a list of named templates the one called default."""
    text = checkpoint.sidecar(CHAT_TEMPLATE)
    if text is not None:
        return text.decode()
    template = _read(checkpoint, "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def end_token_ids(checkpoint: Checkpoint) -> list[int]:
    """The ids that end an answer, ascending: generation_config.json's, else config.json's; empty if neither has any."""
    for source in (_read(checkpoint, GENERATION_CONFIG), checkpoint.config):
        ids = source.get("eos_token_id")
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, list) and ids:
            return sorted({int(token) for token in ids})
    return []


def check_vocabulary(base: Checkpoint, tuned: Checkpoint) -> None:
    """Raises CheckpointError if the tuned checkpoint's tokenizer has added tokens that the base's does not know."""
    ours, theirs = base.sidecar("tokenizer.json"), tuned.sidecar("tokenizer.json")
    if ours is None or theirs is None or ours == theirs:
        return
    known = _vocabulary(base)
    new = sorted(token for token in _added_tokens(tuned) if token not in known)
    if new:
        raise CheckpointError(
            f"{tuned.path} adds {len(new)} tokens to the base's vocabulary, {new[0]!r} among them",
            cause="an adapter of linear layers carries no rows for new tokens",
            fix="--embeddings carries their rows, for PEFT; or tune with the base's own tokens",
            tokens=new,
        )


def _vocabulary(checkpoint: Checkpoint) -> set[str]:
    vocabulary = _read(checkpoint, "tokenizer.json").get("model", {}).get("vocab", {})
    words = vocabulary if isinstance(vocabulary, dict) else [entry[0] for entry in vocabulary]
    return set(words) | _added_tokens(checkpoint)


def _added_tokens(checkpoint: Checkpoint) -> set[str]:
    return {str(token["content"]) for token in _read(checkpoint, "tokenizer.json").get("added_tokens") or []}


def _read(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    data = checkpoint.sidecar(name)
    if data is None:
        return {}
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path / name} is not valid JSON", cause=str(error)) from error
    return value if isinstance(value, dict) else {}
