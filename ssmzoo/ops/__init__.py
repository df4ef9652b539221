"""Operators: pure functions on tensors, each with a readable reference and the fastest backend that can serve."""

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmzoo.ops.complex_scan import complex_scan
from ssmzoo.ops.cross_scan import cross_merge, cross_scan
from ssmzoo.ops.cross_selective_scan import cross_selective_scan
from ssmzoo.ops.dense_scan import dense_scan, mix_transitions
from ssmzoo.ops.depthwise_conv2d import depthwise_conv2d
from ssmzoo.ops.dispatch import (
    BACKENDS,
    OPERATORS,
    BackendError,
    backend,
    backend_table,
    chosen_backend,
    load_backends,
    observe,
)
from ssmzoo.ops.drop_in import (
    causal_conv1d_varlen_states,
    mamba_chunk_scan,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
)
from ssmzoo.ops.gated_delta_rule import gated_delta_rule
from ssmzoo.ops.gated_delta_step import gated_delta_step
from ssmzoo.ops.gated_layer_norm import gated_layer_norm
from ssmzoo.ops.gated_linear_recurrence import gated_linear_recurrence
from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.mamba2_step import mamba2_step
from ssmzoo.ops.mamba3_step import mamba3_step
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.moe_dispatch import router_logits
from ssmzoo.ops.quantized_linear import quantized_linear
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.selective_scan import selective_scan_fn
from ssmzoo.ops.selective_state_update import selective_state_update
from ssmzoo.ops.spatial_scan import spatial_scan
from ssmzoo.ops.ssd import mamba_chunk_scan_combined, ssd_minimal_discrete, ssd_scan, ssd_state_update
from ssmzoo.ops.stack_step import stack_step
from ssmzoo.ops.state_fusion import state_fusion
from ssmzoo.ops.table_rows import dot_rows, sum_rows
from ssmzoo.ops.taylor_attention import taylor_attention, taylor_state
from ssmzoo.ops.token_order import bidirectional_scan, mix_tokens, permute_tokens, prepend_mean
from ssmzoo.ops.token_step import token_step
from ssmzoo.ops.trapezoidal_scan import rotary_trapezoidal_scan, trapezoidal_scan

load_backends(__name__)

__all__ = [
    "BACKENDS",
    "BackendError",
    "OPERATORS",
    "backend",
    "backend_table",
    "bidirectional_scan",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "chosen_backend",
    "complex_scan",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "dense_scan",
    "depthwise_conv2d",
    "dot_rows",
    "gated_delta_rule",
    "gated_delta_step",
    "gated_layer_norm",
    "gated_linear_recurrence",
    "linear_act",
    "mamba2_step",
    "mamba3_step",
    "mamba_chunk_scan",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "mamba_step",
    "mix_tokens",
    "mix_transitions",
    "observe",
    "permute_tokens",
    "prepend_mean",
    "quantized_linear",
    "rms_norm",
    "rotary_trapezoidal_scan",
    "router_logits",
    "selective_scan_fn",
    "selective_state_update",
    "spatial_scan",
    "ssd_minimal_discrete",
    "ssd_scan",
    "ssd_state_update",
    "stack_step",
    "state_fusion",
    "sum_rows",
    "taylor_attention",
    "taylor_state",
    "token_step",
    "trapezoidal_scan",
]
