"""The dynamical-systems view: attention, linear attention, SSMs and gated RNNs as one linear time-varying recurrence.

    h_i = Lam_i h_{i-1} + B_i u_i,   y_i = C_i h_i + D u_i;      y = Phi u,  Phi[i, j] = C_i Lam_i ... Lam_{j+1} B_j

All of them are diagonal, so each channel c keeps n numbers: lam, write, read (b l c n) and the value v (b l c) that is
written. Nothing of size (n d)^2 is ever formed.

    model                  lam                     write            read            v
    linear attention       1                       psi(k)           phi(q) / eta    W_V x    eta = phi(q_i)^T sum psi(k)
    normalised attention   1                       k                q / exp(n)      W_V x     n = w^T x + b
    S6, SSD                exp(delta A)            delta B          C               u         and D u
    quasi-LSTM             sigma(f)                sigma(i)         1               x         output gate o outside

A normaliser is a decay: h / eta obeys lam_i = eta_{i-1} / eta_i, so that linear attention is SSD with exp(delta a) =
eta_{i-1} / eta_i and delta B = psi(k) / eta, where eta does not depend on the query (as in normalised attention).

b batch, l length, c channels, n state size (numbers per channel), d width.
Source: Sieber et al. 2024 (arXiv 2405.15731).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.probes.dsf_layers import QLSTM, CausalMixing, LinearAttention, NormalizedAttention, SoftmaxAttention
from ssmzoo.probes.tap import Scan


@dataclass
class Recurrence:
    """lam, write, read (b l c n), value (b l c), skip (c) or (b l c) or None."""

    lam: Tensor
    write: Tensor
    read: Tensor
    value: Tensor
    skip: Tensor | None = None

    @property
    def state_size(self) -> int:
        """Numbers that are carried from token to token."""
        return self.lam.shape[2] * self.lam.shape[3]

    def states(self) -> Tensor:
        """h (b l c n)"""
        h, out = torch.zeros_like(self.write[:, 0]), []
        for i in range(self.write.shape[1]):
            h = self.lam[:, i] * h + self.write[:, i] * self.value[:, i, :, None]
            out.append(h)
        return torch.stack(out, dim=1)

    def output(self) -> Tensor:
        """y (b l c)"""
        y = (self.states() * self.read).sum(-1)
        return y if self.skip is None else y + self.skip * self.value

    def phi(self) -> Tensor:
        """The mixing matrix of every channel, (b c l l), D on its diagonal."""
        b, l, c, n = self.write.shape
        rows = []
        carried = self.write.new_zeros(b, c, n, l)  # Lam_i ... Lam_{j+1} B_j for every j
        for i in range(l):
            carried = carried * self.lam[:, i, :, :, None]
            carried = carried.index_copy(-1, torch.tensor([i], device=carried.device), self.write[:, i, ..., None])
            rows.append((carried * self.read[:, i, :, :, None]).sum(2))
        phi = torch.stack(rows, dim=2)
        if self.skip is None:
            return phi
        skip = self.skip.expand(b, l, c) if self.skip.ndim == 1 else self.skip
        return phi + torch.diag_embed(skip.transpose(1, 2))

    def horizon(self) -> Tensor:
        """1 / (1 - lam), tokens that a state component remembers, (b l c n); infinite at lam = 1."""
        return 1 / (1 - self.lam)

    def effective_rank(self) -> Tensor:
        """exp of the entropy of Phi's normalised singular values, (b c): 1 for one pattern, up to l."""
        s = torch.linalg.svdvals(self.phi().double())
        p = s / s.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.exp(-(p * p.clamp(min=1e-30).log()).sum(-1))

    def by_distance(self) -> Tensor:
        """Mean |Phi[i, i - t]| over i, channels and the batch, for every distance t: (l)"""
        phi = self.phi().abs()
        return torch.stack([phi.diagonal(-t, dim1=-2, dim2=-1).mean() for t in range(phi.shape[-1])])


def of_scan(scan: Scan) -> Recurrence:
    """S6, SSD and Mamba-3 from a tapped scan; value is u, by steps of the scan. Where states are fused on a map before
    they are read (Spatial-Mamba), the recurrence is that of the states themselves: C = 1, no skip."""
    scan.whole("the recurrence")
    lam, write, read = (t.transpose(1, 2) for t in (scan.decay(), scan.write(), scan.read()))
    skip = scan.D
    if scan.fusion is not None:
        read, skip = torch.ones_like(write), None
    if scan.own is not None:  # Mamba-3: a token's own step has another weight, which stands beside D
        own = (read * (scan.own[..., None] * scan.per_channel(scan.B)).transpose(1, 2) - read * write).sum(-1)
        skip = own if skip is None else own + skip
    return Recurrence(lam, write, read, scan.u.transpose(1, 2), skip)


def of_attention(layer: CausalMixing, x: Tensor) -> Recurrence:
    """Linear and normalised attention; the output is what stands before W_o. x (b l d)"""
    if isinstance(layer, SoftmaxAttention):
        raise ValueError(
            "softmax attention needs a state of infinite size (all monomials of the keys); its matrix is "
            "layer.mixing_matrix(x)"
        )
    q, k = layer.queries_and_keys(x)  # (b h l m/h)
    if isinstance(layer, LinearAttention):
        q, k = F.elu(q) + 1, F.elu(k) + 1
        q = q / (q * k.cumsum(2)).sum(-1, keepdim=True)
    elif isinstance(layer, NormalizedAttention):
        q = q * torch.exp(-layer.Wn(x)).transpose(1, 2)[..., None]
    else:
        raise ValueError(f"{type(layer).__name__} has no entry in the dictionary of the framework")
    p = layer.Wv.out_features // layer.num_heads
    write, read = (t.transpose(1, 2).repeat_interleave(p, dim=2) for t in (k, q))  # (b l hp n)
    return Recurrence(torch.ones_like(write), write, read, layer.Wv(x))


def of_qlstm(layer: QLSTM, u: Tensor) -> Recurrence:
    """The recurrence of a quasi-LSTM; its output stands before the output gate."""
    _, x = layer.input(u).chunk(2, dim=-1)
    x = F.conv1d(
        F.pad(x.transpose(1, 2), (layer.kernel_size - 1, 0)), layer.conv.weight, layer.conv.bias, groups=layer.d_inner
    ).transpose(1, 2)
    f, i, _ = layer.gates(x).chunk(3, dim=-1)
    return Recurrence(layer.forget(f)[..., None], torch.sigmoid(i)[..., None], torch.ones_like(x)[..., None], x)


def softmax_features(k: Tensor, degree: int) -> Tensor:
    """Monomials of k (... m) up to `degree`, scaled so that their product with those of q is exp(q k / sqrt m) cut off
    there: (... sum_p m^p). Grows quickly: the reason why softmax attention has no finite state."""
    m = k.shape[-1]
    k = k / m**0.25
    power, parts = torch.ones_like(k[..., :1]), []
    for p in range(degree + 1):
        parts.append(power)
        power = (power[..., :, None] * k[..., None, :]).flatten(-2) / (p + 1) ** 0.5
    return torch.cat(parts, dim=-1)


def reversed_sigmoid_error(f: Tensor, a: Tensor) -> float:
    """Largest difference of sigma(-f)^a and exp(-a softplus(f)): S6's decay is a power of an LSTM's forget gate."""
    return float((torch.sigmoid(-f) ** a - torch.exp(-a * F.softplus(f))).abs().max())


def normaliser_as_decay(r: Recurrence, eta: Tensor) -> Recurrence:
    """The same map with the normaliser eta (b l c) inside the state: lam eta_{i-1} / eta_i, write / eta_i, read eta_i.

    With read = q / eta before, the read-out is then free of the normaliser: SSD with matched gates.
    """
    before = torch.cat([eta[:, :1], eta[:, :-1]], dim=1)
    eta, ratio = eta[..., None], (before / eta)[..., None]
    return replace(r, lam=r.lam * ratio, write=r.write / eta, read=r.read * eta)


def ssd_gates(eta: Tensor, a: float = -1.0) -> Tensor:
    """The time steps (b l c) with exp(delta a) = eta_{i-1} / eta_i: what SSD needs to be attention with normaliser eta;
    negative where the normaliser falls, which softplus cannot give."""
    before = torch.cat([eta[:, :1], eta[:, :-1]], dim=1)
    return (before / eta).log() / a
