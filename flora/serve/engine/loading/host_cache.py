"""Packed adapters in host memory: the least recently used that nothing waits for makes room."""

from collections import OrderedDict
from collections.abc import Callable

from flora.serve.engine.loading.packing import PackedAdapter


class HostCache:
    """At most `capacity_bytes`, or what is waited for if that is more."""

    def __init__(self, capacity_bytes: int, settle: Callable[[str], None] = lambda _: None) -> None:
        """settle  returns when no copy to the device reads the adapter's host memory any more"""
        self.capacity_bytes = capacity_bytes
        self.num_bytes = 0
        self._settle = settle
        self._packed: OrderedDict[str, PackedAdapter] = OrderedDict()  # least recently used first

    def get(self, digest: str) -> PackedAdapter | None:
        packed = self._packed.get(digest)
        if packed:
            self._packed.move_to_end(digest)
        return packed

    def num_pages(self, digest: str) -> int | None:
        """Pages that the adapter will need, if it is here. Asking is no use of it."""
        packed = self._packed.get(digest)
        return packed.num_pages if packed else None

    def put(self, packed: PackedAdapter) -> None:
        self.discard(packed.digest)
        self._packed[packed.digest] = packed
        self.num_bytes += packed.num_bytes

    def discard(self, digest: str) -> None:
        packed = self._packed.pop(digest, None)
        if packed:
            self.num_bytes -= packed.num_bytes
            self._settle(digest)
            if packed.release:
                packed.release()

    def free(self, num_bytes: int, is_wanted: Callable[[str], bool]) -> bool:
        """Forgets the oldest that are not wanted, until that many bytes are given back; whether any are."""
        before = self.num_bytes
        self._forget_down_to(before - num_bytes, is_wanted)
        return self.num_bytes < before

    def trim(self, is_wanted: Callable[[str], bool]) -> bool:
        """Forgets the oldest that is not wanted until the rest fits; whether it does."""
        self._forget_down_to(self.capacity_bytes, is_wanted)
        return self.num_bytes <= self.capacity_bytes

    def _forget_down_to(self, num_bytes: int, is_wanted: Callable[[str], bool]) -> None:
        while self.num_bytes > num_bytes:
            oldest = next((digest for digest in self._packed if not is_wanted(digest)), None)
            if oldest is None:
                return
            self.discard(oldest)
