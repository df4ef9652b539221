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
from ssmzoo.ops import gated_linear_recurrence, sum_rows
from ssmzoo.ops.eager import eager
from ssmzoo.ops.token_step import Register

AT_ONCE = 64  # chunks whose slots a workspace holds at a time


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
        weight, entry = scores.softmax(-1).flatten(-2), entry.flatten(-2)  # (b l k^2)
        if is_plain(self.values):
            value = sum_rows(self.values.weight, entry, weight)
        else:
            value = torch.einsum("ble,blev->blv", weight, self.values(entry))
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
        reads = [torch.stack([torch.zeros_like(read), read], dim=1)]
        chunk_count = int(cut.last.max()) + 1 if x.is_cpu and eager(x) else cut.sums.shape[1]
        for i in range(2, chunk_count, AT_ONCE):  # these chunks begin
            j = min(i + AT_ONCE, chunk_count)
            mean, begins = cut.sums[:, i - 1 : j - 1] / self.chunk_size, cut.begins[:, i:j]
            missing = torch.arange(i, j, device=x.device) > cut.last[:, None]
            slots, read = self.update(slots, start, mean, begins, missing)
            reads.append(read)
        reads = torch.cat(reads, dim=1)  # (b s d)
        return x + of_chunk(reads, cut.number), WorkspaceState(slots, of_chunk(reads, cut.last), cut.state)

    def update(
        self, slots: Tensor, start: Tensor, mean: Tensor, begins: Tensor, missing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """At every chunk write the mean (b s d) of the one before, then read.

        slots (b n d) before, start those of a document that begins (b s) -> slots behind the last chunk, reads (b s d)
        missing (b s): there is no such chunk
        """
        read, write = self.gate(mean).softmax(-1).unsqueeze(-1).unbind(-2)  # (b s 1)
        told, begins, missing = write * mean, begins[..., None, None], missing[..., None, None]
        with torch.no_grad():
            chosen = self.smallest(slots, start, told, begins, missing)[..., None]  # (b s n 1)
        kept = torch.where(chosen, 0.9, 1.0).masked_fill(begins, 0).masked_fill(missing, 1)
        put = torch.where(chosen, 0.1 * told[:, :, None], 0)
        put = torch.where(begins, start[:, None], put).masked_fill(missing, 0)  # (b s n d)
        shape = put.shape
        kept, put = kept.expand(shape).flatten(2), put.flatten(2)
        found = gated_linear_recurrence(kept, put, initial_state=slots.flatten(1)).view(shape).to(mean.dtype)
        return found[:, -1], torch.where(begins[..., 0], 0, read * self.attend(found, mean))

    def smallest(self, slots: Tensor, start: Tensor, told: Tensor, begins: Tensor, missing: Tensor) -> Tensor:
        """Which slot every chunk writes to, one hot (b s n): that of smallest norm at the time."""
        number, chosen = torch.arange(slots.shape[1], device=slots.device), []
        for i in range(told.shape[1]):
            chosen.append(number == slots.norm(dim=-1).argmin(-1, keepdim=True))  # (b n)
            written = torch.lerp(slots, told[:, i, None], 0.1 * chosen[-1][..., None].to(slots.dtype))
            slots = torch.where(missing[:, i], slots, torch.where(begins[:, i], start, written))
        return torch.stack(chosen, dim=1)

    def attend(self, slots: Tensor, mean: Tensor) -> Tensor:
        """What means (... d) read of slots (... n d)."""
        slots = self.slot_ln(slots)
        q, k, v = self.q_proj(mean).unsqueeze(-2), self.k_proj(slots), self.v_proj(slots)
        scores = (q @ k.mT) / q.shape[-1] ** 0.5  # (... 1 n)
        return self.o_proj(scores.softmax(-1) @ v).squeeze(-2)

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
