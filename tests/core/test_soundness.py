"""What a header and a report may say. tests/registry/test_hostile_folders.py has each field with its refusal."""

import msgspec
import pytest

from flora.adapter import ChangeReport, TensorChange
from flora.errors import AdapterInvalid
from flora.soundness import TOLERANCE, check_header, check_report
from tests.registry.adapters import random_adapter


def report(**fields: object) -> ChangeReport:
    told = {"name": "w", "shape": (4, 4), "status": "extracted", "norm_squared": 2.0, "kept": 1.0} | fields
    return ChangeReport(tensors=(TensorChange(**told),))


def test_a_refusal_names_where_it_stands_the_field_the_value_and_what_is_wanted():
    header = random_adapter().header
    first = msgspec.structs.replace(header.modules[0], rank=0)
    header = msgspec.structs.replace(header, modules=(first, *header.modules[1:]))

    with pytest.raises(AdapterInvalid) as refused:
        check_header(header, "flora.json", fix="fetch it again")

    assert refused.value.what == "flora.json has header.modules[0].rank = 0, which must be 1 or more"
    assert (refused.value.field, refused.value.fix) == ("header.modules[0].rank", "fetch it again")


@pytest.mark.parametrize("kept", [2.0 * (1 + TOLERANCE), 2.0, 0.0, -2.0 * TOLERANCE])
def test_rounding_may_put_kept_energy_a_little_beyond_its_bounds(kept):
    check_report(report(kept=kept), "extract", "flora.json")


def test_what_each_number_of_terms_keeps_ends_with_what_all_of_them_keep():
    check_report(report(rank=2, kept=1.0, kept_by_rank=(0.7, 1.0)), "extract", "flora.json")
    check_report(report(rank=0, kept=0.0, kept_by_rank=()), "prune", "flora.json")
    with pytest.raises(AdapterInvalid, match="kept_by_rank"):
        check_report(report(rank=2, kept=1.0, kept_by_rank=(float("nan"), 1.0)), "extract", "flora.json")


@pytest.mark.parametrize("operation", ["extract", "import", "merge", "prune"])
@pytest.mark.parametrize("kept", [2.0 * (1 + 2 * TOLERANCE), float("inf"), float("nan")])
def test_nothing_keeps_more_than_there_was(operation, kept):
    with pytest.raises(AdapterInvalid, match="kept"):
        check_report(report(kept=kept), operation, "flora.json")


def test_only_a_merge_and_a_cut_of_it_can_keep_less_than_nothing():
    """PEFT's linear merge adds factors and not products: it can lie further from the sum than nothing does."""
    for operation in ("merge", "prune"):
        check_report(report(kept=-3.0), operation, "flora.json")
        with pytest.raises(AdapterInvalid, match="kept"):
            check_report(report(kept=-float("inf")), operation, "flora.json")
    for operation in ("extract", "import"):
        with pytest.raises(AdapterInvalid, match="kept"):
            check_report(report(kept=-3.0), operation, "flora.json")


def test_the_signal_of_an_estimated_spectrum_may_sum_up_to_more_than_the_norm():
    """A randomized decomposition of a change of exactly low rank finds directions that are not there."""
    check_report(report(signal_energy=2.8), "extract", "flora.json")


def test_a_whole_tensor_in_a_narrower_dtype_may_lose_more_than_had_changed():
    check_report(report(status="exact", kept=-3.0), "extract", "flora.json")
    with pytest.raises(AdapterInvalid, match="kept"):
        check_report(report(status="exact", kept=-float("inf")), "extract", "flora.json")
