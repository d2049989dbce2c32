"""Tensors that are valid and seldom: without elements, in float64, infinite where nothing is carried."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flora.adapter import Adapter, TensorChange
from flora.algebra.verify import verify
from flora.errors import NotFinite
from flora.extract import ExtractConfig, extract
from flora.rank import RankRule
from flora.registry import Registry
from tests.extract.models import build, rewrite, save, tune
from tests.extract.peft_judge import EVERYTHING

MODEL = build()
NORM = "model.norm.weight"


def stored(folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Adapter:
    """The adapter of a pair with these tensors, as a registry gives it back, and `verify` confirms its record."""
    base = rewrite(save(MODEL, folder / "base"), lambda tensors: tensors.update(before))
    tuned = rewrite(save(tune(MODEL), folder / "tuned"), lambda tensors: tensors.update(after))
    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=4), wish=EVERYTHING)).adapter
    assert verify(adapter, base, tuned).holds
    with Registry.open(folder / "registry") as registry:
        return registry.load(registry.add(adapter, "odd"))


def change_of(adapter: Adapter, name: str) -> TensorChange:
    assert adapter.report is not None
    return adapter.report.by_name()[name]


@pytest.mark.parametrize("changed_by", [0.5, 1e-9])
def test_a_norm_in_float64_is_carried_in_float32_and_what_that_loses_is_told(tmp_path, changed_by):
    before = torch.linspace(0.5, 1.5, 64, dtype=torch.float64)
    after = before + changed_by

    adapter = stored(tmp_path, {NORM: before}, {NORM: after})

    assert adapter.exact[NORM].dtype == torch.float32
    assert torch.equal(adapter.exact[NORM], after.float())
    change = change_of(adapter, NORM)
    lost = float((after - after.float()).square().sum())
    assert change.status == "exact"
    assert change.norm_squared - change.kept == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16")])
def test_a_tensor_without_elements_is_unchanged(tmp_path, shape, dtypes):
    """Some trainers leave one where the weights lie on another machine."""
    name = "model.layers.0.mlp.extra.weight"
    before, after = (torch.empty(shape, dtype=getattr(torch, dtype)) for dtype in dtypes)

    change = change_of(stored(tmp_path, {name: before}, {name: after}), name)

    assert (change.status, change.norm_squared, change.changed_share) == ("unchanged", 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_that_is_infinite_on_both_sides_is_no_sign_of_a_training_that_diverged(tmp_path, dtype):
    name = "model.layers.0.self_attn.mask"
    mask = torch.full((1, 1, 4, 4), float("-inf")).triu(1)

    change = change_of(stored(tmp_path, {name: mask}, {name: mask.to(dtype)}), name)

    assert (change.status, change.norm_squared) == ("unchanged", 0.0)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", NORM])
def test_a_weight_that_is_infinite_on_both_sides_is_one(tmp_path, name):
    infinite = {name: torch.full_like(MODEL.state_dict()[name], float("inf"))}

    with pytest.raises(NotFinite):
        stored(tmp_path, infinite, infinite)
