"""The rules of MambaLRP: relevance conserved through SiLU, scan, gate and norm.

Each of these is replaced by a layer of the same value that is linear in its main input, the rest [.] being a constant
of the backward pass; then relevance = input x gradient and its sum is the logit (when no bias absorbs any):

    act    y = x' [SiLU(x) / x'],  x' = x + 1e-6 sign(x)               every SiLU and GELU, on the gate as well
    scan   h_t = [exp(dt_t A)] h_{t-1} + [dt_t B_t] u_t,  y_t = [C_t] h_t + D u_t
           attention likewise: y = [softmax(q k^T)] v
    attention   instead: a quarter of the gradient for q and k each, half for v, softmax as it is (AttnLRP, as in LXT)
    gate   v = y SiLU(z);  v / 2 + [v] / 2;  the probabilities of a router of experts are constants
    norm   x [1 / rms(x)] w,  (x - mean) [1 / std] w + b
    conv   z = W x + b by the gamma rule (a choice for vision): positive and negative parts weighted unequally
    softplus   as act, for time steps that are not constants

No model is edited: operators are observed, torch's activations and norms likewise, within `rules()`. A product
with the result of a SiLU counts as a gate. Gradients of parameters under the rules mean nothing: never train on them.

b batch, l length, d width, e channels, n state size.
Source: Rezaei Jafari et al. 2024 (arXiv 2406.07592); FarnoushRJ/MambaLRP (MIT), lrp/core.py; attention's weights as
constants: Ali et al. 2022 (arXiv 2202.07304); shares for q, k and v: Achtibat et al. 2024 (AttnLRP, arXiv 2402.05602).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ssmzoo.ops import OPERATORS, observe

ALL = ("act", "scan", "gate", "norm")
KNOWN = (*ALL, "conv", "softplus", "attention")
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
    """Rules for what models call from torch itself; not applied within `with mode.switched(False):`."""

    def __init__(self, on: Collection[str], gamma: float):
        super().__init__()
        self.on, self.gamma, self.gates, self.active = on, gamma, [], True

    @contextlib.contextmanager
    def switched(self, on: bool) -> Iterator[None]:
        before, self.active = self.active, on
        try:
            yield
        finally:
            self.active = before

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.active:
            return function(*args, **kwargs)
        if function in (F.silu, F.gelu) and "act" in self.on:
            y = linearised(args[0], function(*args, **(kwargs | ({"inplace": False} if function is F.silu else {}))))
            self.gates = [*self.gates[-8:], y]
            return y
        if function in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__) and "gate" in self.on:
            v = function(*args, **kwargs)
            return halved(v) if any(a is g for a in args for g in self.gates) else v
        if function is F.scaled_dot_product_attention and "attention" in self.on:
            q, k = (halved(halved(t)) for t in args[:2])
            return function(q, k, halved(args[2]), *args[3:], **kwargs)
        if function is F.scaled_dot_product_attention and "scan" in self.on:
            return function(args[0].detach(), args[1].detach(), *args[2:], **kwargs)
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


class _Operators:
    """Rules for the zoo's operators: a method of an operator's name serves its calls, without those for torch's
    functions inside of it; other operators run on torch, whose functions have theirs."""

    def __init__(self, on: Collection[str], constants: Collection[str], gamma: float, torch_rules: _Torch):
        self.on, self.constants, self.gamma, self.torch_rules = on, constants, gamma, torch_rules

    def observers(self) -> dict[str, Callable]:
        return {name: self.rule(name, operator) for name, operator in OPERATORS.items()}

    def rule(self, name: str, operator: Callable) -> Callable:
        method, on_torch = getattr(self, name, None), operator.backends.get("torch")
        if method is None:
            return lambda call, *args, **kwargs: (
                on_torch.serve(operator.Arguments(*args, **kwargs)) if on_torch else call(*args, **kwargs)
            )

        def serve(call, *args, **kwargs):
            with self.torch_rules.switched(False):
                return method(call, *args, **kwargs)

        return serve

    def selective_scan_fn(
        self,
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
        if "scan" in self.on:
            delta = delta if delta_bias is None else delta + delta_bias.to(delta.dtype)[:, None]
            if delta_softplus:
                dt = F.softplus(delta)
                delta = linearised(delta, dt) if "softplus" in self.on else dt
            out = constant_scan(call, u, delta, A, B, C, D, self.constants, plain)
        else:
            out = call(u, delta, A, B, C, D, None, delta_bias, delta_softplus, **plain)
        return self.gated(out, z)

    def mamba_chunk_scan_combined(
        self, call, x, dt, A, B, C, chunk_size=256, D=None, z=None, dt_bias=None, *args, **kwargs
    ):
        if "scan" in self.on:
            self.need_all_constants("Mamba-2")
            dt, A, B, C, dt_bias = (None if t is None else t.detach() for t in (dt, A, B, C, dt_bias))
        return self.gated(call(x, dt, A, B, C, chunk_size, D, None, dt_bias, *args, **kwargs), z)

    def trapezoidal_scan(self, call, v, k, q, a, gamma, beta, *args, **kwargs):
        if "scan" in self.on:
            self.need_all_constants("Mamba-3")
            k, q, a, gamma, beta = (t.detach() for t in (k, q, a, gamma, beta))
        return call(v, k, q, a, gamma, beta, *args, **kwargs)

    def spatial_scan(self, call, u, steps, *args, **kwargs):
        with self.torch_rules.switched(True):  # it runs in parts, and the fusion of states is a convolution
            return call(u, steps.detach() if "scan" in self.on else steps, *args, **kwargs)

    def dense_scan(self, call, A_dict, weights, *args, **kwargs):
        if "scan" in self.on:
            A_dict, weights = A_dict.detach(), weights.detach()
        return call(A_dict, weights, *args, **kwargs)

    def router_logits(self, call, x, gate):
        logits = call(x, gate)
        return logits.detach() if "gate" in self.on else logits

    def causal_conv1d_fn(
        self,
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

        y = gamma_rule(linear, x, weight, bias, self.gamma) if "conv" in self.on else linear(x, weight, bias)
        if activation is not None:
            y = linearised(y, F.silu(y)) if "act" in self.on else F.silu(y)
        if not return_final_states:
            return y
        return y, call(x, weight, bias, seq_idx, initial_states, True, final_states_out)[1]

    def gated(self, out, z: Tensor | None):
        """The result of a scan, alone or with the last state, behind its gate."""
        y, *state = out if isinstance(out, tuple) else (out,)
        if z is not None:
            y = y * (linearised(z, F.silu(z)) if "act" in self.on else F.silu(z))
            y = halved(y) if "gate" in self.on else y
        return (y, *state) if state else y

    def need_all_constants(self, who: str) -> None:
        if set(self.constants) != {"A", "B", "C"}:
            raise ValueError(f"scans with one decay per head ({who}) take the rule with all of A, B, C constant")


@contextlib.contextmanager
def rules(
    on: Collection[str] = ALL, constants: Collection[str] = ("A", "B", "C"), gamma: float = 0.25
) -> Iterator[None]:
    """Within the block forward passes have the same values and LRP's gradients.

    on         which rules; without any, plain gradients
    constants  what the scan rule keeps constant: "A", "B" (both discretised), "C"
    gamma      of the rule for convolutions, if "conv" is on
    """
    unknown = set(on) - set(KNOWN)
    if unknown or set(constants) - {"A", "B", "C"}:
        raise ValueError(
            f"on = {sorted(on)}, constants = {sorted(constants)}; rules are {', '.join(KNOWN)}, constants A, B, C"
        )
    torch_rules = _Torch(on, gamma)
    with observe(**_Operators(on, constants, gamma, torch_rules).observers()), torch_rules:
        yield


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
