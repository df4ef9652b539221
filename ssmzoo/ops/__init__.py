"""Operators: pure functions on tensors, each with a readable reference and the fastest backend that can serve."""

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmzoo.ops.dispatch import BACKENDS, BackendError, backend, backend_table, chosen_backend
from ssmzoo.ops.selective_scan import selective_scan_fn, selective_state_update

__all__ = [
    "BACKENDS",
    "BackendError",
    "backend",
    "backend_table",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "chosen_backend",
    "selective_scan_fn",
    "selective_state_update",
]
