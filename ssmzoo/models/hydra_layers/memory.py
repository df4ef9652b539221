"""Hydra's two memories: facts addressed by product keys, and a workspace of slots that a sequence writes to.

    facts       x + sigmoid(W_gate x + b) W_v sum over k^2 candidates e of  softmax(s)_e value_e       b = -2: closed
    workspace   once per chunk, with m the mean of the chunk before:  [read, write] = softmax(W m)
                the slot of smallest norm <- 0.9 slot + 0.1 write m;   every token of the chunk gets read R(m, slots)

R is attention of low rank from m to LN(slots). The published workspace takes the mean over the whole sequence, later
tokens included, and shares its slots between the sequences of a batch and from call to call: `PublishedWorkspace`.

b batch, l length, d width, n slots.
Source: arXiv 2508.15099; sidcraftscode/Hydra, pkm_memory.py and workspace_memory.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmzoo.layers.feedforward.product_key import ProductKeys
from ssmzoo.layers.plain import is_plain
from ssmzoo.layers.program import Builder
from ssmzoo.layers.state import Padding, itemsize
from ssmzoo.models.hydra_layers.chunks import ChunkState, chunks, of_chunk
from ssmzoo.ops.eager import eager
from ssmzoo.ops.token_step import Register


class ProductKeyMemory(nn.Module):
    """x (b l d) -> (b l d), x included.

    n1, n2, top_k      half keys on both sides and k (ssmzoo.layers.feedforward.product_key.ProductKeys)
    key_dim, value_dim    width of a half key and of a value | dropout: on what is read
    """

    def __init__(
        self,
        d_model: int,
        n1: int = 64,
        n2: int = 64,
        key_dim: int = 64,
        value_dim: int = 128,
        top_k: int = 4,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.keys = ProductKeys(n1, n2, key_dim, top_k, all_pairs=True)
        self.q_proj = nn.Linear(d_model, 2 * key_dim, bias=False)
        self.values = nn.Embedding(n1 * n2, value_dim)
        self.val_proj = nn.Linear(value_dim, d_model, bias=False)
        self.gate = nn.Linear(d_model, 1)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.values.weight, std=0.01)
        nn.init.constant_(self.gate.bias, -2)

    def forward(self, x: Tensor) -> Tensor:
        scores, entry = self.keys(self.q_proj(x).unflatten(-1, (1, 2, -1)))  # (b l 1 k^2)
        value = torch.einsum("blhe,blhev->blv", scores.softmax(-1), self.values(entry))
        return x + self.gate(x).sigmoid() * self.dropout(self.val_proj(value))

    def program(self, p: Builder, x: Register) -> None:
        """Instructions that change x."""
        p.need(is_plain(self.values), is_plain(self.dropout, among=frozenset({nn.Dropout})))
        value = p.reg(self.values.embedding_dim)
        p.product_keys(self.keys, p.linear(self.q_proj, x), value, None, (self.values.weight,))
        p.gated_add(x, p.linear(self.gate, x, "sigmoid"), p.linear(self.val_proj, value))

    def inactive_parameters(self) -> int:
        """Parameters of the values that a token does not read."""
        rows, width = self.values.weight.shape
        return width * max(0, rows - self.keys.top_k**2)


class WorkspaceState(NamedTuple):
    slots: Tensor  # (b n d)
    read: Tensor  # (b d) what every token of the open chunk gets
    chunk: ChunkState


class Workspace(nn.Module):
    """forward(x (b l d), state) -> (y (b l d), state), x included.

    n_slots, rank   slots, and width of the attention that reads them | chunk_size: tokens between two writes
    n_uses          places of a model that share the layer, for the size of the state
    """

    def __init__(self, d_model: int, n_slots: int = 64, chunk_size: int = 32, rank: int = 128, n_uses: int = 1):
        super().__init__()
        if min(n_slots, chunk_size, rank) < 1:
            raise ValueError(f"a workspace needs positive sizes, got {n_slots=}, {chunk_size=}, {rank=}")
        self.chunk_size, self.n_uses = chunk_size, n_uses
        self.slots = nn.Parameter(0.01 * torch.randn(n_slots, d_model))
        self.gate = nn.Linear(d_model, 2)
        self.slot_ln = nn.LayerNorm(d_model)
        self.q_proj = nn.Linear(d_model, rank, bias=False)
        self.k_proj = nn.Linear(d_model, rank, bias=False)
        self.v_proj = nn.Linear(d_model, rank, bias=False)
        self.o_proj = nn.Linear(rank, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        state: WorkspaceState | None = None,
        *,
        mask: Padding | None = None,
        seq_idx: Tensor | None = None,
    ) -> tuple[Tensor, WorkspaceState]:
        start = self.slots.to(x.dtype).expand(len(x), -1, -1)
        slots, read, before = (start, torch.zeros_like(x[:, 0]), None) if state is None else state
        cut = chunks(x, self.chunk_size, before, mask, seq_idx)
        reads = [torch.zeros_like(read), read]
        chunk_count = int(cut.last.max()) + 1 if x.is_cpu and eager(x) else cut.sums.shape[1]
        for i in range(2, chunk_count):  # chunk i begins
            begins, exists = cut.begins[:, i, None, None], (i <= cut.last)[:, None, None]
            now, read = self.update(slots, cut.sums[:, i - 1] / self.chunk_size)
            slots = torch.where(exists, torch.where(begins, start, now), slots)
            reads.append(torch.where(begins[..., 0], 0, read))
        reads = torch.stack(reads, dim=1)  # (b s d)
        return x + of_chunk(reads, cut.number), WorkspaceState(slots, of_chunk(reads, cut.last), cut.state)

    def update(self, slots: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Write a chunk's mean (b d), then read: slots (b n d) -> slots, (b d)."""
        read, write = self.gate(mean).softmax(-1).unbind(-1)  # (b)
        smallest = slots.detach().norm(dim=-1).argmin(-1, keepdim=True)  # (b 1)
        smallest = (torch.arange(slots.shape[1], device=slots.device) == smallest)[..., None]  # (b n 1)
        slots = torch.where(smallest, 0.9 * slots + 0.1 * (write[:, None] * mean)[:, None], slots)
        return slots, read[:, None] * self.attend(slots, mean)

    def attend(self, slots: Tensor, mean: Tensor) -> Tensor:
        slots = self.slot_ln(slots)
        q, k, v = self.q_proj(mean)[:, None], self.k_proj(slots), self.v_proj(slots)
        scores = (q @ k.mT) / q.shape[-1] ** 0.5  # (b 1 n)
        return self.o_proj(scores.softmax(-1) @ v)[:, 0]

    def program(self, p: Builder, x: Register) -> None:
        """Instructions that change x."""
        linears = self.gate, self.q_proj, self.k_proj, self.v_proj, self.o_proj
        n, d = self.slots.shape
        p.need(is_plain(*linears, self.slot_ln), all(m.weight.dtype is torch.float32 for m in linears))
        p.need(all(m.bias is None for m in linears[1:]), self.gate.bias is not None, self.slot_ln.bias is not None)
        slots = p.state(n, d), p.state(d)
        sums, flags = p.chunk(x, self.chunk_size)
        p.workspace(x, sums, flags, self.slots, linears, self.slot_ln, slots, self.chunk_size)

    def state_bytes(self, length: int) -> int:
        n, d = self.slots.shape
        return self.n_uses * ((n + 3) * d * itemsize(self)[0] + 8)


class PublishedWorkspace(Workspace):
    """The workspace as published: neither causal nor independent of batch mates, its slots change in every call.

    Of the 32 slots of smallest norm the first b are written, slot i by sequence i.
    """

    def forward(self, x: Tensor, state=None, *, mask: Padding | None = None, seq_idx: Tensor | None = None):
        if state is not None or seq_idx is not None:
            raise ValueError("workspace='published' reads whole single sequences; use 'causal' with states and packing")
        real = torch.ones_like(x[..., :1]) if mask is None else mask.mask[..., None].to(x.dtype)
        mean = (x * real).sum(1) / real.sum(1).clamp(min=1)  # (b d)
        read, write = self.gate(mean).softmax(-1).unbind(-1)
        with torch.no_grad():
            slots = self.slots.norm(dim=-1).argsort()[: min(32, len(x))]
            written = write[: len(slots), None] * mean[: len(slots)]
            self.slots[slots] = 0.9 * self.slots[slots] + (0.1 * written).to(self.slots.dtype)
        found = self.attend(self.slots.clone().to(x.dtype).expand(len(x), -1, -1), mean)
        return x + (read[:, None] * found)[:, None], x.new_empty(len(x), 0)  # a state, so that its use is noticed

    def state_bytes(self, length: int) -> int:
        return 0
