"""Functions of mamba-ssm and causal-conv1d that join several operators: same names, arguments and results.

Upstream fuses them for a GPU's memory; here they are wiring, and every part is served by the fastest backend there is.

Letters: b batch, l length, e inner width, d model width, n state size, r rank of the time step, k taps, h heads,
p width of a head (e = h p), g groups sharing B and C.
Source: state-spaces/mamba ops/selective_scan_interface.py and ops/triton/ssd_combined.py; Dao-AILab/causal-conv1d
causal_conv1d_varlen.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn
from ssmzoo.ops.checks import compute_dtype, expect
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.ssd import mamba_chunk_scan_combined
from ssmzoo.ops.ssd.varlen import expect_cu_seqlens


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba mixer between its input projection and its output.

        x = SiLU(conv(x));  [dt, B, C] = x_proj x;  y = scan(x, delta_proj dt, A, B, C, D) SiLU(z);  out = out_proj y

    xz                 (b 2e l)  x above z
    conv1d_weight      (e 1 k), conv1d_bias (e)
    x_proj_weight      (r+2n e), without the rows of a B or C that is given; delta_proj_weight (e r)
    out_proj_weight    (d e), out_proj_bias (d)
    A, B, C, D, delta_bias, delta_softplus  as in `selective_scan_fn`; B and C come from x_proj when None. A may be
                       complex: x_proj then has 2n rows for each, real and imaginary parts interleaved
    B_proj_bias, C_proj_bias  (n) added to projected B, C
    b_rms_weight, c_rms_weight (n), dt_rms_weight (e)  RMS norms of B, C and of the projected time step
    checkpoint_lvl     0 or 1: whether upstream's backward recomputes the convolution and the time step, which no
                       backend does here; results are the same
    returns            (b l d)

    Raises ValueError naming the argument.
    """
    if checkpoint_lvl not in (0, 1):
        raise ValueError(f"checkpoint_lvl = {checkpoint_lvl}, expected 0 or 1")
    sizes: dict[str, int] = {}
    expect("conv1d_weight", conv1d_weight, ("e", "1", "k"), sizes | {"1": 1})
    e, r, n = len(conv1d_weight), delta_proj_weight.shape[-1], A.shape[-1] * (2 if A.is_complex() else 1)
    rows = r + (n if B is None else 0) + (n if C is None else 0)
    expect("xz", xz, ("b", "2e", "l"), {"2e": 2 * e})
    expect("x_proj_weight", x_proj_weight, ("r+2n", "e"), {"r+2n": rows, "e": e})
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x, conv1d_weight[:, 0], conv1d_bias, activation="silu")
    dt, *rest = F.linear(x.mT, x_proj_weight).split([r, *[n] * ((B is None) + (C is None))], dim=-1)  # (b l ...)
    B = _coefficient(rest.pop(0), B_proj_bias, A) if B is None else B
    C = _coefficient(rest.pop(0), C_proj_bias, A) if C is None else C
    delta = F.linear(dt, delta_proj_weight)  # (b l e)
    if dt_rms_weight is not None:
        delta = rms_norm(delta, dt_rms_weight, b_c_dt_rms_eps)
    B, C = (
        M if weight is None else rms_norm(M.mT, weight, b_c_dt_rms_eps).mT
        for M, weight in ((B, b_rms_weight), (C, c_rms_weight))
    )
    y = selective_scan_fn(x, delta.mT, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def _coefficient(M: Tensor, bias: Tensor | None, A: Tensor) -> Tensor:
    """Projected B or C (b l n) -> (b n l), or (b n 2l) with real and imaginary parts interleaved for complex A."""
    M = M if bias is None else M + bias.to(M.dtype)
    return M.unflatten(-1, (-1, 2)).transpose(1, 2).flatten(2) if A.is_complex() else M.mT


def mamba_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`mamba_chunk_scan_combined` without states and boundaries: (b l h p)."""
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 mixer behind its input projection.

        [mlp, z, xBC, dt] = zxbcdt;  [x, B, C] = act(conv(xBC));  y = scan(x, softplus(dt + dt_bias), A, B, C, D)
        out = outproj [swiglu(mlp), gated norm of y, or y SiLU(z)]

    zxbcdt           (b l 2m+2e+2gn+h)  m is the width of an MLP beside the scan, usually 0
    conv1d_weight    (e+2gn k), conv1d_bias (e+2gn), activation None, "silu" or "swish"
    dt_bias, A       (h); D (h p), or (h) with headdim = p
    initial_states   (b h p n), seq_idx (b l), dt_limit: as in `mamba_chunk_scan_combined`; negative seq_idx as in
                     `causal_conv1d_fn`
    rmsnorm_weight   (e) RMS norm over each of the g groups: of y, then times SiLU(z), or with norm_before_gate=False of
                     y SiLU(z); without it y SiLU(z)
    outproj_weight   (d m+e), outproj_bias (d)
    returns          (b l m+e) or (b l d); with return_final_states also the last state (b h p n) in fp32

    Raises ValueError naming the argument.
    """
    if D.ndim == 1 and headdim is None:
        raise ValueError("headdim is None, expected the width of a head, since D has one number per head")
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias was given without outproj_weight")
    expect("zxbcdt", zxbcdt, ("b", "l", "2m+2e+2gn+h"), {})
    h, p = len(D), D.shape[1] if D.ndim == 2 else headdim
    e, channels = h * p, len(conv1d_weight)
    n, mlp = (channels - e) // ngroups // 2, zxbcdt.shape[-1] - e - channels - h
    if n < 1 or channels != e + 2 * ngroups * n or mlp < 0 or mlp % 2:
        raise ValueError(
            f"zxbcdt has {zxbcdt.shape[-1]} features and conv1d_weight {channels} channels, expected "
            f"2m+2e+2gn+h and e+2gn with e={e}, g={ngroups}, h={h}"
        )
    beside, z, xBC, dt = zxbcdt.split([mlp, e, channels, h], dim=-1)
    xBC = causal_conv1d_fn(xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, B, C = xBC.split([e, ngroups * n, ngroups * n], dim=-1)
    x, B, C = (t.unflatten(-1, (groups, -1)) for t, groups in ((x, h), (B, ngroups), (C, ngroups)))
    out, state = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D=D,
        z=z.unflatten(-1, (h, p)) if rmsnorm_weight is None else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = out.flatten(2)
    if rmsnorm_weight is not None:
        out = _gated_norm(out, z, rmsnorm_weight, rmsnorm_eps, ngroups, norm_before_gate)
    if mlp:
        gate, up = beside.chunk(2, dim=-1)
        out = torch.cat([F.silu(gate) * up, out], dim=-1)
    out = out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)
    return (out, state) if return_final_states else out


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    """RMS norm of every group of features of y (b l e), and the gate SiLU(z) behind or before it; in fp32 or better."""
    dtype = compute_dtype(y)
    wide, gate = y.to(dtype), F.silu(z.to(dtype))
    wide = (wide if norm_before_gate else wide * gate).unflatten(-1, (groups, -1))
    wide = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(dtype)
    return (wide * gate if norm_before_gate else wide).to(y.dtype)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last inputs of every sequence of a packed batch: the states from which a convolution goes on.

    x           (t c)  tokens of all sequences, one after another
    cu_seqlens  (b+1) integers: where the sequences begin, and at last where the last one ends
    returns     (b c state_len) in x's dtype, oldest first; zeros before the first token of a sequence

    Gradients flow (upstream's do not). Raises ValueError naming the argument.
    """
    expect("x", x, ("t", "c"), {})
    expect_cu_seqlens(cu_seqlens, x.device)
    if state_len < 1:
        raise ValueError(f"state_len = {state_len}, expected at least 1")
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    at = ends - state_len + torch.arange(state_len, device=x.device)  # (b state_len)
    if not len(x):
        return x.new_zeros(len(ends), x.shape[1], state_len)
    return torch.where((at >= starts)[..., None], x[at.clamp(min=0)], 0).mT
