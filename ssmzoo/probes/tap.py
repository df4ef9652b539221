"""The tap: what every scan of a forward pass received and computed, collected without touching the model.

    with tap(model, layers=[0, 3], channels=[0, 1]) as scans:
        model(x)
    scans[0].decay()     # exp(delta A), (b e l n), of the channels asked for

Diagonal scans (Mamba, Vim, SS2D, ...), scalar ones (Mamba-2, SSD) and Mamba-3's come in one form, `Scan`, in which a
head is a group of channels that share A, delta, B and C; SD-SSM's dense transitions and the complex diagonal SSM's come
as `DenseScan`. A layer that scans in several directions has all of them side by side in its channels: `places` says on
which token every step fell.

b batch, e channels over all directions, l length, n state size, g groups of B and C, k directions, h heads of p
channels, r ranks (Mamba-3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmzoo.layers.mixers import complex_diagonal, mamba3
from ssmzoo.layers.soft_sort import SoftSort
from ssmzoo.models import adventurer, mamba_fscil, mambair_v2
from ssmzoo.ops import mix_transitions
from ssmzoo.ops.cross_scan import orders
from ssmzoo.probes.interception import Whereabouts, exchanged, operators
from ssmzoo.probes.scan import Convolution, DenseScan, Fusion, Scan, Taps

__all__ = ["MEMORY", "Convolution", "DenseScan", "Fusion", "Scan", "Taps", "tap"]

MEMORY = 1 << 30  # bytes that a tap keeps unless told otherwise


@contextlib.contextmanager
def tap(
    model: nn.Module,
    layers: Iterable[int | str] | None = None,
    channels: Iterable[int] | None = None,
    rows: int | None = None,
    keep_graph: bool = False,
    max_bytes: int = MEMORY,
    positions: Iterable[int] | None = None,
) -> Iterator[Taps]:
    """Collect the scans of the forward passes within the block into a list of `Scan` and `DenseScan`.

    layers      numbers (in the order of the calls) or module names of the scans to keep; None: all
    channels    numbers of the channels to keep, counted over all directions; None: all
    rows        keep the first so many members of the batch
    keep_graph  keep tensors differentiable; otherwise they are detached
    max_bytes   the tap refuses to hold more than this (1 GiB) and says what to choose
    positions   numbers of the steps to keep, with the states behind them; None: all steps. Negative ones count from
                the end

    Nothing but what was asked for outlives its layer. Steps that decode one token with carried state run in a fused
    operator and are not seen: tap a whole sequence. Raises ValueError for a model that ran no scan, and for layers,
    channels and positions that do not exist.
    """
    recorder = _Recorder(model, layers, channels, rows, keep_graph, max_bytes, positions)
    sorts = [m.register_forward_hook(recorder.sorted) for m in model.modules() if isinstance(m, SoftSort)]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(recorder.at)
            stack.enter_context(
                operators(
                    model,
                    selective_scan_fn=recorder.diagonal,
                    mamba_chunk_scan_combined=recorder.scalar,
                    dense_scan=recorder.dense,
                    causal_conv1d_fn=recorder.convolve,
                    cross_scan=recorder.lay_out,
                    state_fusion=recorder.fuse,
                )
            )
            stack.enter_context(exchanged(mamba3.Mamba3, "_scan", recorder.rotating))
            stack.enter_context(exchanged(complex_diagonal, "complex_scan", recorder.turning))
            stack.enter_context(exchanged(mamba_fscil, "four_orders", recorder.four_orders))
            stack.enter_context(exchanged(mambair_v2, "reorder", recorder.reorder))
            stack.enter_context(_Gates(recorder))
            yield recorder.found
    finally:
        for hook in sorts:
            hook.remove()
    recorder.check()


class _Gates(TorchFunctionMode):
    """The first SiLU that a layer takes behind its scan is its gate's."""

    def __init__(self, recorder: _Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.silu:
            self.recorder.gate(args[0])
        return function(*args, **(kwargs or {}))


class _Recorder:
    """Serves the operators of a model and keeps what was asked for."""

    def __init__(self, model, layers, channels, rows, keep_graph, max_bytes, positions):
        self.model, self.rows, self.keep_graph, self.max_bytes = model, rows, keep_graph, max_bytes
        self.layers = None if layers is None else set(layers)
        self.channels = None if channels is None else torch.as_tensor(sorted(set(channels)), dtype=torch.long)
        self.positions = None if positions is None else list(dict.fromkeys(positions))
        self.found, self.at = Taps(), Whereabouts(model)
        self.calls: dict[str, int] = {}  # scans so far, by module
        self.beside: dict[tuple[str, str], object] = {}  # (kind, module): what its next scan needs to know
        self.gated: Scan | None = None  # the scan whose layer has not gated yet

    def check(self) -> None:
        seen = sum(self.calls.values())
        if not seen:
            raise ValueError(
                f"{type(self.model).__name__} ran no scan, so there is nothing to tap; {without_scans(self.model)}"
            )
        wrong = [w for w in self.layers or () if w not in self.calls and (isinstance(w, str) or not 0 <= w < seen)]
        if wrong:
            raise ValueError(
                f"layers {wrong} do not exist: the pass ran {seen} scans, numbered from 0, in {', '.join(self.calls)}"
            )

    # -- in place of the operators

    def diagonal(self, call, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *args, **kwargs):
        out = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, *args, **kwargs)
        if (index := self.wanted(u.shape[1])) is not None:
            y = out[0] if isinstance(out, tuple) else out
            delta = step_size(self.cut(delta, 1), self.cut(delta_bias, 0, False), delta_softplus)
            self.add(index, u, delta, A, B, C, D, z, y, kwargs.get("initial_state"), kwargs.get("seq_idx"))
        return out

    def scalar(
        self,
        call,
        x,
        dt,
        A,
        B,
        C,
        chunk_size=256,
        D=None,
        z=None,
        dt_bias=None,
        initial_states=None,
        seq_idx=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        return_final_states=False,
    ):
        out = call(
            x,
            dt,
            A,
            B,
            C,
            chunk_size,
            D,
            z,
            dt_bias,
            initial_states,
            seq_idx,
            dt_softplus,
            dt_limit,
            return_final_states,
        )
        if (index := self.wanted(x.shape[2] * x.shape[3])) is not None:
            h, p = x.shape[2:]
            y = out[0] if return_final_states else out
            u, z, y = (None if t is None else t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, z, y))  # (b hp l)
            dt = step_size(dt.transpose(1, 2), dt_bias, dt_softplus).clamp(*dt_limit)  # (b h l)
            D = None if D is None else D.reshape(h, -1).expand(h, p).flatten()
            h0 = None if initial_states is None else initial_states.flatten(1, 2)
            self.add(
                index,
                u,
                self.cut(per_head(dt, p), 1),
                A[:, None].expand(h, B.shape[-1]).repeat_interleave(p, 0),
                B.permute(0, 2, 3, 1),
                C.permute(0, 2, 3, 1),
                D,
                z,
                y,
                h0,
                seq_idx,
            )
        return out

    def rotating(self, call, mixer, v, k, q, a, now, later, state, seq_idx):
        """Mamba-3: v (b l h p), k and q (b l r h n) rotated, a, now, later (b l h) -> y (b l r h p)"""
        out = call(mixer, v, k, q, a, now, later, state, seq_idx)
        if (index := self.wanted(k.shape[2] * v.shape[2] * v.shape[3])) is not None:
            if state is not None:
                raise ValueError(f"{self.at.name} of Mamba-3 went on from a carried state; tap a whole sequence")
            r, h, n = k.shape[2:]
            p = v.shape[-1]
            share = mixer.mimo_x.transpose(0, 1) if mixer.is_mimo else v.new_ones(1, h, p)  # (r h p)
            A = -torch.ones(r * h * p, n, device=v.device, dtype=a.dtype)
            B = (
                k[:, :, 0].permute(0, 2, 3, 1)
                if r == 1
                else torch.einsum("blrhn,rhp->bhpnl", k, share).flatten(1, 2).repeat(1, r, 1, 1)
            )
            C = q.permute(0, 2, 3, 4, 1).flatten(1, 2)  # (b rh n l)
            u = v.permute(0, 2, 3, 1).flatten(1, 2).repeat(1, r, 1)  # (b rhp l)
            D = (mixer.D[None, :, None] * share).flatten()
            y = out[0].permute(0, 2, 3, 4, 1).flatten(1, 3)
            after = later[:, 1:] if seq_idx is None else later[:, 1:] * (seq_idx[:, 1:] == seq_idx[:, :-1])[..., None]
            steps = (t.transpose(1, 2) for t in (-a, now + F.pad(after, (0, 0, 0, 1)), now))  # (b h l)
            delta, w, own = (self.cut(per_head(t, p).repeat(1, r, 1), 1) for t in steps)
            self.add(index, u, delta, A, B, C, D, None, y, None, seq_idx, weight=w, own=own)
            self.found[-1].ranks = r
        return out

    def dense(self, call, A_dict, weights, inputs, p_norm=1.0, symbols=None, *args, **kwargs):
        out = call(A_dict, weights, inputs, p_norm, symbols, *args, **kwargs)
        if (index := self.wanted()) is not None:
            weights = weights if symbols is not None else weights[: self.rows]
            T, x = mix_transitions(A_dict, weights, p_norm), inputs
            if symbols is not None:
                T, x = T[symbols[: self.rows]], (x[symbols] if x.ndim == 2 else x)
            self.keep(
                DenseScan(
                    self.at.name,
                    index,
                    self.cut(T),
                    self.cut(x),
                    self.cut(out[0]),
                    self.cut(kwargs.get("initial_state")),
                )
            )
        return out

    def turning(self, call, a, b):
        """The complex diagonal SSM: a, b (b l n) complex; a turn is a 2 x 2 block between real and imaginary part."""
        out = call(a, b)
        if (index := self.wanted()) is not None:
            a, b, products, h = (self.cut(t) for t in (a, b, *out))
            start = self.cut(self.at.module.init_state, batched=False).expand(len(a), -1)
            h = h + products * start[:, None]
            re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)  # (b l n n)
            T = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
            self.keep(DenseScan(self.at.name, index, T, *(torch.cat([t.real, t.imag], -1) for t in (b, h, start))))
        return out

    def convolve(self, call, x, weight, bias=None, *args, **kwargs):
        if self.asked():
            self.beside["conv", self.at.name] = Convolution(x, weight, bias)
        return call(x, weight, bias, *args, **kwargs)

    def lay_out(self, call, x, scans="cross"):
        self.beside["orders", self.at.name] = orders(*x.shape[-2:], scans, x.device)
        return call(x, scans)

    def four_orders(self, call, x):
        """Mamba-FSCIL's cross scan, whose orders are rows of the batch where all share one Mamba."""
        steps = torch.arange(x.shape[-2] * x.shape[-1], device=x.device, dtype=torch.float64)
        at = call(steps.view(1, 1, *x.shape[-2:]))[0, :, 0].long()  # (4 l)
        rows = at[:, None].repeat(len(x), 1, 1) if hasattr(self.at.module, "x_proj") else at
        self.beside["orders", self.at.name] = rows
        return call(x)

    def reorder(self, call, x, order):
        """MambaIRv2 sorts the tokens by class in front of its scan, a module inside of the one that sorts."""
        self.beside["sorted", self.at.name] = order[:, None]
        return call(x, order)

    def sorted(self, module, inputs, P):
        self.beside["mixture", self.at.around()[0]] = P

    def fuse(self, call, x, kernels, alpha):
        """Spatial-Mamba: behind the scan with C = 1, the fusion and the read-out that its layer writes out."""
        out = call(x, kernels, alpha)
        scan = self.found[-1] if self.found and isinstance(self.found[-1], Scan) else None
        if scan is None or scan.name != self.at.around()[0] or scan.C.ndim > 2:
            return out
        mixer, u = self.at.around()[1], self.beside.pop(("u", scan.name))
        scan.C = (self.cut(mixer.x_proj_weight[-1:], batched=False) @ u)[:, None]  # (b 1 1 l)
        scan.fusion = Fusion(
            tuple(self.cut(k, 0, False) for k in kernels), self.cut(alpha, batched=False), tuple(x.shape[-2:])
        )
        scan.D = self.cut(mixer.Ds, 0, False)
        h = self.cut(out.flatten(2), 1)
        if scan.positions is not None:
            scan.C, h = scan.C[..., scan.positions], h[..., scan.positions]
            scan.kept = h[..., None]
        scan.y = h * scan.C[:, 0] + scan.D[:, None] * scan.u
        return out

    # -- what is kept

    def asked(self) -> bool:
        """Whether the next scan of the module at work was asked for."""
        return self.layers is None or sum(self.calls.values()) in self.layers or self.at.name in self.layers

    def wanted(self, e: int | None = None) -> int | None:
        """Which call of its module this is, or None when it was not asked for; e: the channels it has."""
        asked, index = self.asked(), self.calls.get(self.at.name, 0)
        self.calls[self.at.name], self.gated = index + 1, None
        if not asked:
            return None
        if e is not None and self.channels is not None and not all(0 <= c < e for c in self.channels.tolist()):
            raise ValueError(
                f"channels {self.channels.tolist()}: the scan in {self.at.name or 'the model'} has {e} "
                f"channels, numbered from 0"
            )
        return index

    def cut(self, t: Tensor | None, axis: int | None = None, batched: bool = True) -> Tensor | None:
        """The rows, and along `axis` the channels, asked for, in memory of their own."""
        if t is None:
            return None
        t = t if self.keep_graph else t.detach()
        t = t[: self.rows] if batched and self.rows is not None else t
        if axis is not None and self.channels is not None and t.shape[axis] > len(self.channels):
            t = t.index_select(axis, self.channels.to(t.device))
        if self.keep_graph or t.untyped_storage().nbytes() <= t.nbytes:
            return t
        return t.clone(memory_format=torch.contiguous_format)  # a view would keep all it is a view of alive

    def add(self, index, u, delta, A, B, C, D, z, y, initial_state, seq_idx, weight=None, own=None) -> None:
        e, l, name = u.shape[1], u.shape[2], self.at.name
        channels = torch.arange(e) if self.channels is None else self.channels
        if getattr(self.at.module, "state_fusion", None) is not None and C.ndim == 2:
            self.beside["u", name] = self.cut(u)  # all channels make the C that `fuse` needs
        B, C = (self.cut(M, 0, batched=False) if M.ndim == 2 else self.cut(M) for M in (B, C))
        k, places, extra = self.directions(l, u.device)
        scan = Scan(
            name,
            index,
            self.cut(u, 1),
            delta,
            self.cut(A, 0, False),
            B,
            C,
            self.cut(D, 0, False),
            self.cut(z, 1),
            self.cut(y, 1),
            self.cut(initial_state, 1),
            self.cut(seq_idx),
            channels,
            e,
            l,
            k,
            places,
            self.convolution(e, l),
            extra=extra,
            weight=weight,
            own=own,
            mixture=self.cut(self.beside.pop(("mixture", name), None)),
        )
        if self.positions is not None:
            scan = at_positions(scan, self.positions)
        self.gated = scan
        self.keep(scan)

    def directions(self, l: int, device) -> tuple[int, Tensor | None, int]:
        """k, (k l) or (b k l) token of every step or None, tokens that are none of the model's."""
        module, parent = self.at.module, self.at.around()
        if (at := self.beside.pop(("orders", self.at.name), None)) is not None and at.shape[-1] == l:
            at = at[: self.rows] if at.ndim == 3 else at
            return at.shape[-2], at, 0
        if (at := self.beside.pop(("sorted", parent[0]), None)) is not None:
            return 1, at[: self.rows], 0
        steps = torch.arange(l, device=device)
        if getattr(module, "directions", None) in ("both", "shared") or getattr(module, "scans", None) == "cascade":
            return 2, torch.stack([steps, steps.flip(0)]), 0
        if isinstance(parent[1], adventurer.AdventurerBlock):  # [mean, patches in either order, class token]
            patches = steps[: l - 2].flip(0) if parent[1].flip else steps[: l - 2]
            return 1, torch.cat([steps[-1:], patches, steps[l - 2 : l - 1]])[None], 1
        return 1, None, 0

    def convolution(self, e: int, l: int) -> Convolution | None:
        """The one in front of this scan; Mamba-2 convolves B and C as well, behind the channels of u."""
        conv = self.beside.pop(("conv", self.at.name), None)
        if conv is None or conv.x.shape[1] < e or conv.x.shape[2] != l or self.positions is not None:
            return None
        bias = None if conv.bias is None else self.cut(conv.bias[:e], 0, False)
        return Convolution(self.cut(conv.x[:, :e], 1), self.cut(conv.weight[:e], 0, False), bias)

    def gate(self, z: Tensor) -> None:
        """A SiLU was taken: the first one that the layer of the scan recorded last takes behind it is its gate's."""
        scan = self.gated
        if scan is None or scan.name not in (self.at.name, self.at.around()[0]):
            return
        self.gated = None
        e, l = scan.total // scan.directions, scan.length
        if z.ndim < 3 or z[0].numel() != e * l:
            return
        z = (z if self.keep_graph else z.detach())[: len(scan.u)].reshape(-1, l, e).transpose(1, 2)  # (b e l)
        z = z[:, (scan.channels % e).to(z.device)]
        at = None if scan.extra else scan.step_places()  # (e l) or (b e l); a layer within Adventurer goes by steps
        if at is not None:
            z = z.gather(2, at.expand_as(z) if scan.positions is None else at.expand(*z.shape[:2], -1))
        elif scan.positions is not None:
            z = z[..., scan.positions]
        scan.gate = z.contiguous()

    def keep(self, scan: Scan | DenseScan) -> None:
        self.found.append(scan)
        held = self.found.bytes()
        if held > self.max_bytes:
            self.found.clear()
            raise ValueError(
                f"the tap would hold {held:,} bytes, more than max_bytes = {self.max_bytes:,}: choose "
                f"layers=, channels=, positions= or rows=, shorten the input, or raise max_bytes"
            )


def at_positions(scan: Scan, positions: list[int]) -> Scan:
    """The scan with nothing but the steps `positions` and the states behind them."""
    l = scan.length
    if not positions or not -l <= min(positions) <= max(positions) < l:
        raise ValueError(
            f"positions {positions}: the scan in {scan.name or 'the model'} has {l} steps, numbered from "
            f"0 (or from -{l} backwards)"
        )
    at = torch.as_tensor([p % l for p in positions], device=scan.u.device)
    kept = scan.recurrence(at.tolist())
    cut = {
        name: None if (t := getattr(scan, name)) is None else t[..., at]
        for name in ("u", "delta", "z", "y", "seq_idx", "weight", "own")
    }
    B, C = (M if M.ndim == 2 else M[..., at] for M in (scan.B, scan.C))
    return replace(scan, B=B, C=C, **cut, kept=kept, positions=at, conv=None)


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What the operators make of delta: the bias added and the softplus taken, in fp32 or better. (b e l)"""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    delta = delta if bias is None else delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def per_head(t: Tensor, p: int) -> Tensor:
    """(b h l) -> (b hp l)"""
    return t[:, :, None].expand(-1, -1, p, -1).flatten(1, 2)


def without_scans(model: nn.Module) -> str:
    """Which probes a model without scans still has."""
    image = any(isinstance(m, nn.Conv2d) for m in model.modules())
    names = "relevance and receptive_field" if image else "relevance, memory, recall (for language models)"
    return f"the probes {names} and token_dynamics (its norms over depth) need none and still apply"
