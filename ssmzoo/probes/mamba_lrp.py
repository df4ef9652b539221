"""MambaLRP: relevance of every input for one logit, conserved through SiLU, scan, gate and norm.

Each of these is replaced by a layer of the same value that is linear in its main input, the rest [.] being a constant
of the backward pass; then relevance = input x gradient and its sum is the logit (when no bias absorbs any):

    act    y = x' [SiLU(x) / x'],  x' = x + 1e-6 sign(x)               every SiLU and GELU, on the gate as well
    scan   h_t = [exp(dt_t A)] h_{t-1} + [dt_t B_t] u_t,  y_t = [C_t] h_t + D u_t
    gate   v = y SiLU(z);  v / 2 + [v] / 2;  the probabilities of a router of experts are constants
    norm   x [1 / rms(x)] w,  (x - mean) [1 / std] w + b
    conv   z = W x + b by the gamma rule (a choice for vision): positive and negative parts weighted unequally
    softplus   as act, for time steps that are not constants

No model is edited: operators are intercepted, torch's activations and norms likewise, within `rules(model)`. A product
with the result of a SiLU counts as a gate. Gradients of parameters under the rules mean nothing: never train on them.

b batch, l length, d width, e channels, n state size.
Source: Rezaei Jafari et al. 2024 (arXiv 2406.07592); FarnoushRJ/MambaLRP (MIT), lrp/core.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmzoo.layers.feedforward.router import Router
from ssmzoo.layers.mixers import mamba3
from ssmzoo.models.spatial_mamba import StructureAwareSSM
from ssmzoo.probes.interception import exchanged, operators

ALL = ("act", "scan", "gate", "norm")
KNOWN = (*ALL, "conv", "softplus")
STABILISER = 1e-6


def linearised(x: Tensor, y: Tensor) -> Tensor:
    """y, as x' times a constant slope: the rule of pointwise functions y = f(x), f(0) = 0."""
    away = x + (x.sign() + (x == 0)) * STABILISER
    return away * (y / away).detach()


def halved(v: Tensor) -> Tensor:
    """v with half of its gradient: each factor of a product would receive all of the relevance."""
    return v / 2 + v.detach() / 2


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
    return y if weight is None else y * weight


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dims: tuple[int, ...]) -> Tensor:
    x = x - x.mean(dims, keepdim=True)
    y = x * (x.square().mean(dims, keepdim=True) + eps).rsqrt().detach()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def gamma_rule(
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: float,
) -> Tensor:
    """z = linear(x, W, b), with positive and negative contributions weighted unequally in the backward pass."""
    z = linear(x, weight, bias)
    positive, negative = weight.clamp(min=0), weight.clamp(max=0)
    up, down = weight + gamma * positive, weight + gamma * negative
    b_up = None if bias is None else bias + gamma * bias.clamp(min=0)
    b_down = None if bias is None else bias + gamma * bias.clamp(max=0)
    x_positive, x_negative = x.clamp(min=0), x.clamp(max=0)
    for_positive = linear(x_positive, up, b_up) + linear(x_negative, down, None)
    for_negative = linear(x_positive, down, b_down) + linear(x_negative, up, None)
    mixed = for_positive * (z > STABILISER) + for_negative * (z < STABILISER)
    return mixed * torch.where(mixed == 0, torch.zeros_like(z), z / torch.where(mixed == 0, 1.0, mixed)).detach()


class _Torch(TorchFunctionMode):
    """Rules for what models call from torch itself."""

    def __init__(self, on: Collection[str], gamma: float, reads: Collection[int] = ()):
        super().__init__()
        self.on, self.gamma, self.reads, self.gates = on, gamma, reads, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.silu, F.gelu) and "act" in self.on:
            y = linearised(args[0], function(*args, **(kwargs | ({"inplace": False} if function is F.silu else {}))))
            self.gates = [*self.gates[-8:], y]
            return y
        if function in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__) and "gate" in self.on:
            v = function(*args, **kwargs)
            return halved(v) if any(a is g for a in args for g in self.gates) else v
        if function is F.linear and "scan" in self.on and id(args[1]) in self.reads:
            return function(*args, **kwargs).detach()
        if function is F.rms_norm and "norm" in self.on:
            return self.rms(*args, **kwargs)
        if function is F.layer_norm and "norm" in self.on:
            return self.layer(*args, **kwargs)
        if function in (F.conv2d, F.conv1d) and "conv" in self.on:
            return self.conv(function, *args, **kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def rms(x, normalized_shape, weight=None, eps=None):
        return rms_norm(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)

    @staticmethod
    def layer(x, normalized_shape, weight=None, bias=None, eps=1e-5):
        return layer_norm(x, weight, bias, eps, tuple(range(-len(normalized_shape), 0)))

    def conv(self, function, x, weight, bias=None, *args, **kwargs):
        return gamma_rule(lambda x, w, b: function(x, w, b, *args, **kwargs), x, weight, bias, self.gamma)


@contextlib.contextmanager
def rules(
    model: nn.Module, on: Collection[str] = ALL, constants: Collection[str] = ("A", "B", "C"), gamma: float = 0.25
) -> Iterator[None]:
    """Within the block forward passes of `model` have the same values and LRP's gradients.

    on         which rules; without any, plain gradients
    constants  what the scan rule keeps constant: "A", "B" (both discretised), "C"
    gamma      of the rule for convolutions, if "conv" is on
    """
    unknown = set(on) - set(KNOWN)
    if unknown or set(constants) - {"A", "B", "C"}:
        raise ValueError(
            f"on = {sorted(on)}, constants = {sorted(constants)}; rules are {', '.join(KNOWN)}, constants A, B, C"
        )

    def scan(
        call,
        u,
        delta,
        A,
        B,
        C,
        D=None,
        z=None,
        delta_bias=None,
        delta_softplus=False,
        return_last_state=False,
        *,
        initial_state=None,
        seq_idx=None,
    ):
        plain = {"return_last_state": return_last_state, "initial_state": initial_state, "seq_idx": seq_idx}
        if "scan" in on:
            delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)[:, None]
            if delta_softplus:
                dt = F.softplus(delta)
                delta = linearised(delta, dt) if "softplus" in on else dt
            out = constant_scan(call, u, delta, A, B, C, D, constants, plain)
        else:
            out = call(u, delta, A, B, C, D, None, delta_bias, delta_softplus, **plain)
        y, *state = out if isinstance(out, tuple) else (out,)
        y = y if z is None else gated(y, z)
        return (y, *state) if state else y

    def scalar(call, x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, *args, **kwargs):
        if "scan" in on:
            need_all_constants("Mamba-2")
            dt, A, B, C = (t.detach() for t in (dt, A, B, C))
            dt_bias = None if dt_bias is None else dt_bias.detach()
        out = call(x, dt, A, B, C, chunk_size, D, None, dt_bias, *args, **kwargs)
        y, *state = out if isinstance(out, tuple) else (out,)
        y = y if z is None else gated(y, z)
        return (y, *state) if state else y

    def gated(y: Tensor, z: Tensor) -> Tensor:
        v = torch.mul(y, linearised(z, F.silu(z)) if "act" in on else F.silu(z))
        return halved(v) if "gate" in on else v

    def convolve(
        call,
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        def linear(x, w, b):
            return call(x, w, b, seq_idx, initial_states)

        y = gamma_rule(linear, x, weight, bias, gamma) if "conv" in on else linear(x, weight, bias)
        if activation is not None:
            y = linearised(y, F.silu(y)) if "act" in on else F.silu(y)
        if not return_final_states:
            return y
        return y, call(x, weight, bias, seq_idx, initial_states, True, final_states_out)[1]

    def dense(call, A_dict, weights, *args, **kwargs):
        if "scan" in on:
            A_dict, weights = A_dict.detach(), weights.detach()
        return call(A_dict, weights, *args, **kwargs)

    def rotating(call, mixer, v, k, q, a, now, later, state, seq_idx):
        if "scan" in on:
            need_all_constants("Mamba-3")
            k, q, a, now, later = (t.detach() for t in (k, q, a, now, later))
        return call(mixer, v, k, q, a, now, later, state, seq_idx)

    def need_all_constants(who: str) -> None:
        if set(constants) != {"A", "B", "C"}:
            raise ValueError(f"scans with one decay per head ({who}) take the rule with all of A, B, C constant")

    hidden = _Quiet()
    replaced = {
        "selective_scan_fn": scan,
        "mamba_chunk_scan_combined": scalar,
        "causal_conv1d_fn": convolve,
        "dense_scan": dense,
    }

    def route(call, router, x):
        logits = call(router, x)
        return logits.detach() if "gate" in on else logits

    with (
        operators(model, **{name: hidden(f) for name, f in replaced.items()}),
        exchanged(Router, "logits", route),
        exchanged(mamba3.Mamba3, "_scan", hidden(rotating)),
        _Torch(on, gamma, outside_reads(model)),
    ):
        yield


def outside_reads(model: nn.Module) -> set[int]:
    """Ids of projections that make delta, B and C of scans which are read outside of the operator (Spatial-Mamba)."""
    return {id(m.x_proj_weight) for m in model.modules() if isinstance(m, StructureAwareSSM)}


class _Quiet:
    """Rules written out inside an operator must not be met a second time by the rules for torch's functions."""

    def __call__(self, function):
        def run(*args, **kwargs):
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs)

        return run


def constant_scan(call, u, delta, A, B, C, D, constants: Collection[str], options: dict):
    """The scan whose discretised A, B or C are constants; delta (b e l) positive."""
    if set(constants) == {"A", "B", "C"}:
        return call(u, delta.detach(), A.detach(), B.detach(), C.detach(), D, **options)
    if B.ndim == 2 or options["seq_idx"] is not None or options["initial_state"] is not None:
        raise ValueError("constants other than A, B and C together are for whole sequences with selective B and C")
    b, e, l = u.shape
    B, C = (M.unsqueeze(1) if M.ndim == 3 else M for M in (B, C))
    B, C = (M.repeat_interleave(e // M.shape[1], 1).transpose(2, 3) for M in (B, C))  # (b e l n)
    decay, write = torch.exp(delta[..., None] * A[:, None]), delta[..., None] * B
    decay, write, C = (t.detach() if name in constants else t for name, t in (("A", decay), ("B", write), ("C", C)))
    h, ys = torch.zeros_like(write[:, :, 0]), []
    for t in range(l):
        h = decay[:, :, t] * h + write[:, :, t] * u[:, :, t, None]
        ys.append((h * C[:, :, t]).sum(-1))
    y = torch.stack(ys, dim=2)
    y = y if D is None else y + D[:, None] * u
    return (y, h) if options["return_last_state"] else y


class Relevance(NamedTuple):
    """relevance (b l) of every position | gradient (b l d) it was made with | logit (b) explained | logits (b
    classes) | absorbed: what the biases of the model kept for themselves, summed over the batch."""

    relevance: Tensor
    gradient: Tensor
    logit: Tensor
    logits: Tensor
    absorbed: Tensor

    def conservation_error(self) -> float:
        """|relevances + what biases absorbed - logits| / |logits|, sums over the batch."""
        total = self.relevance.sum() + self.absorbed
        return float((total - self.logit.sum()).abs() / self.logit.abs().sum().clamp(min=1e-12))


def relevance(
    function: Callable[[Tensor], Tensor],
    model: nn.Module,
    embeddings: Tensor,
    target: Tensor,
    on: Collection[str] = ALL,
    **options,
) -> Relevance:
    """Relevance of every embedding for one logit.

    function    embeddings (b l d) -> logits (b classes) at the position that is read, using `model`
    target      (b) class or token to explain
    on          the rules; () gives plain gradient x input
    options     of `rules`

    Biases and learned initial states take part in a logit and keep relevance; time steps' biases take none (they are
    in constants of the scan).
    """
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"relevance needs float32 or float64, got {embeddings.dtype}, in which the stabiliser 1e-6 vanishes"
        )
    leaf = embeddings.detach().requires_grad_()
    biases = [p for name, p in model.named_parameters() if name.endswith(("bias", "init_states")) and p.requires_grad]
    with torch.enable_grad(), torch.autocast(leaf.device.type, enabled=False), rules(model, on, **options):
        logits = function(leaf)
        if logits.ndim != 2:
            raise ValueError(f"function must return logits (batch, classes), got {tuple(logits.shape)}")
        logit = logits.gather(1, target[:, None])[:, 0]
        gradient, *shares = torch.autograd.grad(logit.sum(), [leaf, *biases], allow_unused=True)
    gradient = torch.zeros_like(leaf) if gradient is None else gradient
    absorbed = sum(((p * g).sum().detach() for p, g in zip(biases, shares) if g is not None), gradient.new_zeros(()))
    return Relevance((leaf * gradient).sum(-1).detach(), gradient, logit.detach(), logits.detach(), absorbed)


def integrated_gradients(
    function, embeddings: Tensor, target: Tensor, steps: int = 32, baseline: Tensor | None = None
) -> Tensor:
    """Attribution (b l) along the straight line from `baseline` (zeros) to the embeddings.

    Midpoint rule in s with the place s^3 on the line: norms turn over close to zero, where even steps would miss it.
    """
    baseline = torch.zeros_like(embeddings) if baseline is None else baseline
    total = torch.zeros_like(embeddings)
    for i in range(steps):
        s = (i + 0.5) / steps
        leaf = (baseline + s**3 * (embeddings - baseline)).detach().requires_grad_()
        with torch.enable_grad():
            logit = function(leaf).gather(1, target[:, None]).sum()
            total += 3 * s**2 / steps * torch.autograd.grad(logit, leaf)[0]
    return ((embeddings - baseline) * total).sum(-1).detach()
