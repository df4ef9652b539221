"""mamba_step on our compiled CPU kernel (mamba_step.c)."""

from __future__ import annotations

import ctypes

import torch

from ssmzoo.ops.mamba_step import mamba_step
from ssmzoo.ops.native import kernel

STEP, MISSING = kernel("ssmzoo_mamba_step")
MAX_ROWS, MAX_WEIGHTS = 4, 2**21  # beyond these, matrix products on several threads win


def why_not(
    u,
    conv_state,
    ssm_state,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A_log,
    D,
    in_proj=None,
    in_bias=None,
    out_proj=None,
    out_bias=None,
) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile does not trace into it"
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return "serves decoding: without gradients and without autocast"
    if u.shape[0] > MAX_ROWS or (in_proj is not None and in_proj.numel() > MAX_WEIGHTS):
        return f"serves up to {MAX_ROWS} sequences and input projections of up to {MAX_WEIGHTS} weights"
    if u.dtype is not torch.float32:
        return f"computes in float32, got {u.dtype}"
    for t in (
        conv_state,
        ssm_state,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        dt_bias,
        A_log,
        D,
        in_proj,
        in_bias,
        out_proj,
        out_bias,
    ):
        if t is not None and (t.dtype is not torch.float32 or not t.is_contiguous()):
            return f"computes with contiguous float32, got {t.dtype} with strides {t.stride()}"
    return None


@mamba_step.register("native", device="cpu", missing=MISSING, unsupported=why_not)
def mamba_step_native(
    u,
    conv_state,
    ssm_state,
    conv_weight,
    conv_bias,
    x_proj,
    dt_proj,
    dt_bias,
    A_log,
    D,
    in_proj=None,
    in_bias=None,
    out_proj=None,
    out_bias=None,
):
    u = u.contiguous()
    (b, d), (e, n) = u.shape, A_log.shape
    if in_proj is None:  # u is [x, z] already
        d = e if out_proj is None else out_proj.shape[0]
    out = u.new_empty(b, e if out_proj is None else d)
    conv, ssm = torch.empty_like(conv_state), torch.empty_like(ssm_state)
    tensors = (
        u,
        conv_state,
        ssm_state,
        conv_weight,
        conv_bias,
        x_proj,
        dt_proj,
        dt_bias,
        A_log,
        D,
        in_proj,
        in_bias,
        out_proj,
        out_bias,
        out,
        conv,
        ssm,
    )
    # without the large matrices there is little to share
    threads = torch.get_num_threads() if in_proj is not None else 1
    STEP(
        (ctypes.c_int64 * 24)(
            *[0 if t is None else t.data_ptr() for t in tensors],
            b,
            d,
            e,
            n,
            dt_proj.shape[1],
            conv_weight.shape[1],
            threads,
        )
    )
    return out, conv, ssm
