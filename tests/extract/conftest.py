from collections.abc import Iterator

import pytest
import torch

from flora.checkpoint import Checkpoint
from tests.extract.models import build, save, tune


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Matrices as small as these are not worth a second thread, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Checkpoint]:
    """A tied two-layer Llama in bf16 and its full fine-tune, which nobody may write to."""
    folder = tmp_path_factory.mktemp("pair")
    model = build("llama")
    return save(model, folder / "base", torch.bfloat16), save(tune(model), folder / "tuned", torch.bfloat16)
