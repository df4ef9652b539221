"""The tap: what every scan of a forward pass received and computed, collected without touching the model.

    with tap(model, layers=[0, 3], channels=[0, 1]) as scans:
        model(x)
    scans[0].decay()     # exp(delta A), (b e l n), of the channels asked for

Diagonal scans (Mamba, Vim, SS2D, ...) and scalar ones (Mamba-2, SSD) come in one form, `Scan`, in which an SSD head is
a group of channels that share A, delta, B and C; SD-SSM's dense transitions come as `DenseScan`. A layer that scans in
several directions has all of them side by side in its channels: `places` says on which token every step fell.

b batch, e channels over all directions, l length, n state size, g groups of B and C, k directions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmzoo.ops import mix_transitions
from ssmzoo.ops.cross_scan import orders
from ssmzoo.probes.interception import Whereabouts, operators

MEMORY = 1 << 30  # bytes that a tap keeps unless told otherwise


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


@dataclass
class Scan:
    """One call of a diagonal or scalar scan.

    name       of the module that scanned; index: which of its calls in this pass
    u          (b e l) input | delta (b e l) time step after bias and softplus, in tokens
    A          (e n)   per unit of time | B, C (b g n l), or (e n) where constant
    D          (e) skip weight or None | z (b e l) gate before its SiLU or None
    y          (b e l) output before the gate, D u included, and after it where the operator gates
    initial_state (b e n) or None | seq_idx (b l) or None
    channels   (e) numbers of the kept channels among `total` (all directions counted)
    directions k | orders (k l) token on which every step of a direction fell, None: in order
    conv       the causal convolution that made u, or None
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
    directions: int = 1
    orders: Tensor | None = None
    conv: Convolution | None = None

    def places(self, channel: int) -> Tensor:
        """(l) the token on which every step of the channel (its place in `channels`) fell."""
        if self.orders is None:
            return torch.arange(self.u.shape[-1], device=self.u.device)
        return self.orders[self.direction(channel)]

    def direction(self, channel: int) -> int:
        return int(self.channels[channel]) * self.directions // self.total

    def take(self, channels: Iterable[int]) -> Scan:
        """The same scan with fewer channels, given by their place in `channels`."""
        at = torch.as_tensor(list(channels), device=self.u.device)
        if at.numel() and not -len(self.channels) <= int(at.min()) <= int(at.max()) < len(self.channels):
            raise ValueError(f"channels {at.tolist()}: {len(self.channels)} channels of {self.name} were tapped, "
                             f"numbered "
                             f"from 0")
        cut = {k: None if v is None else v[:, at] for k, v in (("z", self.z), ("initial_state", self.initial_state))}
        conv = self.conv and Convolution(self.conv.x[:, at], self.conv.weight[at],
                                         None if self.conv.bias is None else self.conv.bias[at])
        B, C = (M[at] if M.ndim == 2 else M for M in (self.B, self.C))
        return Scan(self.name, self.index, self.u[:, at], self.delta[:, at], self.A[at], B, C,
                    None if self.D is None else self.D[at], cut["z"], self.y[:, at], cut["initial_state"], self.seq_idx,
                    self.channels[at], self.total, self.directions, self.orders, conv)

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
        """The discretised B, delta B: (b e l n)"""
        return self.delta[..., None] * self.per_channel(self.B)

    def read(self) -> Tensor:
        """C: (b e l n)"""
        return self.per_channel(self.C)

    def states(self, positions: Iterable[int] | None = None) -> Tensor:
        """h after the steps `positions` (all of them by default), (b e p n), by the recurrence itself."""
        length = self.u.shape[-1]
        wanted = set(range(length)) if positions is None else {p % length for p in positions}
        B, dt = self.per_channel(self.B), self.delta[..., None]
        h = torch.zeros_like(B[:, :, 0]) if self.initial_state is None else self.initial_state.to(B.dtype)
        out = []
        for t in range(length):
            if self.seq_idx is not None and t:
                h = h * (self.seq_idx[:, t] == self.seq_idx[:, t - 1])[:, None, None]
            h = torch.exp(dt[:, :, t] * self.A) * h + dt[:, :, t] * B[:, :, t] * self.u[:, :, t, None]
            if t in wanted:
                out.append(h)
        return torch.stack(out, dim=2)


@dataclass
class DenseScan:
    """One call of SD-SSM's scan. transitions (b l n n), inputs (b l n), states (b l n)."""

    name: str
    index: int
    transitions: Tensor
    inputs: Tensor
    states: Tensor


class Taps(list):
    """The scans of a pass, in the order of their calls; `taps["layers.0.mixer"]` is that module's first scan."""

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = [scan for scan in self if scan.name == key]
        if not found:
            raise KeyError(f"no scan in {key!r}; there are scans in {', '.join(dict.fromkeys(s.name for s in self))}")
        return found[0]

    def bytes(self) -> int:
        """Memory that the records keep alive, views counted with what they are views of."""
        tensors = [t for s in self for t in vars(s).values() if isinstance(t, Tensor)]
        tensors += [t for s in self for t in vars(getattr(s, "conv", None) or object).values() if isinstance(t, Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@contextlib.contextmanager
def tap(model: nn.Module, layers: Iterable[int | str] | None = None, channels: Iterable[int] | None = None,
        rows: int | None = None, keep_graph: bool = False, max_bytes: int = MEMORY) -> Iterator[Taps]:
    """Collect the scans of the forward passes within the block into a list of `Scan` and `DenseScan`.

    layers      numbers (in the order of the calls) or module names of the scans to keep; None: all
    channels    numbers of the channels to keep, counted over all directions; None: all
    rows        keep the first so many members of the batch
    keep_graph  keep tensors differentiable; otherwise they are detached
    max_bytes   the tap refuses to hold more than this (1 GiB) and says what to choose

    Steps that decode one token with carried state run in a fused operator and are not seen: tap a whole sequence.
    Raises ValueError for a model that ran no scan, and for layers and channels that do not exist.
    """
    recorder = _Recorder(model, layers, channels, rows, keep_graph, max_bytes)
    with recorder.at, operators(model, selective_scan_fn=recorder.diagonal, mamba_chunk_scan_combined=recorder.scalar,
                                dense_scan=recorder.dense, causal_conv1d_fn=recorder.convolve,
                                cross_scan=recorder.lay_out):
        yield recorder.found
    recorder.check()


class _Recorder:
    """Serves the operators of a model and keeps what was asked for."""

    def __init__(self, model, layers, channels, rows, keep_graph, max_bytes):
        self.model, self.rows, self.keep_graph, self.max_bytes = model, rows, keep_graph, max_bytes
        self.layers = None if layers is None else set(layers)
        self.channels = None if channels is None else torch.as_tensor(sorted(set(channels)), dtype=torch.long)
        self.found, self.at = Taps(), Whereabouts(model)
        self.calls: dict[str, int] = {}  # scans so far, by module
        self.convs: dict[str, Convolution] = {}
        self.maps: dict[str, Tensor] = {}

    def check(self) -> None:
        seen = sum(self.calls.values())
        if not seen:
            raise ValueError(f"{type(self.model).__name__} ran no scan, so there is nothing to tap; the probes "
                             f"relevance, memory, recall and receptive_field look at inputs and outputs only and apply")
        wrong = [w for w in self.layers or () if w not in self.calls and (isinstance(w, str) or not 0 <= w < seen)]
        if wrong:
            raise ValueError(f"layers {wrong} do not exist: the pass ran {seen} scans, numbered from 0, in "
                             f"{', '.join(self.calls)}")

    # -- in place of the operators

    def diagonal(self, call, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *args, **kwargs):
        out = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, *args, **kwargs)
        if (index := self.wanted()) is not None:
            y = out[0] if isinstance(out, tuple) else out
            self.add(index, u, step_size(delta, delta_bias, delta_softplus), A, B, C, D, z, y,
                     kwargs.get("initial_state"), kwargs.get("seq_idx"))
        return out

    def scalar(self, call, x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None,
               seq_idx=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):
        out = call(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit,
                   return_final_states)
        if (index := self.wanted()) is not None:
            h, p = x.shape[2:]
            y = out[0] if return_final_states else out
            u, z, y = (None if t is None else t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, z, y))  # (b hp l)
            dt = step_size(dt.transpose(1, 2), dt_bias, dt_softplus).clamp(*dt_limit)  # (b h l)
            D = None if D is None else D.reshape(h, -1).expand(h, p).flatten()
            h0 = None if initial_states is None else initial_states.flatten(1, 2)
            self.add(index, u, dt.repeat_interleave(p, 1), A[:, None].expand(h, B.shape[-1]).repeat_interleave(p, 0),
                     B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D, z, y, h0, seq_idx)
        return out

    def dense(self, call, A_dict, weights, inputs, p_norm=1.0, symbols=None, *args, **kwargs):
        out = call(A_dict, weights, inputs, p_norm, symbols, *args, **kwargs)
        if (index := self.wanted()) is not None:
            weights = weights if symbols is not None else weights[: self.rows]
            T, x = mix_transitions(A_dict, weights, p_norm), inputs
            if symbols is not None:
                T, x = T[symbols[: self.rows]], (x[symbols] if x.ndim == 2 else x)
            self.keep(DenseScan(self.at.name, index, self.cut(T), self.cut(x), self.cut(out[0])))
        return out

    def convolve(self, call, x, weight, bias=None, *args, **kwargs):
        self.convs[self.at.name] = Convolution(x, weight, bias)
        return call(x, weight, bias, *args, **kwargs)

    def lay_out(self, call, x, scans="cross"):
        self.maps[self.at.name] = orders(*x.shape[-2:], scans, x.device)
        return call(x, scans)

    # -- what is kept

    def wanted(self) -> int | None:
        """Which call of its module this is, or None when it was not asked for."""
        name, place = self.at.name, sum(self.calls.values())
        index = self.calls[name] = self.calls.get(name, 0) + 1
        asked = self.layers is None or place in self.layers or name in self.layers
        return index - 1 if asked else None

    def cut(self, t: Tensor | None, axis: int | None = None, batched: bool = True) -> Tensor | None:
        """The rows, and along `axis` the channels, asked for."""
        if t is None:
            return None
        t = t if self.keep_graph else t.detach()
        if batched and self.rows is not None and self.rows < len(t):
            t = t[: self.rows].clone()  # a view would keep the whole batch alive
        return t if axis is None or self.channels is None else t.index_select(axis, self.channels.to(t.device))

    def add(self, index, u, delta, A, B, C, D, z, y, initial_state, seq_idx) -> None:
        e, l, name = u.shape[1], u.shape[2], self.at.name
        channels = torch.arange(e) if self.channels is None else self.channels
        if len(channels) and not 0 <= int(channels.min()) <= int(channels.max()) < e:
            raise ValueError(f"channels {channels.tolist()}: the scan in {name or type(self.model).__name__} has {e} "
                             f"channels, numbered from 0")
        B, C = (self.cut(M, 0, batched=False) if M.ndim == 2 else self.cut(M) for M in (B, C))
        k, places = directions_of(self.at.module, l, self.maps.get(name), u.device)
        self.keep(Scan(name, index, self.cut(u, 1), self.cut(delta, 1), self.cut(A, 0, False), B, C,
                       self.cut(D, 0, False), self.cut(z, 1), self.cut(y, 1), self.cut(initial_state, 1),
                       self.cut(seq_idx), channels, e, k, places, self.convolution(e, l)))

    def convolution(self, e: int, l: int) -> Convolution | None:
        """The one in front of this scan; Mamba-2 convolves B and C as well, behind the channels of u."""
        conv = self.convs.get(self.at.name)
        if conv is None or conv.x.shape[1] < e or conv.x.shape[2] != l:
            return None
        bias = None if conv.bias is None else self.cut(conv.bias[:e], 0, False)
        return Convolution(self.cut(conv.x[:, :e], 1), self.cut(conv.weight[:e], 0, False), bias)

    def keep(self, scan: Scan | DenseScan) -> None:
        self.found.append(scan)
        held = self.found.bytes()
        if held > self.max_bytes:
            self.found.clear()
            raise ValueError(f"the tap would hold {held:,} bytes, more than max_bytes = {self.max_bytes:,}: choose "
                             f"layers=, channels= or rows=, shorten the input, or raise max_bytes")


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What the operators make of delta: the bias added and the softplus taken, in fp32 or better. (b e l)"""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    delta = delta if bias is None else delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def directions_of(module: nn.Module, l: int, on_map: Tensor | None, device) -> tuple[int, Tensor | None]:
    """(k, (k l) token of every step or None) from what the module says about itself or how it laid out its map."""
    if on_map is not None and on_map.shape[1] == l:
        return len(on_map), on_map
    if getattr(module, "directions", None) in ("both", "shared"):
        steps = torch.arange(l, device=device)
        return 2, torch.stack([steps, steps.flip(0)])
    return 1, None
