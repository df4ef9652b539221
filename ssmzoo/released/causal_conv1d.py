"""The functions of the package causal-conv1d: causal_conv1d_ref and causal_conv1d_update_ref."""

from __future__ import annotations

from ssmzoo.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from ssmzoo.released.operators import FunctionModule


def official(state, activation=None, return_final_states=False):
    """The official functions (causal_conv1d_ref and causal_conv1d_update_ref, by conv_state) as a module."""

    def convolve(x, weight, bias=None, seq_idx=None, initial_states=None, conv_state=None, cache_seqlens=None):
        if conv_state is None:
            return causal_conv1d_fn(
                x, weight, bias, seq_idx, initial_states, return_final_states, activation=activation
            )
        buffer = conv_state.clone()
        return causal_conv1d_update(x, buffer, weight, bias, activation, cache_seqlens), buffer

    return FunctionModule(convolve), state
