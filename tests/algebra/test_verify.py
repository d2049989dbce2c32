"""What an adapter keeps, computed anew; numpy in float64 is the judge, and a record that lies is found."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch

from flora.adapter import Adapter, make_adapter
from flora.algebra.verify import verify
from flora.errors import BaseMismatch, CheckpointError, ShapeMismatch
from flora.extract import ExtractConfig, extract
from flora.lowrank import LowRank
from flora.prune import prune
from flora.rank import RankRule
from tests.extract.models import build, delta_of, residual_share, rewrite, save, tune

Q = "model.layers.1.self_attn.q_proj"


def found_of(verification, name):
    return next(tensor for tensor in verification.tensors if tensor.name == name)


def with_record(adapter: Adapter, name: str, **fields: object) -> Adapter:
    """The adapter with fields of one line of its record replaced."""
    tensors = tuple(
        msgspec.structs.replace(tensor, **fields) if tensor.name == name else tensor
        for tensor in adapter.report.tensors
    )
    return replace(adapter, report=msgspec.structs.replace(adapter.report, tensors=tensors))


def test_the_kept_share_of_each_module_is_numpys(base, tuned, adapters):
    found = verify(adapters[0], base, tuned)

    assert found.holds
    for module, factors in adapters[0]:
        delta = delta_of(base, tuned, f"{module.name}.weight")
        tensor = found_of(found, f"{module.name}.weight")
        assert tensor.norm_squared == pytest.approx(np.square(delta).sum(), rel=1e-12)
        assert tensor.kept_share == pytest.approx(1 - residual_share(delta, factors), abs=1e-12)


def test_the_totals_are_over_every_tensor_of_the_pair(base, tuned, adapters):
    found = verify(adapters[0], base, tuned)

    names = base.tensors.keys()
    total = sum(np.square(delta_of(base, tuned, name)).sum() for name in names)
    lost = sum(tensor.residual_squared for tensor in found.tensors)
    assert {tensor.name for tensor in found.tensors} == set(names)
    assert found.kept_share == pytest.approx(1 - lost / total, abs=1e-12)
    assert found.kept_share == pytest.approx(adapters[0].report.kept_share, abs=1e-5)
    assert found.kept_share_of_modules == pytest.approx(adapters[0].report.extracted_share, abs=1e-5)


def test_a_pruned_adapter_keeps_its_word(base, tuned, adapters):
    pruned = prune(adapters[0], RankRule(max_rank=3), None)

    found = verify(pruned, base, tuned)

    assert found.holds
    assert found.kept_share < verify(adapters[0], base, tuned).kept_share


def test_a_pruned_adapter_in_fp8_keeps_its_word_too(base, tuned):
    """Its terms' energies do not add up: the record has what each number of them keeps."""
    whole = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=8), factor_dtype="float8_e4m3fn")).adapter
    pruned = whole
    for rank in (7, 5, 3, 2, 1):
        at_once, pruned = prune(whole, RankRule(max_rank=rank), None), prune(pruned, RankRule(max_rank=rank), None)
        name = f"{Q}.weight"
        lying = with_record(pruned, name, kept=pruned.report.by_name()[name].kept * 1.01)

        assert pruned.header.serving_digest == at_once.header.serving_digest
        assert {factors.A.dtype for factors in pruned.factors.values()} == {torch.float8_e4m3fn}
        assert {factors.rank for factors in pruned.factors.values()} == {rank}
        assert verify(pruned, base, tuned).holds
        assert [tensor.name for tensor in verify(lying, base, tuned).failed] == [name]


@pytest.mark.parametrize("field", ["kept", "norm_squared"])
def test_a_record_that_promises_more_than_the_factors_keep_does_not_hold(base, tuned, adapters, field):
    true = adapters[0].report.by_name()[f"{Q}.weight"]
    lying = with_record(adapters[0], f"{Q}.weight", **{field: 1.002 * getattr(true, field)})

    found = verify(lying, base, tuned)

    assert [tensor.name for tensor in found.failed] == [f"{Q}.weight"]


def test_changed_factors_do_not_hold(base, tuned, adapters):
    factors = dict(adapters[0].factors)
    factors[Q] = LowRank(A=factors[Q].A * 1.1, B=factors[Q].B)
    header = adapters[0].header
    tampered = make_adapter(factors, header.base, header.recipe, adapters[0].report)

    assert [tensor.name for tensor in verify(tampered, base, tuned).failed] == [f"{Q}.weight"]


def test_a_tensor_that_the_record_leaves_out_is_found(base, tuned, adapters):
    report = adapters[0].report
    silent = tuple(tensor for tensor in report.tensors if tensor.name != "model.embed_tokens.weight")

    found = verify(replace(adapters[0], report=msgspec.structs.replace(report, tensors=silent)), base, tuned)

    assert found.unaccounted == ("model.embed_tokens.weight",)
    assert not found.holds


def test_another_fine_tune_is_not_the_one_of_the_record(checkpoints, adapters):
    base, _, other = checkpoints

    found = verify(adapters[0], base, other)

    assert len(found.failed) > 14
    assert found.kept_share_of_modules < 0


def test_another_base_is_refused(tuned, adapters, tmp_path):
    other = save(build("llama", seed=9), tmp_path / "other", torch.bfloat16)

    with pytest.raises(BaseMismatch, match="is not the tensor that this adapter was extracted from"):
        verify(adapters[0], other, tuned)


def test_a_checkpoint_of_another_shape_is_refused(base, tmp_path, adapters):
    wide = save(tune(build("llama", intermediate_size=128)), tmp_path / "wide", torch.bfloat16)

    with pytest.raises(ShapeMismatch, match=r"mlp\.\w+_proj"):
        verify(adapters[0], base, wide)


def test_a_checkpoint_that_lacks_an_adapted_tensor_is_refused(base, tmp_path, adapters):
    part = save(tune(build("llama")), tmp_path / "part", torch.bfloat16)
    part = rewrite(part, lambda tensors: tensors.pop(f"{Q}.weight"))

    with pytest.raises(CheckpointError, match=f"{Q}.weight among them"):
        verify(adapters[0], base, part)


def test_an_untied_head_that_is_stored_twice_counts_once(tmp_path):
    model = build("llama")
    tuned = tune(model)
    both = [save(one, tmp_path / name, torch.bfloat16) for one, name in ((model, "base"), (tuned, "tuned"))]
    base, tuned = (rewrite(one, store_head) for one in both)
    adapter = extract(base, tuned, ExtractConfig(rule=RankRule(max_rank=4))).adapter

    found = verify(adapter, base, tuned)

    assert found.holds
    assert "lm_head.weight" not in {tensor.name for tensor in found.tensors}
    assert found.kept_share == pytest.approx(adapter.report.kept_share, abs=1e-5)


def test_a_record_of_before_buffers_counted_for_nothing_holds(tmp_path):
    model = build()
    base = rewrite(save(model, tmp_path / "base"), lambda tensors: tensors.update(steps=torch.tensor([5])))
    tuned = rewrite(save(tune(model), tmp_path / "tuned"), lambda tensors: tensors.update(steps=torch.tensor([1005])))
    adapter = extract(base, tuned, ExtractConfig(RankRule(max_rank=8))).adapter

    found = verify(with_record(adapter, "steps", norm_squared=1e6), base, tuned)

    assert found.holds
    assert found_of(found, "steps").norm_squared == 0


def store_head(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def test_an_import_has_no_record_of_a_pair_to_compare(base, tuned, adapters):
    header = adapters[0].header
    imported = make_adapter(
        adapters[0].factors, header.base, msgspec.structs.replace(header.recipe, operation="import", tuned_id=None)
    )

    found = verify(imported, base, tuned)

    assert not found.has_certificate
    assert found.holds
    assert found.kept_share == pytest.approx(adapters[0].report.kept_share, abs=1e-5)


def test_progress_ends_at_the_whole(base, tuned, adapters):
    told = []

    verify(adapters[0], base, tuned, progress=lambda name, share: told.append((name, share)))

    assert [name for name, _ in told] == sorted(base.tensors)
    assert told[-1][1] == 1.0
    assert told == sorted(told, key=lambda entry: entry[1])
