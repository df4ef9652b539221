"""The functions of mamba_ssm's state-space duality: mamba_chunk_scan_combined and ssd_minimal_discrete."""

from __future__ import annotations

import math

from ssmzoo.ops.ssd import mamba_chunk_scan_combined, ssd_minimal_discrete
from ssmzoo.released.operators import FunctionModule


def official(
    state: dict,
    chunk_size: int | None = None,
    block_len: int | None = None,
    dt_softplus: bool = False,
    dt_limit=(0.0, math.inf),
):
    """mamba_chunk_scan_combined (with chunk_size) or ssd_minimal_discrete (with block_len), final state included."""
    if (chunk_size is None) == (block_len is None):
        raise ValueError("give chunk_size (mamba_chunk_scan_combined) or block_len (ssd_minimal_discrete)")
    if block_len is not None:
        return FunctionModule(ssd_minimal_discrete, block_len=block_len), state
    return FunctionModule(
        mamba_chunk_scan_combined,
        chunk_size=chunk_size,
        dt_softplus=dt_softplus,
        dt_limit=tuple(dt_limit),
        return_final_states=True,
    ), state
