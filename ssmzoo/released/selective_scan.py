"""The function selective_scan_ref of the package mamba-ssm."""

from __future__ import annotations

from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.released.operators import FunctionModule


def official(state, delta_softplus=False, return_last_state=False):
    """The official function (mamba_ssm's selective_scan_ref) as a module; it has no parameters."""
    return FunctionModule(selective_scan_fn, delta_softplus=delta_softplus, return_last_state=return_last_state), state
