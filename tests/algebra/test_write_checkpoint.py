"""Adapters back into a full checkpoint: the bytes that nothing changes, and the numbers of those that do."""

import json
from hashlib import sha256

import numpy as np
import pytest
import torch

from flora.adapter import make_adapter
from flora.algebra.changes import checkpoint_changes
from flora.algebra.combine import Combination
from flora.algebra.parts import Part
from flora.algebra.write_checkpoint import write_checkpoint
from flora.checkpoint import open_checkpoint
from flora.errors import NotFinite, StoreError, UsageError
from flora.extract import ExtractConfig, extract
from flora.lowrank import LowRank
from flora.rank import RankRule
from flora.registry.formats.peft import save_peft
from tests.extract.models import build, save, tune


def write(base, adapters, out, weights=(1.0,), method="svd", extras=None, **options):
    parts = [Part(one, weight) for one, weight in zip(adapters, weights, strict=True)]
    changes = checkpoint_changes(parts, base, Combination(method, **options))
    write_checkpoint(base, out, changes, extras or {}, {"made": "by a test"})
    return open_checkpoint(out)


def stored_bytes(checkpoint, name):
    info = checkpoint.tensors[name]
    with info.file.open("rb") as file:
        file.seek(info.start)
        return file.read(info.num_bytes)


def half_ulp(values: np.ndarray) -> np.ndarray:
    """Half the distance between neighbours in bf16, at each value."""
    return 2.0 ** (np.floor(np.log2(np.abs(values))) - 8)


def test_tensors_that_no_adapter_touches_are_the_same_bytes(base, adapters, tmp_path):
    merged = write(base, adapters[:1], tmp_path / "out")

    assert list(merged.tensors) == list(base.tensors)
    untouched = base.tensors.keys() - {f"{module.name}.weight" for module in adapters[0].header.modules}
    assert len(untouched) == 6
    assert all(stored_bytes(merged, name) == stored_bytes(base, name) for name in untouched)


def test_a_changed_tensor_is_base_plus_change_rounded_once(base, adapters, tmp_path):
    merged = write(base, adapters, tmp_path / "out", weights=(0.7, -0.4))

    for name in adapters[0].factors:
        change = sum(
            weight * one.factors[name].B.double().numpy() @ one.factors[name].A.double().numpy()
            for one, weight in zip(adapters, (0.7, -0.4), strict=True)
        )
        exact = base.load(f"{name}.weight").double().numpy() + change
        found = merged.load(f"{name}.weight").double().numpy()
        assert np.all(np.abs(found - exact) <= half_ulp(exact) * (1 + 1e-3))


def test_with_nothing_to_change_the_files_are_the_base_s(base, adapters, tmp_path):
    header = adapters[0].header
    merged = write(base, [make_adapter({}, header.base, header.recipe)], tmp_path / "out")

    digests = [sha256((one.path / "model.safetensors").read_bytes()).digest() for one in (base, merged)]
    assert digests[0] == digests[1]


def test_a_sharded_checkpoint_keeps_its_shards(tmp_path):
    base_model = build("llama")
    base = save(base_model, tmp_path / "base", torch.bfloat16, max_shard_size="60KB")
    tuned = save(tune(base_model), tmp_path / "tuned", torch.bfloat16)
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=8))).adapter

    merged = write(base, [adapter], tmp_path / "out")

    files = sorted(path.name for path in base.path.glob("*.safetensors*"))
    assert len(files) > 3
    assert sorted(path.name for path in merged.path.glob("*.safetensors*")) == files
    for name, info in base.tensors.items():
        assert merged.tensors[name].file.name == info.file.name
    errors = [apart(tuned, merged, name) / apart(tuned, base, name) for name in adapter.header.base.touched]
    assert max(errors) < 0.3


def apart(left, right, name):
    return float((left.load(name).double() - right.load(name).double()).norm())


def test_the_merged_checkpoint_answers_as_pefts_merge_does(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = build("llama")
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=4))).adapter
    save_peft(adapter, tmp_path / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(write(base, [adapter], tmp_path / "out").path)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), tmp_path / "adapter")
    theirs = theirs.merge_and_unload()

    ids = torch.arange(20)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_the_checkpoint_of_ties_and_dare_pays_for_no_rank(base, adapters, tmp_path, method):
    from flora.algebra.combine import Term, dense

    merged = write(base, adapters, tmp_path / "out", (1.0, 1.0), method, density=0.3)

    name = "model.layers.1.mlp.gate_proj"
    terms = [Term(one.factors[name], 1.0) for one in adapters]
    exact = base.load(f"{name}.weight").double() + dense(terms, Combination(method, 0.3), name).double()
    found = merged.load(f"{name}.weight").double()
    assert bool(((found - exact).abs().numpy() <= half_ulp(exact.numpy()) * (1 + 1e-3)).all())


def test_template_end_tokens_and_record_lie_beside_the_weights(base, adapters, tmp_path):
    extras = {"chat_template.jinja": b"{{ messages }}", "generation_config.json": b'{"eos_token_id": [7]}'}

    merged = write(base, adapters[:1], tmp_path / "out", extras=extras)

    before = json.loads((base.path / "generation_config.json").read_bytes())
    after = json.loads((merged.path / "generation_config.json").read_bytes())
    assert after == before | {"eos_token_id": [7]}
    assert (merged.path / "chat_template.jinja").read_bytes() == b"{{ messages }}"
    assert json.loads((merged.path / "flora_merge.json").read_bytes()) == {"made": "by a test"}
    assert merged.config == base.config


def test_a_folder_that_holds_anything_is_left_alone(base, adapters, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(UsageError, match="is there already"):
        write(base, adapters[:1], tmp_path / "out")

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_merge_that_fails_midway_leaves_nothing(base, adapters, tmp_path):
    """The largest finite bf16 overflows by any weight over one."""
    name = "model.layers.1.mlp.up_proj"
    huge = torch.full((1, 64), torch.finfo(torch.bfloat16).max)
    header = adapters[0].header
    bad = make_adapter({name: LowRank(A=huge, B=torch.full((96, 1), 4.0))}, header.base, header.recipe)

    with pytest.raises(NotFinite, match=name):
        write(base, [bad], tmp_path / "out")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(base, adapters, tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="cannot be written"):
        write(base, adapters[:1], tmp_path / "file" / "out")
