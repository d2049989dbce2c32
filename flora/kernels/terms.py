"""Low-rank terms that a product still lacks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRankTerms:
    """What is to be added to a product [n, out] on the rows that have an adapter. Who reads the product adds it."""

    values: Tensor  # [n, out], the product's dtype; rows without an adapter hold anything
    adapter_rows: Tensor  # int32 [n]: not 0 where a row has one

    def added_to(self, y: Tensor) -> Tensor:
        """A new [n, out]; float32 inside, one rounding. Rows without an adapter keep their bits."""
        return torch.where(self.adapter_rows[:, None] != 0, (y.float() + self.values.float()).to(y.dtype), y)
