"""Cases of benchmarks/ops.py: the joined operators of the image backbones, forward and backward, beside torch's own.

Eight images of 224 pixels in the first and third stage of Spatial-Mamba-T and VMamba-T: maps of `side`, width d, inner
width e, rank r of the time step.
"""

from __future__ import annotations

import torch
from ops import Case

from ssmzoo import ops

BATCH = 8


def linear(side, d, e, r):
    return (lambda *t: ops.linear_act(*t, "gelu")), [(BATCH, side, side, d), (4 * d, d), (4 * d,)]


def convolution(side, d, e, r):
    return (lambda *t: ops.depthwise_conv2d(*t, "silu")), [(BATCH, side, side, e), (e, 1, 3, 3), (e,)]


def norm(side, d, e, r):
    return ops.gated_layer_norm, [(BATCH, side, side, e)] * 2 + [(e,)] * 2


def fused_scan(side, d, e, r):
    def call(u, steps, dt_proj, dt_bias, A_log, D, *taps):
        return ops.spatial_scan(u, steps, dt_proj, dt_bias, -torch.exp(A_log), D, taps[:3], taps[3])

    maps = [(BATCH, side, side, e), (BATCH, side, side, r + 2)]
    return call, [*maps, (e, r), (e,), (e, 1), (e,), *[(e, 1, 3, 3)] * 3, (3,)]


def four_scans(side, d, e, r):
    def call(x, x_proj, dt_proj, dt_bias, A_log, D):
        return ops.cross_selective_scan(x.permute(0, 3, 1, 2), x_proj, dt_proj, dt_bias, -torch.exp(A_log), D)

    return call, [(BATCH, side, side, d), (4, r + 2, d), (4, d, r), (4, d), (4 * d, 1), (4 * d,)]


def run(make, size, backend):
    def build():
        torch.manual_seed(0)
        function, shapes = make(*size)
        values = [(0.1 * torch.randn(shape)).requires_grad_() for shape in shapes]

        def step():
            with ops.backend(backend):
                y = function(*values)
                torch.autograd.grad(y, values, y.detach())

        return step

    return build


CASES = [
    Case(
        f"{name}, forward + backward, side {size[0]}, d {size[1]}, e {size[2]}",
        {"ssmzoo": run(make, size, None), "ssmzoo, torch backend": run(make, size, "torch")},
        target=1,
        repeats=5,
    )
    for name, make, sizes in (
        ("linear_act with GELU", linear, ((56, 64, 128, 4), (14, 256, 512, 16))),
        ("depthwise_conv2d with SiLU", convolution, ((56, 64, 128, 4), (14, 256, 512, 16))),
        ("gated_layer_norm", norm, ((56, 64, 128, 4), (14, 256, 512, 16))),
        ("spatial_scan", fused_scan, ((56, 64, 128, 4), (14, 256, 512, 16))),
        ("cross_selective_scan", four_scans, ((56, 96, 96, 6), (14, 384, 384, 24))),
    )
    for size in sizes
]
