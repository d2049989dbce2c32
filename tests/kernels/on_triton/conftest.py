from collections.abc import Iterator

import pytest
import torch

from flora.kernels.triton_ops import TritonOps

DTYPES = [torch.float32, torch.float16]  # Triton's interpreter multiplies bf16 wrongly: a GPU's business
ON_GPU = torch.cuda.is_available()


@pytest.fixture(params=[*DTYPES, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == torch.bfloat16 and not ON_GPU:
        pytest.skip("bf16 needs a GPU")
    return request.param


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def ops(device: torch.device) -> TritonOps:
    return TritonOps.for_device(device) if ON_GPU else TritonOps(num_sms=2)


@pytest.fixture(autouse=True)
def _scratch_is_nan() -> Iterator[None]:
    """torch.empty gives NaN, so a kernel that reads what no one wrote shows it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
