"""Paged keys and values of random sequences in a cache that is NaN elsewhere, and float64 attention over them."""

import torch
from torch import Tensor


class PagedCache:
    """Sequences on shuffled pages; `kv` is the plane that the kernels see."""

    def __init__(
        self, lengths: list[int], kv_heads: int, head_dim: int, page_tokens: int, dtype: torch.dtype = torch.float32
    ) -> None:
        generator = torch.Generator().manual_seed(len(lengths))
        self.head_dim = head_dim
        counts = [-(-length // page_tokens) for length in lengths]
        order = torch.randperm(sum(counts) + 4, generator=generator).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in counts]
        self.keys = [torch.randn(n, kv_heads, head_dim, generator=generator).to(dtype) for n in lengths]
        self.values = [torch.randn(n, kv_heads, head_dim, generator=generator).to(dtype) for n in lengths]
        self.kv = torch.full((sum(counts) + 4, 2, page_tokens, kv_heads, head_dim), float("nan"), dtype=dtype)
        for pages, keys, values in zip(self.pages, self.keys, self.values, strict=True):
            for t in range(len(keys)):
                self.kv[pages[t // page_tokens], 0, t % page_tokens] = keys[t]
                self.kv[pages[t // page_tokens], 1, t % page_tokens] = values[t]

    def block_tables(self, sequences: list[int], spare: int = 0) -> Tensor:
        """int32 [sequences, max_pages]; entries past a sequence's last page are no page at all."""
        width = max(len(self.pages[s]) for s in sequences) + spare
        return torch.tensor([self.pages[s] + [-(10**6)] * (width - len(self.pages[s])) for s in sequences]).int()


def expected_attention(q: Tensor, cache: PagedCache, lengths: list[int], queries: list[int]) -> Tensor:
    """float64 attention of each sequence's last `queries` tokens; zeros where a length is 0."""
    out = torch.zeros_like(q, dtype=torch.float64)
    row = 0
    for keys, values, length, count in zip(cache.keys, cache.values, lengths, queries, strict=True):
        group = q.shape[1] // keys.shape[1]
        for i in range(count if length else 0):
            past = length - count + i + 1
            k = keys[:past].double().repeat_interleave(group, dim=1)
            v = values[:past].double().repeat_interleave(group, dim=1)
            scores = torch.einsum("hd,thd->ht", q[row + i].double(), k) * cache.head_dim**-0.5
            out[row + i] = torch.einsum("ht,thd->hd", scores.softmax(-1), v)
        row += count
    return out
