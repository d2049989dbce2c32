"""Buffers that differ are named with their reason, and no number of theirs gets into the energy of the change."""

import pytest
import torch
import transformers as hf
from torch import Tensor

from flora.adapter import ChangeReport
from flora.algebra.verify import verify
from flora.checkpoint import Checkpoint
from flora.extract import ExtractConfig, extract
from flora.rank import RankRule
from tests.extract.models import build, rewrite, save, tune

RANK_4 = ExtractConfig(RankRule(max_rank=4))


def report_of(base: Checkpoint, tuned: Checkpoint) -> ChangeReport:
    """The report of an extraction that `verify` confirms."""
    adapter = extract(base, tuned, RANK_4).adapter
    found = verify(adapter, base, tuned)
    assert found.holds
    assert found.kept_share == pytest.approx(adapter.report.kept_share, abs=1e-5)
    return adapter.report


def test_a_counter_of_steps_leaves_the_kept_share_of_the_whole_as_it_is(tmp_path):
    """Batch norms count the batches that they saw: a thousand more were a thousand squared of energy, each."""
    config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    model = hf.ResNetForImageClassification(config)
    base, tuned = save(model, tmp_path / "base"), save(tune(model), tmp_path / "tuned")
    at_rest = report_of(base, tuned)

    def count(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.endswith("num_batches_tracked"):
                tensors[name] += 1000

    counted = report_of(base, rewrite(tuned, count))

    assert counted.kept_share == at_rest.kept_share
    counters = [change for change in counted.tensors if change.name.endswith("num_batches_tracked")]
    assert {(change.status, change.norm_squared, change.changed_share) for change in counters} == {
        ("not_extractable", 0.0, 1.0)
    }
    assert {change.reason for change in counters} == {
        "a buffer of whole numbers, not a weight: it differs, and counts for nothing"
    }
    still = {change.status for change in at_rest.tensors if change.name.endswith("num_batches_tracked")}
    assert still == {"unchanged"}


MASK = torch.ones(1, 1, 4, 4).tril()
DIFFERING = {
    "bool": ("mask", MASK.bool(), MASK.bool().logical_not()),
    "int64": ("index", torch.arange(3), torch.arange(3) + 2**40),
    "uint16": ("index", torch.ones(3, dtype=torch.uint16), torch.zeros(3, dtype=torch.uint16)),
    "complex": ("freqs_cis", torch.ones(3, dtype=torch.complex64), torch.full((3,), 1j)),
    "of two dtypes": ("index", torch.arange(3), torch.arange(3, dtype=torch.int32) + 1),
    "a mask of floats": ("attn.bias", MASK, torch.full((1, 1, 4, 4), float("-inf")).triu(1)),
}


@pytest.mark.parametrize("kind", DIFFERING)
def test_a_buffer_that_differs_is_named_and_counts_for_nothing(tmp_path, kind):
    name, before, after = DIFFERING[kind]
    name = f"model.layers.0.self_attn.{name}"
    model = build()
    base = rewrite(save(model, tmp_path / "base"), lambda tensors: tensors.update({name: before}))
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.update({name: after}))

    change = report_of(base, tuned).by_name()[name]

    assert (change.status, change.norm_squared) == ("not_extractable", 0.0)
    assert change.changed_share > 0
    assert "differs" in change.reason


def test_a_mask_that_only_the_tuned_checkpoint_stores_counts_for_nothing(tmp_path):
    name = "model.layers.0.self_attn.attn.bias"
    model = build()
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.update({name: MASK}))

    change = report_of(save(model, tmp_path / "base"), tuned).by_name()[name]

    assert (change.status, change.norm_squared) == ("not_extractable", 0.0)
    assert change.reason == "a buffer that only the tuned checkpoint stores: there is nothing to compare it with"
