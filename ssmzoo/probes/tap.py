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
            raise ValueError(f"channels {at.tolist()}: {self.name} has {len(self.channels)} channels tapped, numbered from 0")
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

    def states(self) -> Tensor:
        """h after every step, (b e l n), by the recurrence itself."""
        decay, x = self.decay(), self.write() * self.u[..., None]
        h = torch.zeros_like(x[:, :, 0]) if self.initial_state is None else self.initial_state.to(x.dtype)
        out = []
        for t in range(x.shape[2]):
            if self.seq_idx is not None and t:
                h = h * (self.seq_idx[:, t] == self.seq_idx[:, t - 1])[:, None, None]
            h = decay[:, :, t] * h + x[:, :, t]
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
        if isinstance(key, str):
            found = [scan for scan in self if scan.name == key]
            if not found:
                raise KeyError(f"no scan in {key!r}; there are scans in {', '.join(dict.fromkeys(s.name for s in self))}")
            return found[0]
        return super().__getitem__(key)

    def require(self, model: nn.Module, kind: type = Scan) -> Taps:
        """Self, or a ValueError when the pass met no scan of the kind."""
        if not any(isinstance(scan, kind) for scan in self):
            wanted = "selective scan" if kind is Scan else "dense scan"
            raise ValueError(f"{type(model).__name__} ran no {wanted}, so there is nothing to tap; memory and recall "
                             f"look at inputs and outputs only and work for it")
        return self


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
    """
    found, counter, convs, maps = Taps(), {}, {}, {}
    wanted = None if layers is None else set(layers)
    picked = None if channels is None else torch.as_tensor(sorted(set(channels)))
    seen = 0

    def keep(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return t[:rows] if keep_graph else t[:rows].detach()

    def number(at: Whereabouts) -> int | None:
        """Which call of the module this is, or None when it was not asked for."""
        nonlocal seen
        place, seen = seen, seen + 1
        counter[at.name] = counter.get(at.name, -1) + 1
        if wanted is not None and place not in wanted and at.name not in wanted:
            return None
        return counter[at.name]

    def add(scan) -> None:
        found.append(scan)
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for s in found for t in vars(s).values() if isinstance(t, Tensor)}
        if sum(held.values()) > max_bytes:
            raise ValueError(f"the tap would hold {sum(held.values()):,} bytes, more than max_bytes = {max_bytes:,}: choose "
                             f"layers=, channels= or rows=, shorten the input, or raise max_bytes")

    def diagonal(call, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *args, **kwargs):
        out = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, *args, **kwargs)
        index = number(at)
        if index is None:
            return out
        dt = step_size(delta, delta_bias, delta_softplus)
        add(cut(at, index, u, dt, A, B, C, D, z, out[0] if isinstance(out, tuple) else out, kwargs))
        return out

    def scalar(call, x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
               dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False):
        out = call(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, dt_softplus, dt_limit,
                   return_final_states)
        index = number(at)
        if index is None:
            return out
        h, p = x.shape[2:]
        dt = step_size(dt.transpose(1, 2), dt_bias, dt_softplus).clamp(*dt_limit)  # (b h l)
        wide = [None if t is None else t.permute(0, 2, 3, 1).flatten(1, 2) for t in
                (x, z, out[0] if return_final_states else out)]  # (b hp l)
        D = D if D is None else D.reshape(h, -1).expand(h, p).flatten()
        state = {"seq_idx": seq_idx, "initial_state": None if initial_states is None else initial_states.flatten(1, 2)}
        add(cut(at, index, wide[0], dt.repeat_interleave(p, 1), A[:, None].expand(h, B.shape[-1]).repeat_interleave(p, 0),
                B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D, wide[1], wide[2], state))
        return out

    def dense(call, A_dict, weights, inputs, p_norm=1.0, symbols=None, *args, **kwargs):
        from ssmzoo.ops import mix_transitions

        out = call(A_dict, weights, inputs, p_norm, symbols, *args, **kwargs)
        index = number(at)
        if index is not None:
            T = mix_transitions(A_dict, weights, p_norm)
            if symbols is not None:
                T = T[symbols[:rows]]
                inputs = inputs[symbols] if inputs.ndim == 2 else inputs
            add(DenseScan(at.name, index, keep(T), keep(inputs), keep(out[0])))
        return out

    def convolve(call, x, weight, bias=None, *args, **kwargs):
        convs[at.name] = (x, weight, bias)
        return call(x, weight, bias, *args, **kwargs)

    def lay_out(call, x, scans="cross"):
        maps[at.name] = orders(*x.shape[-2:], scans, x.device)
        return call(x, scans)

    def cut(at, index, u, dt, A, B, C, D, z, y, state) -> Scan:
        e = u.shape[1]
        some = torch.arange(e) if picked is None else picked
        if len(some) and not 0 <= int(some.min()) <= int(some.max()) < e:
            raise ValueError(f"channels {some.tolist()}: {at.name or type(model).__name__} has {e} channels, numbered from 0")
        chosen = (lambda t: t) if picked is None else (lambda t: t.index_select(t.ndim - 2, some.to(t.device)))
        at_rows = {k: None if t is None else chosen(keep(t)) for k, t in (("u", u), ("dt", dt), ("z", z), ("y", y))}
        B, C = (chosen(M if keep_graph else M.detach()) if M.ndim == 2 else keep(M) for M in (B, C))
        h0 = state.get("initial_state")
        k, places = directions_of(at.module, e, u.shape[-1], B, maps.get(at.name), u.device)
        A, D = (None if t is None else (t if keep_graph else t.detach()) for t in (A, D))
        conv = convs.get(at.name)
        if conv is not None and conv[0].shape == u.shape:
            x, w, bias = (None if t is None else (t if keep_graph else t.detach()) for t in conv)
            rows_x = chosen(x[:rows])
            conv = Convolution(rows_x, w if picked is None else w[some], None if bias is None else bias[some])
        else:
            conv = None
        pick = (lambda t: t) if picked is None else (lambda t: t[some])
        return Scan(at.name, index, at_rows["u"], at_rows["dt"], pick(A), B, C, None if D is None else pick(D),
                    at_rows["z"], at_rows["y"], None if h0 is None else chosen(keep(h0)), keep(state.get("seq_idx")),
                    some, e, k, places, conv)

    with Whereabouts(model) as at, operators(model, selective_scan_fn=diagonal, mamba_chunk_scan_combined=scalar,
                                             dense_scan=dense, causal_conv1d_fn=convolve, cross_scan=lay_out):
        yield found
    if wanted is not None:
        numbers = [w for w in wanted if not isinstance(w, str) and not 0 <= w < seen]
        names = [w for w in wanted if isinstance(w, str) and w not in counter]
        if numbers or names:
            raise ValueError(f"layers {numbers + names} do not exist: the pass ran {seen} scans, numbered from 0, in "
                             f"{', '.join(counter) or 'no module'}")


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What the operators make of delta: the bias added and the softplus taken, in fp32 or better. (b e l)"""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    delta = delta if bias is None else delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def directions_of(module: nn.Module, e: int, l: int, B: Tensor, on_map: Tensor | None, device) -> tuple[int, Tensor | None]:
    """(k, (k l) token of every step or None) from what the module says about itself or how it laid out its map."""
    if on_map is not None and on_map.shape[1] == l:
        return len(on_map), on_map
    if getattr(module, "directions", None) in ("both", "shared"):
        steps = torch.arange(l, device=device)
        return 2, torch.stack([steps, steps.flip(0)])
    return 1, None
