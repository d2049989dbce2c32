"""From the registry to packed host memory: one adapter version, read, checked and laid out for the device."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from flora.errors import AdapterInvalid, AdapterNotFound, OutOfPages, StoreError
from flora.identity import BaseRecord
from flora.registry import Registry, Version
from flora.registry.leases import Lease
from flora.serve.engine.layout import AdapterLayout, AdapterTable, PoolGeometry, adapter_layout, stream_alignment
from flora.serve.engine.loading.binding import admit
from flora.serve.engine.loading.packing import PackedAdapter, pack_cells
from flora.serve.engine.model.config import ModelConfig
from flora.serve.request import AdapterTarget

logger = logging.getLogger(__name__)

_MAX_FOUND = 10_000  # versions remembered


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    """An adapter that exists and may be served; its weights are not read yet."""

    version: Version
    layout: AdapterLayout
    num_cells: int
    num_pages: int


class RegistrySource:
    """Finds, checks and packs adapter versions. It belongs to the thread that first uses it."""

    def __init__(
        self,
        registry: str,
        config: ModelConfig,
        base: BaseRecord,
        geometry: PoolGeometry,
        dtype: torch.dtype,
        *,
        allow_base_mismatch: bool = False,
    ) -> None:
        """dtype  of adapters in the pool"""
        self.geometry = geometry
        self.dtype = dtype
        self._registry_url = registry
        self._opened: Registry | None = None
        self._lease: Lease | None = None
        self._found: dict[str, Version] = {}  # the latest, by digest
        self._config = config
        self._base = base
        self._allow_base_mismatch = allow_base_mismatch

    def __call__(self, target: AdapterTarget) -> PackedAdapter:
        """The adapter, packed into memory of its own. Raises what find and pack raise."""
        started_s = time.perf_counter()
        found = self.find(target)
        cells = torch.empty(found.num_cells, self.geometry.adapter_cell_elements, dtype=self.dtype)
        table = self.pack(found, cells)
        return PackedAdapter(
            target.serving_digest, table, cells, found.num_pages, load_s=time.perf_counter() - started_s
        )

    def find(self, target: AdapterTarget) -> FoundAdapter:
        """What the header tells, checked before any weight is read.

        Raises AdapterNotFound, StoreError, BaseMismatch, Unsupported, ShapeMismatch, OutOfPages.
        """
        version = self._version(target.version_digest)
        if version.serving_digest != target.serving_digest:
            raise AdapterInvalid(
                f"{target.label} resolved to serving digest {target.serving_digest[:19]}…, and the registry holds "
                f"{version.serving_digest[:19]}… for that version",
                fix="run `flora fsck`",
            )
        header = self._registry.header(version)
        admit(self._registry, version, header, self._base, target.label, allow_mismatch=self._allow_base_mismatch)
        alignment = stream_alignment(self._config, self.geometry)
        layout = adapter_layout(self._config, header, report=self._registry.report(version), alignment=alignment)
        num_pages = self.geometry.pages_for_elements(layout.num_elements)
        if num_pages >= self.geometry.num_pages:
            raise OutOfPages(
                f"adapter {target.label} needs {num_pages} pages and the pool has {self.geometry.num_pages}",
                fix="give the server a larger pool, or prune the adapter with `flora prune`",
                needed=num_pages,
            )
        return FoundAdapter(version, layout, self.geometry.cells_for_elements(layout.num_elements), num_pages)

    def pack(self, found: FoundAdapter, cells: Tensor) -> AdapterTable:
        """Reads the weights, checks them against their digests, and fills `cells` [num_cells, adapter_cell_elements].

        Raises StoreError, NotFinite.
        """
        with self._registry.loading(found.version) as adapter:
            return pack_cells(adapter, found.layout, cells)

    def close(self) -> None:
        """Ends the lease: what was removed meanwhile may be collected."""
        if self._lease:
            self._lease.close()
        if self._opened:
            self._opened.close()

    def _version(self, digest: str) -> Version:
        """The version of that digest; also after its removal, if this process or another one here has a lease of it.

        A name that is gone leads no new request here, but a stream that was preempted comes back for its adapter, and
        one that had resolved the name before may meet a loader process that has not seen it yet.
        """
        try:
            version = self._registry.by_digest(digest)
        except AdapterNotFound:
            removed = self._found.get(digest) or self._registry.leased(digest)
            if removed is None:
                raise
            version = removed
        self._keep(version)
        if len(self._found) >= _MAX_FOUND:
            self._found.pop(next(iter(self._found)))
        self._found[digest] = version
        return version

    def _keep(self, version: Version) -> None:
        """What is served stays readable until this process ends, though it be removed and collected."""
        try:
            if self._lease is None:
                self._lease = self._registry.lease()
            self._lease.keep(version)
        except (StoreError, OSError) as error:  # a registry that is only to be read: nothing here collects it either
            logger.debug("no lease of %s: %s", version.digest, error)

    @property
    def _registry(self) -> Registry:
        if self._opened is None:  # by the thread that uses it
            self._opened = Registry.open(self._registry_url)
        return self._opened
