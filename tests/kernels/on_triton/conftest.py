from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flora.kernels.triton_ops import TritonOps
from tests.conftest import IS_FULL

DTYPES = [torch.float32, torch.float16]  # Triton's interpreter multiplies bf16 wrongly: a GPU's business
ON_GPU = torch.cuda.is_available()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the interpreter, which takes its time, a test of several cases runs each of them in one dtype, by turns."""
    if ON_GPU or IS_FULL:
        return
    cases: dict[str, dict[str, int]] = defaultdict(dict)  # of a test: its parameters but for the dtype -> number
    kept: list[pytest.Item] = []
    left: list[pytest.Item] = []
    for item in items:
        is_ours = Path(__file__).parent in item.path.parents
        parameters = dict(item.callspec.params) if is_ours and hasattr(item, "callspec") else {}
        dtype = parameters.pop("dtype", None)
        of_test = cases[item.nodeid.partition("[")[0]]
        number = of_test.setdefault(repr(parameters), len(of_test))
        is_its_turn = dtype not in DTYPES or not parameters or DTYPES.index(dtype) == number % len(DTYPES)
        (kept if is_its_turn else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


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
