"""mamba_chunk_scan_combined on mamba-ssm's kernels."""

from __future__ import annotations

from ssmzoo.ops.mamba_ssm import install, load, refuses, same_dtype, segments
from ssmzoo.ops.ssd import mamba_chunk_scan_combined, time_steps, with_states
from ssmzoo.ops.ssd.varlen import varlen_states

OURS = ("cu_seqlens", "return_varlen_states", "state_dtype")  # theirs have no gradient and want matching seq_idx
SSD = ("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")


def why_not(a) -> str | None:
    if a.seq_idx is not None and a.initial_states is not None:
        return "mamba-ssm's chunk scan does not combine seq_idx with initial_states"
    given = a.x, a.dt, a.A, a.B, a.C, a.D, a.z, a.dt_bias, a.initial_states
    return same_dtype(x=a.x, z=a.z, B=a.B, C=a.C) or refuses(*SSD, *given)


@mamba_chunk_scan_combined.register("mamba_ssm", unsupported=why_not, **install(*SSD))
def mamba_chunk_scan_mamba_ssm(a):
    chunk_size = min(256, max(16, 1 << a.chunk_size.bit_length() - 1))  # theirs are powers of two
    theirs = {name: value for name, value in a._asdict().items() if name not in OURS}
    given = theirs | {"chunk_size": chunk_size, "seq_idx": segments(a.seq_idx), "dt_limit": tuple(a.dt_limit)}
    out = load(*SSD)[0](**given)
    y, states = (out[0], [out[1].float()]) if a.return_final_states else (out, [])
    if a.return_varlen_states:
        dt = time_steps(a.dt.float(), a.dt_bias, a.dt_softplus, a.dt_limit)
        states.append(varlen_states(a.x, dt, a.A, a.B, a.cu_seqlens, a.initial_states))
    return with_states(y, states, a.state_dtype)
