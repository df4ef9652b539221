"""Product keys: the best of n1 n2 entries found with n1 + n2 comparisons.

    entry (i, j) has the key [key1_i, key2_j], so that  <q, key> = <q1, key1_i> + <q2, key2_j>
    the k best entries lie among the k best i times the k best j:  k^2 sums, of which the k largest (or all of them)

Memories of values (Hydra) and mixtures of one-neuron experts (Cheems) are addressed with it.
b batch, l length, h heads, r width of half a query, k entries per head.
Source: Lample et al. 2019 (arXiv 1907.05242).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class ProductKeys(nn.Module):
    """queries (... h 2 r) -> scores (... h k), largest first, and the numbers i n2 + j of their entries (... h k).

    n1, n2     half keys; together they address n1 n2 entries
    top_k      k, at most the smaller of n1 and n2
    all_pairs  return all k^2 candidates, in no order, instead of the best k
    init_std   keys start as N(0, init_std^2); 0: all entries tie at the start
    Raises ValueError for sizes below 1 and k beyond the number of half keys.
    """

    def __init__(
        self,
        n1: int,
        n2: int,
        d_half: int,
        top_k: int,
        n_heads: int = 1,
        init_std: float = 0.02,
        all_pairs: bool = False,
    ):
        super().__init__()
        if min(n1, n2, d_half, top_k, n_heads) < 1:
            raise ValueError(f"product keys need positive sizes, got {n1=}, {n2=}, {d_half=}, {top_k=}, {n_heads=}")
        if top_k > min(n1, n2):
            raise ValueError(f"top_k = {top_k} entries per head, but there are only {min(n1, n2)} half keys to combine")
        self.n2, self.top_k, self.init_std, self.all_pairs = n2, top_k, init_std, all_pairs
        self.keys1 = nn.Parameter(torch.empty(n_heads, n1, d_half))
        self.keys2 = nn.Parameter(torch.empty(n_heads, n2, d_half))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.keys1, std=self.init_std)
        nn.init.normal_(self.keys2, std=self.init_std)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        q1, q2 = queries.unbind(-2)  # (... h r)
        best1, i = torch.einsum("...hr,hnr->...hn", q1, self.keys1.to(q1.dtype)).topk(self.top_k)
        best2, j = torch.einsum("...hr,hnr->...hn", q2, self.keys2.to(q2.dtype)).topk(self.top_k)
        sums = (best1[..., :, None] + best2[..., None, :]).flatten(-2)  # (... h k^2)
        entries = (i[..., :, None] * self.n2 + j[..., None, :]).flatten(-2)
        if self.all_pairs:
            return sums, entries
        scores, chosen = sums.topk(self.top_k)
        return scores, entries.gather(-1, chosen)


def square_root(n: int, name: str) -> int:
    """The number of half keys on each side of n entries. Raises ValueError when n is no square."""
    root = math.isqrt(max(n, 0))
    if n < 1 or root * root != n:
        near = " or ".join(str(r * r) for r in (root, root + 1) if r)
        raise ValueError(f"{name} = {n} is no square, and product keys address a square number of them; choose {near}")
    return root
