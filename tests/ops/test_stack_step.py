"""All layers of a decoder in one operator: the definition, the layers one by one, and what must not be passed over."""

from __future__ import annotations

import pytest
import torch
from against_reference import native

import ssmzoo
from ssmzoo import ops
from ssmzoo.layers.quantized import QuantizedLinear
from ssmzoo.ops.quantized_linear import pack_int4
from ssmzoo.ops.stack_step import Integers

SIZES = {
    "mamba": dict(d_model=37, n_layer=3, ssm_cfg={"d_state": 5, "d_conv": 3, "bias": True}),
    "mamba2": dict(d_model=36, n_layer=3, ssm_cfg={"d_state": 19, "headdim": 12, "bias": True}),
}
kinds = pytest.mark.parametrize("name", SIZES)


def model_of(name, seed=0, **sizes):
    torch.manual_seed(seed)
    model = ssmzoo.create_model(name, vocab_size=11, **(SIZES[name] | sizes)).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model


def quantise(model, bits, names=("in_proj", "out_proj", "x_proj", "dt_proj"), group_size=16):
    """To nearest, in place."""
    for module in list(model.modules()):
        for name in names:
            linear = getattr(module, name, None)
            if isinstance(linear, torch.nn.Linear) and not (bits == 4 and linear.in_features % 2):
                setattr(module, name, rounded(linear, bits, group_size))
    return model


def rounded(linear, bits, group_size):
    e, d = linear.weight.shape
    new = QuantizedLinear(d, e, bits, group_size, bias=linear.bias is not None)
    m, top = new.scale.shape[1], 7 if bits == 4 else 127
    padded = torch.nn.functional.pad(linear.weight, (0, m * group_size - d)).view(e, m, group_size)
    new.scale.copy_(padded.abs().amax(-1) / top + 1e-8)
    codes = (padded / new.scale[..., None]).round().clamp(-top, top).view(e, -1)[:, :d].to(torch.int8)
    new.weight.copy_(pack_int4(codes) if bits == 4 else codes)
    if linear.bias is not None:
        new.bias.copy_(linear.bias)
    return new


def double(value):
    if isinstance(value, Integers):
        return value._replace(scale=value.scale.double())
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, (list, tuple)):
        return type(value)(*map(double, value)) if hasattr(value, "_fields") else type(value)(map(double, value))
    return value


def called(model, b):
    """What a model hands to the operator for a token."""
    seen = []
    with torch.no_grad():
        state = model(torch.randint(0, 11, (b, 5))).state
        with ops.observe(stack_step=lambda call, *a: seen.append(a) or call(*a)):
            model(torch.randint(0, 11, (b, 1)), state)
    assert len(seen) == 1
    return seen[0]


def steps(model, ids, state):
    out = []
    for token in ids.split(1, dim=1):
        logits, state, _ = model(token, state)
        out.append(logits)
    return torch.cat(out, 1), state


@native
@torch.no_grad()
@kinds
@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("b, threads", [(1, 2), (3, 1), (8, 2)])
def test_c_is_the_definition(name, bits, b, threads, monkeypatch):
    model = model_of(name, d_model=36)
    x, layers, states = called(model if bits == 32 else quantise(model, bits), b)
    expected, new = ops.stack_step.reference(*map(double, (x, layers, states)))
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty_like(*a, **k).fill_(float("nan")))
    kept = [t.clone() for state in states for t in state]
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        with ops.backend("c"):
            got, after = ops.stack_step(x, layers, states)
    finally:
        torch.set_num_threads(before)
    tolerance = 1e-6 if bits == 32 else 3e-4  # activations of 16 bits
    pairs = [(got, expected), *((a, e) for one, two in zip(after, new) for a, e in zip(one, two))]
    for a, e in pairs:
        assert (a - e).norm() <= tolerance * e.norm()
    assert all(torch.equal(t, k) for t, k in zip([t for state in states for t in state], kept))


@torch.no_grad()
@kinds
@pytest.mark.parametrize("bits", [32, 8])
def test_the_operator_is_the_layers_one_by_one(name, bits):
    model = model_of(name) if bits == 32 else quantise(model_of(name), bits)
    ids = torch.randint(0, 11, (3, 12))
    whole = model(ids)
    start = model(ids[:, :4]).state
    together, state = steps(model, ids[:, 4:], start)
    hook = next(m for m in model.modules() if type(m).__name__ == "MambaBlock").register_forward_hook(lambda *a: None)
    apart, other = steps(model, ids[:, 4:], start)
    hook.remove()
    tolerance = 1e-5 if bits == 32 else 1e-3
    assert (together - apart).norm() <= tolerance * apart.norm()
    assert (together - whole.logits[:, 4:]).norm() <= 10 * tolerance * apart.norm()
    for one, two in zip(state, other):
        assert type(one) is type(two) and (one.ssm - two.ssm).norm() <= tolerance * two.ssm.norm()


@torch.no_grad()
@kinds
def test_a_hook_a_replaced_forward_and_an_observer_are_seen(name):
    model = model_of(name)
    ids = torch.randint(0, 11, (2, 1))
    state = model(torch.randint(0, 11, (2, 5))).state
    logits = model(ids, state).logits
    inner = [m for m in model.backbone.layers.modules() if not list(m.children()) and m is not model.backbone.layers]
    modules = [*model.backbone.layers, *(m for b in model.backbone.layers for m in (b.mixer, b.norm)), *inner]
    for module in dict.fromkeys(modules):
        calls = []
        hook = module.register_forward_hook(lambda m, i, o, calls=calls: calls.append(1))
        same = model(ids, state).logits
        hook.remove()
        assert calls, type(module).__name__
        torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-5)
    single, seen = "mamba_step" if name == "mamba" else "mamba2_step", []
    with ops.observe(**{single: lambda call, *a: seen.append(1) or call(*a)}):
        torch.testing.assert_close(model(ids, state).logits, logits, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3
    model.backbone.layers[1].mixer.forward = lambda x, state=None, **k: (torch.zeros_like(x), state)
    assert not torch.allclose(model(ids, state).logits, logits)


@native
@torch.no_grad()
def test_other_precisions_and_settings_take_the_modules():
    seen = []
    ids = torch.randint(0, 11, (2, 1))
    with ops.observe(stack_step=lambda call, *a: seen.append(1) or call(*a)):
        half = model_of("mamba").bfloat16()
        half(ids, half(ids).state)
        norm = model_of("mamba", rms_norm=False)
        norm(ids, norm(ids).state)
        mixed = model_of("mamba", d_intermediate=8)
        mixed(ids, mixed(ids).state)
        model = model_of("mamba")
        state = model(ids).state
        model(ids, state, mask=torch.tensor([[True], [False]]))
        with torch.enable_grad():
            model(ids, state)
    assert not seen
