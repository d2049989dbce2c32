import json
from pathlib import Path

import pytest

from flora.checkpoint import Checkpoint
from flora.errors import CheckpointError
from flora.extract.sidecars import changed_extras, chat_template, check_vocabulary, end_token_ids


def checkpoint(folder: Path, config: dict | None = None, **files: object) -> Checkpoint:
    """A folder with these files, `__` standing for the dot of a name; whatever is not a string is written as JSON."""
    folder.mkdir()
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return Checkpoint(path=folder, config=config or {}, tensors={})


def test_the_template_is_the_file_or_the_entry_or_the_entry_called_default(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]

    assert chat_template(checkpoint(tmp_path / "a", chat_template__jinja="A")) == "A"
    assert chat_template(checkpoint(tmp_path / "b", tokenizer_config__json={"chat_template": "B"})) == "B"
    assert chat_template(checkpoint(tmp_path / "c", tokenizer_config__json={"chat_template": named})) == "D"
    assert chat_template(checkpoint(tmp_path / "d", tokenizer_config__json={})) is None
    assert chat_template(checkpoint(tmp_path / "e")) is None


def test_a_template_is_carried_only_if_it_differs_wherever_it_is_kept(tmp_path):
    base = checkpoint(tmp_path / "base", chat_template__jinja="hello")
    same = checkpoint(tmp_path / "same", tokenizer_config__json={"chat_template": "hello"})
    other = checkpoint(tmp_path / "other", chat_template__jinja="goodbye ✓")
    none = checkpoint(tmp_path / "none")

    assert changed_extras(base, same) == {}
    assert changed_extras(base, none) == {}
    assert changed_extras(base, other) == {"chat_template.jinja": "goodbye ✓".encode()}


def test_end_tokens_come_from_the_generation_config_before_the_config(tmp_path):
    both = checkpoint(tmp_path / "a", {"eos_token_id": 2}, generation_config__json={"eos_token_id": [7, 5]})

    assert end_token_ids(both) == [5, 7]
    assert end_token_ids(checkpoint(tmp_path / "b", {"eos_token_id": 0})) == [0]
    assert end_token_ids(checkpoint(tmp_path / "c")) == []


def test_of_a_generation_config_only_changed_end_tokens_are_carried(tmp_path):
    base = checkpoint(tmp_path / "base", {"eos_token_id": 2}, generation_config__json={"temperature": 0.7})
    hotter = checkpoint(tmp_path / "hotter", generation_config__json={"eos_token_id": [2], "temperature": 1.0})
    longer = checkpoint(tmp_path / "longer", generation_config__json={"eos_token_id": [2, 9], "temperature": 1.0})

    assert changed_extras(base, hotter) == {}
    assert changed_extras(base, longer) == {"generation_config.json": b'{"eos_token_id":[2,9]}'}


def test_added_tokens_are_refused_by_name(tmp_path):
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<end>"}]}
    added = {**vocabulary, "added_tokens": [*vocabulary["added_tokens"], {"id": 3, "content": "<tool>"}]}
    promoted = {**vocabulary, "added_tokens": [{"id": 0, "content": "a"}]}
    base = checkpoint(tmp_path / "base", tokenizer__json=vocabulary)

    check_vocabulary(base, checkpoint(tmp_path / "same", tokenizer__json=vocabulary))
    check_vocabulary(base, checkpoint(tmp_path / "promoted", tokenizer__json=promoted))
    check_vocabulary(base, checkpoint(tmp_path / "none"))
    with pytest.raises(CheckpointError, match=r"adds 1 tokens .* '<tool>'"):
        check_vocabulary(base, checkpoint(tmp_path / "added", tokenizer__json=added))


def test_a_broken_sidecar_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is not valid JSON"):
        chat_template(checkpoint(tmp_path / "a", tokenizer_config__json="{"))
