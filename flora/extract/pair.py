"""One tensor of the base and its counterpart of the tuned checkpoint."""

from dataclasses import dataclass
from typing import Literal

from flora.checkpoint import TensorInfo
from flora.extract.buffers import buffer_reason
from flora.forms import Form, Kind, matrix_shape


@dataclass(frozen=True, slots=True)
class TensorPair:
    """One tensor on both sides. `name` is the base's own; the tuned checkpoint's where the base has none."""

    name: str
    base: TensorInfo | None  # None: only the tuned checkpoint holds it
    tuned: TensorInfo | None  # None: a buffer that only the base holds
    status: Literal["extractable", "exact", "not_extractable", "excluded"] = "extractable"  # exact: carried whole
    reason: str | None = None  # of a status other than extractable
    kind: Kind = "linear"  # of an extractable one
    experts: int = 0  # of an expert: how many there are of its kind
    tied: tuple[str, ...] = ()  # modules without a tensor of their own that use this very embedding
    twin: tuple[TensorInfo, TensorInfo] | None = None  # both token embeddings that this output head may be tied to

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def sides(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.base, self.tuned) if info is not None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sides[0].shape

    @property
    def buffer_reason(self) -> str | None:
        """Why this is a buffer, whose difference counts for nothing; None of a weight."""
        return buffer_reason(self.name, self.shape, {info.dtype for info in self.sides})

    @property
    def num_new_rows(self) -> int:
        """Rows that a table has in the tuned checkpoint alone: those of new tokens."""
        return self.tuned.shape[0] - self.base.shape[0] if self.base and self.tuned and self.shape else 0

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[out, in] of an extractable one."""
        return matrix_shape(self.kind, self.shape)

    @property
    def form(self) -> Form:
        kernel = self.shape[2:] if self.kind == "conv" else ()
        return Form(kind=self.kind, kernel=kernel, tied=self.tied, experts=self.experts)

    @property
    def num_bytes(self) -> int:
        """What reading both sides takes."""
        return sum(info.num_bytes for info in self.sides)
