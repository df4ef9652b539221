"""The layers of a Mamba and a Mamba-2 for a GPU's one call per token: the operator is the modules."""

from __future__ import annotations

import pytest
import torch

import ssmzoo
from ssmzoo import ops
from ssmzoo.layers.one_call import layers_of

SIZES = {
    "mamba": dict(d_model=37, n_layer=3, ssm_cfg={"d_state": 5, "d_conv": 3, "bias": True}),
    "mamba2": dict(d_model=36, n_layer=3, ssm_cfg={"d_state": 19, "headdim": 12, "bias": True}),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_operator_is_the_modules(name, backend):
    torch.manual_seed(0)
    model = ssmzoo.create_model(name, vocab_size=11, **SIZES[name]).double().eval().requires_grad_(False)
    model.backbone.float()  # its layers are told in fp32
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    state = model.backbone(torch.randint(0, 11, (3, 5)))[1]
    x = torch.randn(3, 1, SIZES[name]["d_model"])
    expected, after, _ = model.backbone.one_by_one(x[:, 0], state)
    layers = layers_of(model.backbone.layers)
    with ops.backend(backend):
        got, new = ops.stack_step(x[:, 0], layers, state)
    torch.testing.assert_close(model.backbone.norm_f(got), expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(new, after):
        torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-4, atol=1e-5)
    hook = model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda *a: None)
    assert layers_of(model.backbone.layers) is None
    hook.remove()
