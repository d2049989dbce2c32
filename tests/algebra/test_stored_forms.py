"""Proof and merging where a side is stored otherwise: fp8 with scales, vocabularies that have grown."""

import numpy as np
import pytest

from flora.algebra.changes import checkpoint_changes
from flora.algebra.combine import Combination
from flora.algebra.merge import merge_adapters
from flora.algebra.parts import Part
from flora.algebra.verify import verify
from flora.errors import Unsupported
from flora.extract import ExtractConfig, Wish, extract
from flora.identity import base_record
from flora.rank import RankRule
from tests.extract.models import build, save, tune
from tests.extract.test_embeddings import grown
from tests.extract.test_stored_forms import quantize

EVERYTHING = ExtractConfig(RankRule(max_rank=8), wish=Wish(embeddings=True, vectors=True))


@pytest.fixture(scope="module")
def grown_case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grown")
    model = build()
    base, tuned = save(model, folder / "base"), save(grown(model), folder / "tuned")
    return base, tuned, extract(base, tuned, EVERYTHING).adapter


def test_an_adapter_of_an_fp8_base_is_verified_against_the_numbers_it_stands_for(tmp_path):
    model = build()
    base, tuned = quantize(save(model, tmp_path / "base")), save(tune(model), tmp_path / "tuned")
    adapter = extract(base, tuned, EVERYTHING).adapter

    found = verify(adapter, base, tuned)

    assert found.holds
    assert found.kept_share == pytest.approx(adapter.report.kept_share, abs=1e-5)


def test_nothing_is_merged_into_fp8_weights(tmp_path):
    model = build()
    base, tuned = quantize(save(model, tmp_path / "base")), save(tune(model), tmp_path / "tuned")
    adapter = extract(base, tuned, EVERYTHING).adapter

    with pytest.raises(Unsupported, match="is stored as F8_E4M3, to which nothing can be added"):
        checkpoint_changes([Part(adapter)], base, Combination())


def test_rows_of_new_tokens_are_verified(grown_case):
    base, tuned, adapter = grown_case

    found = verify(adapter, base, tuned)

    table = next(tensor for tensor in found.tensors if tensor.name == "model.embed_tokens.weight")
    new = tuned.load("model.embed_tokens.weight")[160:].double().numpy()
    assert found.holds
    assert table.norm_squared == pytest.approx(np.square(new).sum(), rel=1e-9)
    assert table.residual_squared == 0


def test_rows_of_new_tokens_that_an_adapter_lacks_count_as_lost(grown_case):
    from dataclasses import replace

    base, tuned, adapter = grown_case

    found = verify(replace(adapter, exact={}), base, tuned)

    assert [tensor.name for tensor in found.failed] == ["model.embed_tokens.weight"]


def test_rows_of_new_tokens_have_no_place_in_a_merge(grown_case):
    base, _, adapter = grown_case

    with pytest.raises(Unsupported, match="carries 8 rows of new tokens"):
        merge_adapters([Part(adapter)], base, base_record(base), Combination(), RankRule())
