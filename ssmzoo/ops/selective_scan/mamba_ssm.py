"""selective_scan_fn on mamba-ssm's kernels."""

from __future__ import annotations

from ssmzoo.ops.eager import needs_grad
from ssmzoo.ops.mamba_ssm import install, load, refuses, same_dtype
from ssmzoo.ops.selective_scan import selective_scan_fn, why_not_complex

SCAN = ("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")


def why_not(a) -> str | None:
    if a.initial_state is not None:
        return "mamba-ssm's selective scan takes no initial_state"
    if a.seq_idx is not None:
        return "mamba-ssm's selective scan takes no seq_idx"
    if a.A.is_complex():
        return why_not_complex(a)
    if a.A.shape[1] > 256:
        return f"mamba-ssm's selective scan holds up to 256 states per channel, got {a.A.shape[1]}"
    given = a.u, a.delta, a.A, a.B, a.C, a.D, a.z, a.delta_bias
    if a.return_last_state and needs_grad(*given):
        return "mamba-ssm's selective scan has no gradient for the last state"
    varying = {name: M for name, M in (("B", a.B), ("C", a.C)) if M.ndim > 2}
    if len({M.shape[1] if M.ndim == 4 else 1 for M in varying.values()}) > 1:
        return "mamba-ssm's selective scan wants as many groups in B as in C"
    return same_dtype(u=a.u, delta=a.delta, z=a.z, **varying) or refuses(*SCAN, *given)


@selective_scan_fn.register("mamba_ssm", unsupported=why_not, **install(*SCAN))
def selective_scan_mamba_ssm(a):
    B, C = (M.float() if M.ndim == 2 else M for M in (a.B, a.C))
    D, bias = (None if t is None else t.float() for t in (a.D, a.delta_bias))
    options = a.delta_softplus, a.return_last_state
    return load(*SCAN)[0](a.u, a.delta, a.A.float(), B, C, D, a.z, bias, *options)
