"""Adapters of every kind of layer, proved and merged: the merged checkpoint, loaded by transformers, is the judge."""

import numpy as np
import pytest
import torch

from flora.algebra.changes import checkpoint_changes
from flora.algebra.combine import Combination
from flora.algebra.compare import compare
from flora.algebra.merge import merge_adapters
from flora.algebra.parts import Part
from flora.algebra.verify import verify
from flora.algebra.write_checkpoint import write_checkpoint
from flora.checkpoint import Checkpoint, open_checkpoint
from flora.extract import Wish
from flora.identity import base_record
from flora.rank import RankRule
from tests.extract.peft_judge import extracted
from tests.extract.zoo import ZOO

EVERYTHING = Wish(embeddings=True, vectors=True)


@pytest.fixture(scope="module", params=ZOO)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def case(kind, tmp_path_factory):
    """Base, tuned and an adapter of everything that both have, at rank 6."""
    return extracted(ZOO[kind].build(), tmp_path_factory.mktemp(kind), rank=6, wish=EVERYTHING)


def merged_checkpoint(base: Checkpoint, parts, out) -> Checkpoint:
    changes = checkpoint_changes(parts, base, Combination())
    write_checkpoint(base, out, changes, {}, {})
    return open_checkpoint(out)


def test_every_kind_of_layer_is_verified(case):
    base, tuned, adapter = case

    found = verify(adapter, base, tuned)

    assert found.holds, [tensor for tensor in found.tensors if not tensor.holds]
    assert found.kept_share == pytest.approx(adapter.report.kept_share, abs=1e-5)


def test_what_verify_finds_is_how_far_the_merged_checkpoint_is_from_the_tuned_one(case, tmp_path):
    """In float32, so that rounding the merged weights adds nothing."""
    base, tuned, adapter = case
    found = {tensor.name: tensor for tensor in verify(adapter, base, tuned).tensors}

    merged = merged_checkpoint(base, [Part(adapter)], tmp_path / "out")

    for name in merged.tensors:
        if name in tuned.tensors and name in found:
            apart = np.square(tuned.load(name).double().numpy() - merged.load(name).double().numpy()).sum()
            assert apart == pytest.approx(found[name].residual_squared, rel=1e-3, abs=1e-7)


def test_transformers_opens_the_merged_checkpoint_and_it_answers_like_the_tuned_one(case, kind, tmp_path):
    base, tuned, adapter = case
    merged = merged_checkpoint(base, [Part(adapter)], tmp_path / "out")

    answers = []
    for checkpoint in (tuned, merged, base):
        model = ZOO[kind].opens.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
        with torch.inference_mode():
            answers.append(ZOO[kind].forward(model).double())

    assert (answers[0] - answers[1]).norm() < 0.5 * (answers[0] - answers[2]).norm()


def test_half_and_half_of_one_adapter_is_that_adapter(case):
    base, _, adapter = case
    parts = [Part(adapter, 0.5), Part(adapter, 0.5)]

    merged = merge_adapters(parts, base, base_record(base), Combination(), RankRule())

    assert merged.adapter.header.forms == adapter.header.forms
    assert compare(merged.adapter, adapter).distance < 5e-3
    assert merged.adapter.exact.keys() == adapter.exact.keys()
    for name, whole in adapter.exact.items():
        torch.testing.assert_close(merged.adapter.exact[name], whole)
