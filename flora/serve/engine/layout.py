"""Where everything lies in the unified pool: pure arithmetic, the same in every process.

A page id names one plane per layer; one (plane, page) is a *cell*, with id `plane * num_pages + page`. KV of layer l
lies in plane l. An adapter is one stream of elements over the cells of its page list, plane by plane of each page in
turn: cell c of the stream is plane `c % num_planes` of page `pages[c // num_planes]`. Its elements may be smaller than
those of keys and values; a cell has as many bytes.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from flora.adapter import AdapterHeader, ChangeReport, Module
from flora.errors import ShapeMismatch, Unsupported
from flora.kernels.modules import CHUNK, MODULES, matrix_alignment, padded
from flora.serve.engine.model.config import ModelConfig

_MODULE_NAME = re.compile(
    r"model\.layers\.(?P<layer>0|[1-9][0-9]*)\.(?:self_attn\.(?P<attn>[qkvo])|mlp\.(?P<mlp>gate|up|down))_proj"
)
_ROW_PARALLEL = ("o", "down")  # their inputs are split over tensor-parallel ranks; the others' outputs are


@dataclass(frozen=True, slots=True)
class PoolGeometry:
    """The pool's shape; counts are one device's own."""

    num_planes: int  # one per layer
    num_pages: int  # page 0, the null page, among them
    page_tokens: int
    num_kv_heads: int
    head_dim: int
    itemsize: int  # bytes of one element
    adapter_itemsize: int | None = None  # of one of an adapter's; None: the same

    @property
    def kv_elements(self) -> int:
        """Elements that the keys and values of one page take in one plane."""
        return 2 * self.page_tokens * self.num_kv_heads * self.head_dim

    @property
    def cell_elements(self) -> int:
        return padded(self.kv_elements)

    @property
    def adapter_cell_elements(self) -> int:
        """Elements of an adapter that a cell holds: more than of keys and values, where they are smaller."""
        return self.cell_elements * self.itemsize // (self.adapter_itemsize or self.itemsize)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page id, all planes."""
        return self.num_planes * self.cell_elements * self.itemsize

    @property
    def num_cells(self) -> int:
        return self.num_planes * self.num_pages

    def pages_for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def cells_for_elements(self, num_elements: int) -> int:
        """Of an adapter's stream."""
        return -(-num_elements // self.adapter_cell_elements)

    def pages_for_elements(self, num_elements: int) -> int:
        return -(-self.cells_for_elements(num_elements) // self.num_planes)

    def cell_ids(self, pages: Sequence[int], num_cells: int) -> NDArray[np.int64]:
        """The first `num_cells` cells of a stream over `pages`. Thousands of them stand between a request and its
        first token.
        """
        cells = np.arange(num_cells)
        return cells % self.num_planes * self.num_pages + np.asarray(pages, dtype=np.int64)[cells // self.num_planes]


@dataclass(frozen=True, slots=True)
class PlacedModule:
    """One module's place in its adapter's stream. A row starts on a chunk of 64 elements, a matrix on more."""

    name: str
    layer: int
    module: int  # index in MODULES
    rank: int
    in_features: int  # of A as stored on this device: [rank, in_features]
    out_features: int  # of B, stored transposed: [rank, out_features]
    scale: float
    a_chunk: int
    b_chunk: int


@dataclass(frozen=True, slots=True)
class AdapterTable:
    """What the kernels must know of an adapter. Made where it is loaded: an engine reads it between two steps."""

    records: bytes  # int32 [num_layers, len(MODULES), 3]: rank, a_chunk and b_chunk; rank 0 where there is no module
    scales: bytes  # float32 [num_layers, len(MODULES)]
    max_rank: int
    num_elements: int  # of its stream


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Layer by layer, first every A in the order of MODULES, then every B: what one launch reads lies together."""

    modules: tuple[PlacedModule, ...]
    num_layers: int  # of the base
    num_elements: int

    def table(self, exponents: Mapping[str, int] = MappingProxyType({})) -> AdapterTable:
        """exponents  the powers of two that the products of modules' stored factors were multiplied by, by name"""
        records = np.zeros((self.num_layers, len(MODULES), 3), dtype=np.int32)
        scales = np.zeros((self.num_layers, len(MODULES)), dtype=np.float32)
        for placed in self.modules:
            records[placed.layer, placed.module] = placed.rank, placed.a_chunk, placed.b_chunk
            scales[placed.layer, placed.module] = placed.scale * 2.0 ** -exponents.get(placed.name, 0)
        max_rank = max((placed.rank for placed in self.modules), default=0)
        return AdapterTable(records.tobytes(), scales.tobytes(), max_rank, self.num_elements)


def adapter_layout(
    config: ModelConfig,
    header: AdapterHeader,
    tp_size: int = 1,
    report: ChangeReport | None = None,
    *,
    alignment: int = CHUNK,
) -> AdapterLayout:
    """The stream of this adapter on one of `tp_size` devices; equal for all of them.

    report     of the extraction: lets a refusal say how much of the change it is about
    alignment  elements, a multiple of CHUNK, that every matrix starts on: stream_alignment
    Raises Unsupported (a module that the server cannot adapt) and ShapeMismatch (of another model), naming the module.
    """
    if header.exact_tensors:
        raise Unsupported(
            f"the adapter carries {len(header.exact_tensors)} whole tensors, {header.exact_tensors[0].name} among "
            "them, which this server cannot apply",
            cause="all requests of a batch share the base's norms and biases",
            fix="extract again without --vectors"
            if all(tensor.first_row is None for tensor in header.exact_tensors)
            else "serve the checkpoint itself: its vocabulary is larger than the base's",
            tensor=header.exact_tensors[0].name,
        )
    by_place: dict[tuple[int, int], Module] = {}
    for module in header.modules:
        by_place[_place(config, module, report)] = module
    placed: list[PlacedModule] = []
    chunk, step = 0, alignment // CHUNK
    for layer in range(config.num_layers):
        present = [(index, by_place[layer, index]) for index in range(len(MODULES)) if (layer, index) in by_place]
        shapes = [_local_shape(MODULES[index], module, tp_size) for index, module in present]
        a_chunks, b_chunks = [], []
        for (_, module), (in_features, _) in zip(present, shapes, strict=True):
            a_chunks.append(-(-chunk // step) * step)
            chunk = a_chunks[-1] + module.rank * padded(in_features) // CHUNK
        for (_, module), (_, out_features) in zip(present, shapes, strict=True):
            b_chunks.append(-(-chunk // step) * step)
            chunk = b_chunks[-1] + module.rank * padded(out_features) // CHUNK
        placed += [
            PlacedModule(module.name, layer, index, module.rank, *shape, module.scale, a_chunk, b_chunk)
            for (index, module), shape, a_chunk, b_chunk in zip(present, shapes, a_chunks, b_chunks, strict=True)
        ]
    return AdapterLayout(tuple(placed), config.num_layers, chunk * CHUNK)


def stream_alignment(config: ModelConfig, geometry: PoolGeometry) -> int:
    """Elements on which every matrix of any adapter's stream starts: kernels look cells up the less often for it."""
    sizes = (size for module in MODULES for size in config.module_shape(module))
    return matrix_alignment(sizes, geometry.adapter_cell_elements)


def _place(config: ModelConfig, module: Module, report: ChangeReport | None) -> tuple[int, int]:
    """(layer, index in MODULES) of one module. Raises Unsupported, ShapeMismatch."""
    match = _MODULE_NAME.fullmatch(module.name)
    if match is None:
        is_table = module.kind == "embedding"
        raise Unsupported(
            f"the adapter changes {module.name}{_share(module, report)}, which this server cannot adapt",
            cause="it adapts the projections q, k, v, o, gate, up and down of the decoder's layers",
            fix=f"extract again {'without --embeddings' if is_table else f'with --exclude {module.name}'}",
            module=module.name,
        )
    layer, kind = int(match["layer"]), match["attn"] or match["mlp"]
    if layer >= config.num_layers:
        raise ShapeMismatch(
            f"the adapter changes {module.name}{_share(module, report)}, and the base has {config.num_layers} layers",
            cause="the adapter belongs to a deeper model",
            module=module.name,
        )
    expected = config.module_shape(kind)
    if (module.in_features, module.out_features) != expected:
        raise ShapeMismatch(
            f"{module.name}{_share(module, report)} is [{module.out_features}, {module.in_features}] in the adapter, "
            f"[{expected[1]}, {expected[0]}] in the base",
            cause="the adapter belongs to a model of another size",
            module=module.name,
        )
    return layer, MODULES.index(kind)


def _share(module: Module, report: ChangeReport | None) -> str:
    """Words about the module's part in the whole change, where the report knows it."""
    change = report.by_name().get(f"{module.name}.weight") if report else None
    return f" ({report.share(change):.1%} of the change)" if report and change else ""


def _local_shape(kind: str, module: Module, tp_size: int) -> tuple[int, int]:
    """(in_features, out_features) of one device's part: its slice of the inputs of o and down, else of the outputs."""
    if kind in _ROW_PARALLEL:
        return module.in_features // tp_size, module.out_features
    return module.in_features, module.out_features // tp_size
