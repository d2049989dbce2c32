"""The cell table becomes wider while adapters arrive: CudaRunner.write_adapter over a model of its two streams."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from flora.serve.engine.cuda.copies import AdapterCopies
from flora.serve.engine.cuda.runner import CudaRunner
from flora.serve.engine.layout import AdapterTable, PoolGeometry
from flora.serve.engine.loading.packing import PackedAdapter
from flora.serve.engine.pool import DevicePool
from flora.serve.engine.schedule.residency import Resident
from flora.serve.engine.tables import AdapterTables
from flora.serve.request import AdapterTarget

NUM_LAYERS = 2
GEOMETRY = PoolGeometry(
    num_planes=NUM_LAYERS, num_pages=100, page_tokens=4, num_kv_heads=1, head_dim=4, itemsize=torch.float32.itemsize
)
WIDTH = 8  # cells of an adapter, before the table becomes wider


class LateTables(AdapterTables):
    """What is entered on the stream that copies is there once that stream is waited for."""

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(4, NUM_LAYERS, pool.cells, max_cells=WIDTH)
        self.launched: list[tuple[Tensor, Tensor]] = []

    def _fill(self, place: Tensor, values: np.ndarray) -> None:
        self.launched.append((place, torch.from_numpy(values)))


class LateCopies(AdapterCopies):
    """The stream that copies: it gets nowhere before another one waits for it."""

    def __init__(self, tables: LateTables) -> None:
        self._tables = tables
        self._arriving = {}
        self.num_waits = 0

    def write(self, slot: int, host: Tensor, cell_ids: NDArray[np.int64], publish: Callable[[], None]) -> None:
        publish()
        self._arriving[slot], self._tables.launched = self._tables.launched, []

    def wait(self, slots: Iterable[int]) -> None:
        for slot in self._arriving.keys() & set(slots):
            self.num_waits += 1
            for place, values in self._arriving.pop(slot):
                place.copy_(values)


@pytest.fixture
def runner(monkeypatch) -> CudaRunner:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    runner = CudaRunner.__new__(CudaRunner)
    runner.pool = DevicePool(GEOMETRY, torch.float32, torch.device("cpu"))
    runner.tables = LateTables(runner.pool)
    runner._copies = LateCopies(runner.tables)
    runner._copied = {}
    return runner


def write(runner: CudaRunner, slot: int, pages: range) -> list[int]:
    """Starts to write an adapter that fills these pages; its cells."""
    name, num_cells = f"adapter {slot}", len(pages) * GEOMETRY.num_planes
    records, scales = np.ones((NUM_LAYERS, 7, 3), np.int32), np.ones((NUM_LAYERS, 7), np.float32)
    packed = PackedAdapter(
        name,
        AdapterTable(records.tobytes(), scales.tobytes(), 1, num_cells),
        torch.zeros(num_cells, GEOMETRY.cell_elements),
        len(pages),
        load_s=0.0,
    )
    target = AdapterTarget(serving_digest=name, version_digest=name, label=name)
    runner.write_adapter(Resident(target, slot, list(pages)), packed)
    return GEOMETRY.cell_ids(list(pages), num_cells).tolist()


def entered(runner: CudaRunner, slot: int, num_cells: int) -> list[int]:
    return runner.tables.weights.cells[slot, :num_cells].tolist()


def test_adapters_that_still_arrive_when_the_table_is_widened_keep_their_cells(runner):
    small = [write(runner, slot, range(10 * slot, 10 * slot + 3)) for slot in (1, 2)]
    large = write(runner, 3, range(40, 60))
    assert len(small[0]) < WIDTH < len(large)

    runner._copies.wait([1, 2, 3])  # a step that uses all of them

    assert [entered(runner, slot, len(small[0])) for slot in (1, 2)] == small
    assert entered(runner, 3, len(large)) == large


def test_where_the_table_is_wide_enough_no_adapter_is_waited_for(runner):
    for slot in (1, 2):
        write(runner, slot, range(10 * slot, 10 * slot + WIDTH // GEOMETRY.num_planes))
    assert runner._copies.num_waits == 0
