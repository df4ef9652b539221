"""Operators: pure functions on tensors, each with a readable reference and the fastest backend that can serve."""

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmzoo.ops.complex_scan import complex_scan
from ssmzoo.ops.cross_scan import cross_merge, cross_scan
from ssmzoo.ops.cross_selective_scan import cross_selective_scan
from ssmzoo.ops.cuda import load as _cuda_load  # noqa: F401
from ssmzoo.ops.dense_scan import dense_scan, mix_transitions
from ssmzoo.ops.depthwise_conv2d import depthwise_conv2d
from ssmzoo.ops.dispatch import BACKENDS, OPERATORS, BackendError, backend, backend_table, chosen_backend, observe
from ssmzoo.ops.drop_in import (
    causal_conv1d_varlen_states,
    mamba_chunk_scan,
    mamba_inner_fn,
    mamba_split_conv1d_scan_combined,
)
from ssmzoo.ops.gated_layer_norm import gated_layer_norm
from ssmzoo.ops.linear_act import linear_act
from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.moe_dispatch import router_logits
from ssmzoo.ops.native import causal_conv1d as _native_causal_conv1d  # noqa: F401
from ssmzoo.ops.native import cross_selective_scan as _native_cross_selective_scan  # noqa: F401
from ssmzoo.ops.native import dense_scan as _native_dense_scan  # noqa: F401
from ssmzoo.ops.native import depthwise_conv2d as _native_depthwise_conv2d  # noqa: F401
from ssmzoo.ops.native import gated_layer_norm as _native_gated_layer_norm  # noqa: F401
from ssmzoo.ops.native import linear_act as _native_linear_act  # noqa: F401
from ssmzoo.ops.native import mamba_step as _native_mamba_step  # noqa: F401
from ssmzoo.ops.native import rms_norm as _native_rms_norm  # noqa: F401
from ssmzoo.ops.native import selective_scan as _native_selective_scan  # noqa: F401
from ssmzoo.ops.native import selective_state_update as _native_selective_state_update  # noqa: F401
from ssmzoo.ops.native import spatial_scan as _native_spatial_scan  # noqa: F401
from ssmzoo.ops.native import ssd as _native_ssd  # noqa: F401
from ssmzoo.ops.native import state_fusion as _native_state_fusion  # noqa: F401
from ssmzoo.ops.rms_norm import rms_norm
from ssmzoo.ops.selective_scan import selective_scan_fn, selective_state_update
from ssmzoo.ops.spatial_scan import spatial_scan
from ssmzoo.ops.ssd import mamba_chunk_scan_combined, ssd_minimal_discrete, ssd_scan, ssd_state_update
from ssmzoo.ops.state_fusion import state_fusion
from ssmzoo.ops.token_order import bidirectional_scan, mix_tokens, permute_tokens, prepend_mean
from ssmzoo.ops.trapezoidal_scan import trapezoidal_scan
from ssmzoo.ops.triton import causal_conv1d as _triton_causal_conv1d  # noqa: F401
from ssmzoo.ops.triton import selective_scan as _triton_selective_scan  # noqa: F401
from ssmzoo.ops.triton import ssd as _triton_ssd  # noqa: F401

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
    "gated_layer_norm",
    "linear_act",
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
    "rms_norm",
    "router_logits",
    "selective_scan_fn",
    "selective_state_update",
    "spatial_scan",
    "ssd_minimal_discrete",
    "ssd_scan",
    "ssd_state_update",
    "state_fusion",
    "trapezoidal_scan",
]
