"""The tap: what every scan of a forward pass received and computed, collected without touching the model.

    with tap(model, layers=[0, 3], channels=[0, 1]) as scans:
        model(x)
    scans[0].decay()     # exp(delta A), (b e l n), of the channels asked for

Whatever scans with the zoo's operators is seen: diagonal scans (Mamba, Vim, SS2D, ...), scalar ones (Mamba-2, SSD),
trapezoidal (Mamba-3) and fused ones (Spatial-Mamba) come in one form, `Scan`, in which a head is a group of channels
that share A, delta, B and C; dense transitions and complex ones come as `DenseScan`. A layer that scans in several
directions has all of them side by side in its channels: `tokens` says on which token every step fell, as far as the
layer lays its tokens out by operators (`cross_scan`, `bidirectional_scan`, `permute_tokens`, ...).

b batch, e channels over all directions, l length, n state size, g groups of B and C, k directions, h heads of p
channels, r ranks (Mamba-3).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmzoo.ops import OPERATORS, mix_transitions, observe
from ssmzoo.ops.cross_scan import scan_indices
from ssmzoo.probes.recorder import Recorder
from ssmzoo.probes.scan import Convolution, DenseScan, Fusion, Scan, Taps
from ssmzoo.probes.softmax_attention import Attention
from ssmzoo.probes.token_order import TokenOrder, permuted, with_mean

__all__ = ["MEMORY", "Attention", "Convolution", "DenseScan", "Fusion", "Scan", "Taps", "tap"]

MEMORY = 1 << 30  # bytes that a tap keeps by default


@contextlib.contextmanager
def tap(
    model: nn.Module,
    layers: Iterable[int | str] | None = None,
    channels: Iterable[int] | None = None,
    rows: int | None = None,
    keep_graph: bool = False,
    max_bytes: int = MEMORY,
    positions: Iterable[int] | None = None,
    attention: bool = False,
) -> Iterator[Taps]:
    """Collect the scans of the forward passes within the block into a list of `Scan` and `DenseScan`.

    layers      numbers (in the order of the calls) or module names of the scans to keep; None: all
    channels    numbers of the channels to keep, counted over all directions; None: all. Of attention, the heads that
                have one of them are kept
    rows        keep the first so many members of the batch
    keep_graph  keep tensors differentiable; otherwise they are detached
    max_bytes   the tap refuses to hold more than this (1 GiB) and says what to choose
    positions   numbers of the steps to keep, with the states behind them; None: all steps. Negative ones count from
                the end
    attention   collect softmax attention as well, as `Attention`: what calls torch's scaled_dot_product_attention

    Nothing but what was asked for outlives its layer. Steps that decode one token with carried state run in a fused
    operator and are not seen: tap a whole sequence. Raises ValueError for a model that ran no scan, and for layers,
    channels and positions that do not exist.
    """
    observer = _Observer(model, layers, channels, rows, keep_graph, max_bytes, positions, attention)
    seen = {name: getattr(observer, name) for name in OPERATORS if hasattr(observer, name)}
    with observer.modules, observe(**seen), _FromTorch(observer):
        yield observer.found
    observer.check()


class _FromTorch(TorchFunctionMode):
    """SiLUs and attention that a layer takes from torch."""

    def __init__(self, recorder: _Observer):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.silu:
            self.recorder.gate(args[0])
        if function is F.scaled_dot_product_attention and self.recorder.attention:
            return self.recorder.attend(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class _Observer(Recorder):
    """A method of an operator's name sees its calls."""

    joined = False  # whether a scan is at work that is seen as a part of another operator

    def selective_scan_fn(
        self, call, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *args, **kwargs
    ):
        out = call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, *args, **kwargs)
        if not self.joined and (index := self.wanted(u.shape[1])) is not None:
            y = out[0] if isinstance(out, tuple) else out
            delta = step_size(self.cut(delta, 1), self.cut(delta_bias, 0, False), delta_softplus)
            self.add(index, u, delta, A, B, C, D, z, y, kwargs.get("initial_state"), kwargs.get("seq_idx"))
        return out

    def spatial_scan(self, call, u, steps, dt_proj, dt_bias, A, D, kernels, alpha):
        """u (b y x e), steps (b y x r+2) -> (b y x e): read out behind the fusion of the states."""
        self.joined = True
        try:
            out = call(u, steps, dt_proj, dt_bias, A, D, kernels, alpha)
        finally:
            self.joined = False
        if (index := self.wanted(u.shape[-1])) is not None:
            size = tuple(u.shape[1:3])
            dt, B, C = (t.flatten(1, 2).mT for t in steps.split([dt_proj.shape[1], 1, 1], dim=-1))  # (b r l), (b 1 l)
            dt_proj, dt_bias = self.cut(dt_proj, 0, False), self.cut(dt_bias, 0, False)
            delta = step_size(F.linear(self.cut(dt).mT, dt_proj.to(dt.dtype)).mT, dt_bias, True)
            fusion = None
            if kernels is not None:
                taps = tuple(self.cut(kernel, 0, False) for kernel in kernels)
                fusion = Fusion(taps, self.cut(alpha, batched=False), size)
            u, y = (t.flatten(1, 2).mT for t in (u, out))  # (b e l)
            self.add(index, u, delta, A, B, C, D, None, y, fusion=fusion)
        return out

    def mamba_chunk_scan_combined(
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
        cu_seqlens=None,
        dt_softplus=False,
        dt_limit=(0.0, float("inf")),
        *states,
        **more_states,
    ):
        options = (initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit, *states)
        out = call(x, dt, A, B, C, chunk_size, D, z, dt_bias, *options, **more_states)
        if (index := self.wanted(x.shape[2] * x.shape[3])) is not None:
            h, p = x.shape[2:]
            y = out[0] if isinstance(out, tuple) else out
            u, z, y = (None if t is None else t.permute(0, 2, 3, 1).flatten(1, 2) for t in (x, z, y))  # (b hp l)
            dt = step_size(dt.transpose(1, 2), dt_bias, dt_softplus).clamp(*dt_limit)  # (b h l)
            D = None if D is None else D.reshape(h, -1).expand(h, p).flatten()
            h0 = None if initial_states is None else initial_states.flatten(1, 2)
            A = A[:, None].expand(h, B.shape[-1]).repeat_interleave(p, 0)
            B, C = (M.permute(0, 2, 3, 1) for M in (B, C))  # (b g n l)
            self.add(index, u, self.cut(per_head(dt, p), 1), A, B, C, D, z, y, h0, seq_idx)
        return out

    def trapezoidal_scan(
        self, call, v, k, q, a, gamma, beta, D, mimo=None, initial_state=None, seq_idx=None, *args, **kwargs
    ):
        """v (b l h p), k and q (b l r h n), a, gamma, beta (b l h) -> y (b l r h p)"""
        out = call(v, k, q, a, gamma, beta, D, mimo, initial_state, seq_idx, *args, **kwargs)
        if (index := self.wanted(k.shape[2] * v.shape[2] * v.shape[3])) is not None:
            if initial_state is not None:
                raise ValueError(f"{self.name} of Mamba-3 went on from a carried state; tap a whole sequence")
            r, h, n = k.shape[2:]
            p = v.shape[-1]
            share = v.new_ones(1, h, p) if mimo is None else mimo.transpose(0, 1)  # (r h p)
            A = -torch.ones(r * h * p, n, device=v.device, dtype=a.dtype)
            if r == 1:
                B = k[:, :, 0].permute(0, 2, 3, 1)  # (b h n l)
            else:
                B = torch.einsum("blrhn,rhp->bhpnl", k, share).flatten(1, 2).repeat(1, r, 1, 1)
            C = q.permute(0, 2, 3, 4, 1).flatten(1, 2)  # (b rh n l)
            u = v.permute(0, 2, 3, 1).flatten(1, 2).repeat(1, r, 1)  # (b rhp l)
            D = (D[None, :, None] * share).flatten()
            y = out[0].permute(0, 2, 3, 4, 1).flatten(1, 3)
            after = beta[:, 1:] if seq_idx is None else beta[:, 1:] * (seq_idx[:, 1:] == seq_idx[:, :-1])[..., None]
            weights = (t.transpose(1, 2) for t in (-a, gamma + F.pad(after, (0, 0, 0, 1)), gamma))  # (b h l)
            delta, w, own = (self.cut(per_head(t, p).repeat(1, r, 1), 1) for t in weights)
            self.add(index, u, delta, A, B, C, D, None, y, None, seq_idx, weight=w, own=own, ranks=r)
        return out

    def dense_scan(self, call, A_dict, weights, inputs, p_norm=1.0, symbols=None, *args, **kwargs):
        out = call(A_dict, weights, inputs, p_norm, symbols, *args, **kwargs)
        if (index := self.wanted()) is not None:
            weights = weights if symbols is not None else weights[: self.rows]
            T, x = mix_transitions(A_dict, weights, p_norm), inputs
            if symbols is not None:
                T, x = T[symbols[: self.rows]], (x[symbols] if x.ndim == 2 else x)
            kept = (self.cut(t) for t in (T, x, out[0], kwargs.get("initial_state")))
            self.keep(DenseScan(self.name, index, *kept))
        return out

    def complex_scan(self, call, a, b, initial_state=None):
        """a, b (b l n) complex -> h (b l n); a rotation is a 2 x 2 block between real and imaginary part."""
        h = call(a, b, initial_state)
        if (index := self.wanted()) is not None:
            start = torch.zeros_like(b[:, 0]) if initial_state is None else initial_state
            a, b, h, start = (self.cut(t) for t in (a, b, h, start))
            re, im = torch.diag_embed(a.real), torch.diag_embed(a.imag)  # (b l n n)
            T = torch.cat([torch.cat([re, -im], -1), torch.cat([im, re], -1)], -2)
            self.keep(DenseScan(self.name, index, T, *(torch.cat([t.real, t.imag], -1) for t in (b, h, start))))
        return h

    def attend(self, call, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        y = call(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if q.ndim == 4 and (index := self.wanted(q.shape[1] * v.shape[-1])) is not None:
            h, l, p = q.shape[1:]
            k, v = (t.repeat_interleave(h // t.shape[1], 1) for t in (k, v))
            heads = torch.arange(h) if self.channels is None else (self.channels // v.shape[-1]).unique()
            mask = attn_mask
            if mask is not None and mask.ndim == 4:
                mask = mask if mask.shape[1] == 1 else mask[:, heads.to(mask.device)]
                mask = self.cut(mask, batched=len(mask) > 1)
            q, k, v, kept = (self.cut(t[:, heads.to(t.device)]) for t in (q, k, v, y))
            scale = p**-0.5 if scale is None else scale
            found = Attention(self.name, index, q, k, v, kept, mask, is_causal, scale, heads, h, l)
            self.keep(found if self.positions is None else found.at_positions(self.positions))
        return y

    # what stands around a scan

    def causal_conv1d_fn(self, call, x, weight, bias=None, *args, **kwargs):
        if self.asked():
            self.notes["convolution"] = Convolution(x, weight, bias)
        return call(x, weight, bias, *args, **kwargs)

    def gated_layer_norm(self, call, x, z, *args, **kwargs):
        self.gate(z)
        return call(x, z, *args, **kwargs)

    # the order of its tokens

    def cross_scan(self, call, x, scans="cross"):
        self.notes["order"] = TokenOrder(scan_indices(*x.shape[-2:], scans, x.device), 0, *x.shape[:2])
        return call(x, scans)

    def bidirectional_scan(self, call, x):
        steps = torch.arange(x.shape[-1], device=x.device)
        self.notes["order"] = TokenOrder(torch.stack([steps, steps.flip(0)]), 0, *x.shape[:2])
        return call(x)

    def permute_tokens(self, call, x, order, inverse=False):
        self.notes["order"] = None if inverse else permuted(self.notes.get("order"), order)
        return call(x, order, inverse)

    def prepend_mean(self, call, x):
        self.notes["order"] = with_mean(self.notes.get("order"), x.shape[1], x.device)
        return call(x)

    def mix_tokens(self, call, x, weights):
        self.notes["mixture"] = weights
        return call(x, weights)


def step_size(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """What the operators make of delta: the bias added and the softplus taken, in fp32 or better. (b e l)"""
    delta = delta if delta.dtype == torch.float64 else delta.float()
    delta = delta if bias is None else delta + bias[:, None]
    return F.softplus(delta) if softplus else delta


def per_head(t: Tensor, p: int) -> Tensor:
    """(b h l) -> (b hp l)"""
    return t[:, :, None].expand(-1, -1, p, -1).flatten(1, 2)
