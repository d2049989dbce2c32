"""A tied two-layer Llama, two full fine-tunes of it, and the adapters that extraction makes of them."""

from collections.abc import Iterator

import pytest
import torch

from flora.adapter import Adapter
from flora.checkpoint import Checkpoint
from flora.extract import ExtractConfig, extract
from flora.rank import RankRule
from tests.extract.models import build, save, tune


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Matrices as small as these are not worth a second thread, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint, Checkpoint]:
    """Base and two fine-tunes in bf16, which nobody may write to."""
    folder = tmp_path_factory.mktemp("algebra")
    model = build("llama")
    tuned = [save(tune(model, seed), folder / f"tuned-{seed}", torch.bfloat16) for seed in (1, 2)]
    return save(model, folder / "base", torch.bfloat16), *tuned


@pytest.fixture(scope="session")
def base(checkpoints: tuple[Checkpoint, ...]) -> Checkpoint:
    return checkpoints[0]


@pytest.fixture(scope="session")
def tuned(checkpoints: tuple[Checkpoint, ...]) -> Checkpoint:
    return checkpoints[1]


@pytest.fixture(scope="session")
def adapters(checkpoints: tuple[Checkpoint, ...]) -> tuple[Adapter, Adapter]:
    """Rank 8 of the first fine-tune, rank 6 of the second."""
    base, *tuned = checkpoints
    first, second = (
        extract(base, one, ExtractConfig(rule=RankRule(max_rank=rank))).adapter
        for one, rank in zip(tuned, (8, 6), strict=True)
    )
    return first, second
