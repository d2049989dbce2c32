"""From the registry to packed host memory: one adapter version, read, checked and laid out for the device."""

import time

import torch

from flora.errors import AdapterInvalid, OutOfPages
from flora.identity import BaseRecord
from flora.registry import Registry
from flora.serve.engine.binding import check_base
from flora.serve.engine.layout import PoolGeometry, adapter_layout
from flora.serve.engine.model.config import ModelConfig
from flora.serve.engine.packing import PackedAdapter, pack_cells
from flora.serve.request import AdapterTarget


class RegistrySource:
    """Reads, checks and packs one adapter version."""

    def __init__(
        self,
        registry: str,
        config: ModelConfig,
        base: BaseRecord,
        geometry: PoolGeometry,
        dtype: torch.dtype,
    ) -> None:
        self._registry_url = registry
        self._registry: Registry | None = None
        self._config = config
        self._base = base
        self._geometry = geometry
        self._dtype = dtype

    def __call__(self, target: AdapterTarget) -> PackedAdapter:
        """The packed adapter. What its header tells is checked before its weights are read.

        Raises AdapterNotFound, StoreError, BaseMismatch, Unsupported, ShapeMismatch, OutOfPages, NotFinite.
        """
        started_s = time.perf_counter()
        if self._registry is None:  # opened by the thread that uses it
            self._registry = Registry.open(self._registry_url)
        version = self._registry.by_digest(target.version_digest)
        if version.serving_digest != target.serving_digest:
            raise AdapterInvalid(
                f"{target.label} resolved to serving digest {target.serving_digest[:19]}…, and the registry holds "
                f"{version.serving_digest[:19]}… for that version",
                fix="run `flora fsck`",
            )
        header = self._registry.header(version)
        check_base(header.base, self._base, target.label)
        layout = adapter_layout(self._config, header, report=self._registry.report(version))
        num_pages = self._geometry.pages_for_elements(layout.num_elements)
        if num_pages >= self._geometry.num_pages:
            raise OutOfPages(
                f"adapter {target.label} needs {num_pages} pages and the pool has {self._geometry.num_pages}",
                fix="give the server a larger pool, or prune the adapter with `flora prune`",
                needed=num_pages,
            )
        cells = pack_cells(self._registry.load(version), layout, self._geometry, self._dtype)
        return PackedAdapter(target.serving_digest, layout, cells, num_pages, load_s=time.perf_counter() - started_s)
