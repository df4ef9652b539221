"""What a tap brings back: one record per scan of a forward pass, and the recurrence it stands for.

    h_t = exp(delta_t A) h_{t-1} + w_t B_t u_t,   y_t = <C_t, h_t> + D u_t        w = delta, but for Mamba-3

b batch, e channels over all directions, l length, n state size, g groups of B and C, k directions, p positions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ssmzoo.ops import state_fusion


@dataclass
class Convolution:
    """The causal convolution in front of a scan: x (b e l), weight (e taps), bias (e) or None."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def output(self) -> Tensor:
        """Before the activation, (b e l)"""
        taps = self.weight.shape[1]
        return F.conv1d(F.pad(self.x, (taps - 1, 0)), self.weight[:, None], self.bias, groups=self.x.shape[1])

    def take(self, at: Tensor) -> Convolution:
        return Convolution(self.x[:, at], self.weight[at], None if self.bias is None else self.bias[at])


@dataclass
class Fusion:
    """Spatial-Mamba's sum over a state's neighbours on the map: taps (3, e 1 3 3 each), alpha (3), size (rows,
    columns)."""

    taps: tuple[Tensor, Tensor, Tensor]
    alpha: Tensor
    size: tuple[int, int]

    def __call__(self, h: Tensor) -> Tensor:
        """(b e l) -> (b e l)"""
        return state_fusion(h.unflatten(-1, self.size).contiguous(), self.taps, self.alpha).flatten(-2)

    def take(self, at: Tensor) -> Fusion:
        return replace(self, taps=tuple(t[at] for t in self.taps))


@dataclass
class Scan:
    """One call of a diagonal or scalar scan.

    name       of the module that scanned; index: which of its calls in this pass
    u          (b e l) input | delta (b e l) time step after bias and softplus, in tokens (Mamba-3: minus log-decay)
    A          (e n)   per unit of time | B, C (b g n l), or (e n) where constant
    D          (e) skip weight or None
    z          (b e l) gate before its SiLU that the operator applies, by steps, or None
    gate       (b e l) gate before its SiLU that the layer applies behind the scan, at the token of every step, or None
    y          (b e l) output before `gate`, D u included; behind z where the operator gates
    initial_state (b e n) or None | seq_idx (b l) or None
    channels   (e) numbers of the kept channels among `total` (all directions counted) | length: number of steps
    directions k | indices (k l) or (b k l): the token on which every step of a direction fell; None: in order
    extra      the last so many of these tokens are none of the model's: means over all (Adventurer)
    mixture    (b l l) the scan's tokens are these mixtures of the model's (sorting), or None
    conv       the causal convolution that made u, or None | fusion of the states before they are read, or None
    ranks      channels come so many times, each reading the same state otherwise (Mamba-3's MIMO)
    weight, own   (b e l) w above where it is not delta, and the weight of a token in its own step (Mamba-3)
    positions  (p) the steps kept, None: all. Then u, delta, B, C, z, y and `kept` (b e p n), the states, are cut to
               them; what needs all steps (attention) cannot be formed
    """

    name: str
    index: int
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    y: Tensor
    initial_state: Tensor | None
    seq_idx: Tensor | None
    channels: Tensor
    total: int
    length: int
    directions: int = 1
    indices: Tensor | None = None
    conv: Convolution | None = None
    gate: Tensor | None = None
    extra: int = 0
    mixture: Tensor | None = None
    fusion: Fusion | None = None
    ranks: int = 1
    weight: Tensor | None = None
    own: Tensor | None = None
    positions: Tensor | None = None
    kept: Tensor | None = None
    unit = "channel"

    @property
    def batch(self) -> int:
        return len(self.u)

    def tokens(self, channel: int) -> Tensor:
        """(l), or (b l), the token on which every kept step of the channel (its index in `channels`) fell."""
        at = self.step_tokens()
        if at is not None:
            return at[..., channel, :]
        return torch.arange(self.length, device=self.u.device) if self.positions is None else self.positions

    def places(self, channel: int) -> Tensor:
        """Deprecated name of `tokens`."""
        warnings.warn("Scan.places is called Scan.tokens now", DeprecationWarning, stacklevel=2)
        return self.tokens(channel)

    def step_tokens(self) -> Tensor | None:
        """The same of every channel, (e l) or (b e l); None: in order."""
        return None if self.indices is None else self.by_channel(self.indices)

    def by_channel(self, indices: Tensor) -> Tensor:
        """Indices (k l) or (b k l) -> (e p) or (b e p): that of every kept channel's direction, at the kept steps."""
        direction = self.channels * self.directions // self.total
        at = indices[..., direction.to(indices.device), :]
        return at if self.positions is None else at[..., self.positions]

    def direction(self, channel: int) -> int:
        return int(self.channels[channel]) * self.directions // self.total

    def take(self, channels: Iterable[int]) -> Scan:
        """The same scan with fewer channels, given by their index in `channels`."""
        at = chosen(self, channels, self.u.device)
        along = {
            name: None if (t := getattr(self, name)) is None else t[:, at]
            for name in ("u", "delta", "z", "gate", "y", "initial_state", "weight", "own", "kept")
        }
        first = {name: None if (t := getattr(self, name)) is None else t[at] for name in ("A", "D", "channels")}
        B, C = (M[at] if M.ndim == 2 else M for M in (self.B, self.C))
        return replace(
            self,
            B=B,
            C=C,
            **along,
            **first,
            conv=self.conv and self.conv.take(at),
            fusion=self.fusion and self.fusion.take(at),
        )

    def whole(self, what: str) -> None:
        whole(self, what)

    def per_channel(self, M: Tensor) -> Tensor:
        """B or C -> (b e l n), one row per kept channel."""
        b, e, l = self.u.shape
        if M.ndim == 2:
            return M[None, :, None].expand(b, e, l, -1)
        M = M.unsqueeze(1) if M.ndim == 3 else M
        group = (self.channels * M.shape[1] // self.total).to(M.device)
        return M[:, group].transpose(2, 3)

    def decay(self) -> Tensor:
        """The discretised A, exp(delta A): (b e l n)"""
        return torch.exp(self.delta[..., None] * self.A[:, None])

    def write(self) -> Tensor:
        """The discretised B, w B: (b e l n)"""
        return (self.delta if self.weight is None else self.weight)[..., None] * self.per_channel(self.B)

    def read(self) -> Tensor:
        """C: (b e l n)"""
        return self.per_channel(self.C)

    def states(self, positions: Iterable[int] | None = None) -> Tensor:
        """h after the steps `positions` (all by default, in their order), (b e p n), by the recurrence itself."""
        at = list(range(self.length)) if positions is None else [p % self.length for p in positions]
        if self.positions is None:
            return self.recurrence(at)
        numbers = self.positions.tolist()
        missing = [p for p in at if positions is not None and p not in numbers]
        if missing:
            raise ValueError(f"states at {missing}: the tap of {self.name} kept positions {numbers}")
        return self.kept if positions is None else self.kept[:, :, [numbers.index(p) for p in at]]

    def recurrence(self, positions: list[int]) -> Tensor:
        """States (b e p n); memory for the steps asked for alone, unless they are fused on a map."""
        length = self.u.shape[-1]
        wanted = [p % length for p in positions]
        every = range(length) if self.fusion is not None else wanted
        keep, found = set(every), {}
        w = self.delta if self.weight is None else self.weight
        own = w if self.own is None else self.own
        h = torch.zeros_like(self.A[None].expand(len(self.u), -1, -1)).to(self.u.dtype)
        h = h if self.initial_state is None else self.initial_state.to(h.dtype)
        group = (
            None
            if self.B.ndim == 2
            else (
                self.channels * self.B.shape[-3] // self.total if self.B.ndim == 4 else torch.zeros_like(self.channels)
            )
        )
        B = self.B if group is None or self.B.ndim == 4 else self.B[:, None]
        for t in range(max(keep, default=-1) + 1):
            if self.seq_idx is not None and t:
                h = h * (self.seq_idx[:, t] == self.seq_idx[:, t - 1])[:, None, None]
            b = B if group is None else B[:, group.to(B.device), :, t]  # (e n) or (b e n)
            h = torch.exp(self.delta[:, :, t, None] * self.A) * h
            if t in keep:
                found[t] = h + (own[:, :, t] * self.u[:, :, t])[..., None] * b
            h = h + (w[:, :, t] * self.u[:, :, t])[..., None] * b
        out = torch.stack([found[t] for t in every], dim=2) if keep else h[:, :, None][:, :, :0]
        if self.fusion is None:
            return out
        fused = torch.stack([self.fusion(out[..., i]) for i in range(out.shape[-1])], dim=-1)
        return fused[:, :, wanted]

    def output(self) -> Tensor:
        """y (b e l) rebuilt from what was tapped, for comparison with `y`: <C, h> + D u, behind z."""
        self.whole("the output")
        y = (self.states() * self.read()).sum(-1)
        y = y if self.D is None else y + self.D[:, None] * self.u
        return y if self.z is None else y * F.silu(self.z)


@dataclass
class DenseScan:
    """One scan with dense transitions (SD-SSM), or with rotations written as dense 2 x 2 blocks (complex diagonal).

    h_t = T_t h_{t-1} + x_t: transitions T (b l n n), inputs x (b l n), states h (b l n), initial_state (b n) or None
    """

    name: str
    index: int
    transitions: Tensor
    inputs: Tensor
    states: Tensor
    initial_state: Tensor | None = None


def whole(record, what: str) -> None:
    """Raise ValueError where only some steps were kept."""
    if record.positions is not None:
        raise ValueError(
            f"{what} needs every step of {record.name}, and the tap kept {len(record.positions)} "
            f"positions of it: tap without positions="
        )


def step_numbers(record, positions: Sequence[int], device: torch.device) -> Tensor:
    """Positions, which may count from the end, as numbers of a record's steps, checked."""
    l = record.length
    if not positions or not -l <= min(positions) <= max(positions) < l:
        raise ValueError(
            f"positions {positions}: the scan in {record.name or 'the model'} has {l} steps, numbered from "
            f"0 (or from -{l} backwards)"
        )
    return torch.as_tensor([p % l for p in positions], device=device)


def chosen(record, numbers: Iterable[int], device: torch.device) -> Tensor:
    """Indices into a record's channels or heads, checked."""
    at = torch.as_tensor(list(numbers), device=device, dtype=torch.long)
    n = len(record.channels)
    if at.numel() and not -n <= int(at.min()) <= int(at.max()) < n:
        raise ValueError(
            f"{record.unit}s {at.tolist()}: {n} {record.unit}s of {record.name} were tapped, numbered from 0"
        )
    return at


class Taps(list):
    """What a pass scanned, in the order of the calls; `taps["layers.0.mixer"]` is that module's first scan."""

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = [scan for scan in self if scan.name == key]
        if not found:
            raise KeyError(f"no scan in {key!r}; there are scans in {', '.join(dict.fromkeys(s.name for s in self))}")
        return found[0]

    def bytes(self) -> int:
        """Memory that the records keep alive, views counted with what they are views of."""
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(list(self))}.values())


def tensors(record) -> list[Tensor]:
    """Every tensor of a record or list of records."""
    if isinstance(record, Tensor):
        return [record]
    if isinstance(record, (list, tuple)):
        return [t for part in record for t in tensors(part)]
    if is_dataclass(record):
        return [t for f in fields(record) for t in tensors(getattr(record, f.name))]
    return []
