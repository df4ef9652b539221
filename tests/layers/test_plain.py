"""Which modules a fused path may read past their forward."""

import pytest
from torch import nn

from ssmzoo.layers.plain import PLAIN, is_plain, observer

MAKE = {
    nn.Linear: lambda: nn.Linear(3, 3),
    nn.Conv1d: lambda: nn.Conv1d(3, 3, 1),
    nn.Conv2d: lambda: nn.Conv2d(3, 3, 1),
    nn.Embedding: lambda: nn.Embedding(3, 3),
    nn.LayerNorm: lambda: nn.LayerNorm(3),
}


def test_every_plain_class_is_tried():
    assert MAKE.keys() == PLAIN


def replace_forward(module):
    module.forward = lambda x: x


CHANGES = {
    "forward hook": lambda m: m.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *a: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *a: None),
    "parametrisation": lambda m: nn.utils.parametrizations.weight_norm(m),
    "old weight norm": lambda m: nn.utils.spectral_norm(m),
    "replaced forward": replace_forward,
}


@pytest.mark.parametrize("cls", MAKE)
@pytest.mark.parametrize("change", CHANGES)
def test_what_acts_on_a_module_is_seen(cls, change):
    module, untouched = MAKE[cls](), MAKE[cls]()
    assert is_plain(module, untouched)
    CHANGES[change](module)
    assert not is_plain(module) and not is_plain(untouched, module) and is_plain(untouched)


def test_subclasses_wrappers_and_global_hooks():
    class Adapted(nn.Linear):
        pass

    assert not is_plain(Adapted(3, 3)) and not is_plain(nn.Sequential(nn.Linear(3, 3)))
    hook = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert not is_plain(nn.Linear(3, 3))
    hook.remove()
    assert is_plain(nn.Linear(3, 3))


def test_hooks_that_only_observe_are_passed_over():
    linear = nn.Linear(2, 2)
    hook = linear.register_forward_pre_hook(observer(lambda module, inputs: None))
    assert is_plain(linear)
    other = linear.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not is_plain(linear)
    other.remove()
    hook.remove()
    assert is_plain(linear)
