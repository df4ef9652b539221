"""Adapters, hooks and parametrisations act on all Linears, convolutions and norms of image and restoration models."""

import pytest
import tiny_images
import torch
import walker
from torch import nn

from ssmzoo.models.vim import Vim
from ssmzoo.models.vmamba import VMamba

MODELS = tiny_images.tiny_models()
VARIANTS = {  # options that change which modules meet
    "vmamba, batch norm, gated": lambda: VMamba(
        num_classes=5, depths=(1, 1), dims=8, norm="bn", mixer={"gate": "linear", "out_norm": "layer_conv"}
    ),
    "vmamba, heads, gated mlp": lambda: VMamba(
        num_classes=5, depths=(1, 1), dims=8, mlp={"gated": True}, mixer={"heads": True, "dt_rank": 2}, d_state=2
    ),
    "vim, shared": lambda: Vim(
        num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=1, d_state=2, mixer={"directions": "shared"}
    ),
    "vim, forward": lambda: Vim(
        num_classes=5, img_size=32, patch_size=8, embed_dim=16, depth=1, d_state=2, mixer={"directions": "forward"}
    ),
}


def subject(name):
    """The model in double precision, all parameters moved from their initial zeros and ones, and pictures for it."""
    if name in VARIANTS:
        torch.manual_seed(0)
        model, x = VARIANTS[name]().double().eval(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    else:
        model, x = tiny_images.build(MODELS[name], torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, x


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_what_a_user_puts_on_a_module_acts(name, every):
    model, x = subject(name)
    names = walker.leaves(model)
    problems = walker.check(model, {"one pass": lambda: model(x)}, every)
    # MambaIRv2's router chooses a class: a change may leave all choices as they are, its gradient arrives all the same
    problems = [p for p in problems if not (".route." in p and "does not act" in p)]
    assert len(names) > 3 and problems == []


@pytest.mark.parametrize("name", [*MODELS, *VARIANTS])
def test_fused_and_separate_are_the_same(name):
    model, x = subject(name)
    calls, fused = [], model(x)
    leaves = [model.get_submodule(leaf) for leaf in walker.leaves(model)]
    hooks = [leaf.register_forward_hook(lambda module, args, y: calls.append(module)) for leaf in leaves]
    separate = model(x)
    for hook in hooks:
        hook.remove()
    assert set(calls) == set(leaves)
    torch.testing.assert_close(separate, fused, rtol=1e-10, atol=1e-12)
    assert torch.equal(model(x), fused)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamically_quantised_linears_run(name):
    """Every Linear that torch replaces takes part in the forward pass."""
    model, x = tiny_images.build(MODELS[name])
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    ran = []
    for n in linears:
        assert type(quantised.get_submodule(n)) is not nn.Linear
        quantised.get_submodule(n).register_forward_hook(lambda module, args, y, n=n: ran.append(n))
    with torch.no_grad():
        assert quantised(x).isfinite().all()
    assert set(ran) == set(linears)
