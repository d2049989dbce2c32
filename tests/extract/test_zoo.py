"""Many architectures: what PEFT computes from our folder is what the truncated deltas do, to float32's rounding."""

import pytest
import torch

from flora.extract import Wish
from tests.extract.peft_judge import distance, extracted
from tests.extract.zoo import ZOO

ROUNDING = 3e-4  # in units of the change


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("wish", [Wish(), Wish(embeddings=True, vectors=True)], ids=["layers", "everything"])
def test_peft_computes_what_the_truncated_deltas_do(tmp_path, name, wish):
    kind = ZOO[name]
    base, _, adapter = extracted(kind.build(), tmp_path, rank=6, wish=wish)

    opened = kind.opens.from_pretrained(base.path, dtype=torch.float32)

    assert distance(opened, adapter, tmp_path, kind.forward) < ROUNDING
    assert adapter.report.kept_share > 0.5
