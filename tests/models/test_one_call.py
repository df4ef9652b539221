"""All layers of a decoder in one operator: beside its modules in float64, and what must not be passed over."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from against_reference import native
from test_state_contract import NODES, VOCAB, tiny_node
from torch import nn
from walker import leaves

from ssmzoo import create_model, ops
from ssmzoo.adapt import quantise as adapt
from ssmzoo.inference.decoding import Decoding
from ssmzoo.layers.one_call import _kept
from ssmzoo.layers.quantized import QuantizedLinear
from ssmzoo.layers.state import map_state
from ssmzoo.ops.dispatch import chosen_backend
from ssmzoo.ops.quantized_linear import pack_int4
from ssmzoo.ops.token_step import flat
from ssmzoo.presets import build_model

FUSED = [
    *(
        "mamba",
        "mamba2",
        "mamba3",
        "based",
        "jrt_rnn",
        "hawk",
        "gated_ssm",
        "cheems",
        "hydra_lm",
        "lightning",
        "kda",
        "transformer",
    ),
    *("moe_mamba", "moe_mamba_parallel", "mamba_hybrid", "gated_deltanet", "mamba2attn_2.7b", "hydra_lm_toy"),
    *(name for name in NODES if name.startswith(("mamba: ", "gated_ssm: causal", "hawk: odd", "hydra_lm: conv"))),
]
UNFUSED = [
    "mamba3: several inputs and outputs",
    "moe_mamba_inner",
    "transformer: selective attention",
    "transformer: threshold relative attention",
    "gated_ssm: released form",
]
pytestmark = native


def model_of(name, dtype=torch.float32):
    torch.manual_seed(0)
    model = build_model(NODES.get(name) or tiny_node(name)).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.to(dtype)


def quantise(model, bits, names=("in_proj", "out_proj", "x_proj", "dt_proj", "fc1", "fc2"), group_size=16):
    """To nearest, in place."""
    for module in list(model.modules()):
        for name in names:
            linear = getattr(module, name, None)
            if isinstance(linear, nn.Linear) and not (bits == 4 and linear.in_features % 2):
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


def steps(model, ids, state):
    """(logits, state, aux of every token, backends that served token_step)"""
    logits, aux, served = [], [], []

    def look(call, *a):
        served.append(chosen_backend(ops.token_step, *a))
        return call(*a)

    with torch.no_grad(), ops.observe(token_step=look):
        for token in ids.split(1, dim=1):
            out = model(token, state)
            state = out.state
            logits.append(out.logits)
            aux.append(out.aux)
    return torch.cat(logits, 1), state, aux, served


def tensors(state):
    return flat(state, [])


def same(got, expected, tolerance):
    for a, e in zip(got, expected, strict=True):
        assert a.shape == e.shape
        if a.is_floating_point():
            assert (a.double() - e.double()).norm() <= tolerance * e.double().norm() + 1e-9
        else:
            assert torch.equal(a, e)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("b, threads", [(1, 2), (3, 1)])
def test_c_is_the_modules(name, b, threads, monkeypatch):
    model, ids = model_of(name), torch.randint(VOCAB, (b, 16))
    with torch.no_grad():
        start = model(ids[:, :4]).state
        wide = model_of(name, torch.float64)
        states = map_state(lambda t: t.double() if t.is_floating_point() else t, start)
        expected, end, reports, _ = steps(wide, ids[:, 4:], states)
    kept = [t.clone() for t in tensors(start)]
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda t, **k: poisoned(empty_like(t, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        logits, state, aux, served = steps(model, ids[:, 4:], start)
    finally:
        torch.set_num_threads(before)
    assert served == ["c"] * 12
    same([logits], [expected], 3e-6)
    same(tensors(state), tensors(end), 3e-6)
    for one, other in zip(aux, reports):
        assert one.keys() == other.keys()
        same([one[k] for k in other], list(other.values()), 1e-5)
    assert all(torch.equal(t, k) for t, k in zip(tensors(start), kept))


def poisoned(t):
    return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(1)


@pytest.mark.parametrize(
    "name", ["mamba", "mamba2", "mamba_hybrid", "mamba: biases, MLP, LayerNorm, short convolution"]
)
@pytest.mark.parametrize("bits", [8, 4])
def test_integers(name, bits):
    model, ids = quantise(model_of(name), bits), torch.randint(VOCAB, (3, 12))
    with torch.no_grad():
        start = model(ids[:, :4]).state
        logits, state, _, served = steps(model, ids[:, 4:], start)
        with ops.backend("reference"):
            expected, end, _, _ = steps(model, ids[:, 4:], start)
    assert served == ["c"] * 8
    same([logits], [expected], 1e-3)  # activations of 16 bits
    same(tensors(state), tensors(end), 1e-3)


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("d_model, headdim", [(48, 8), (64, 16), (80, 32)])  # inner widths 12 2^k, 2^k and 40 2^k
@pytest.mark.parametrize("tied", [True, False])
def test_rotated_models_of_integers(name, d_model, headdim, tied):
    torch.manual_seed(0)
    cfg = {"d_state": 4} | ({"headdim": headdim} if name == "mamba2" else {})
    options = dict(vocab_size=VOCAB, d_model=d_model, n_layer=2, ssm_cfg=cfg)
    model = create_model(name, **options).eval()
    model = adapt.quantise(model, mode="w8a16", untie=not tied)
    ids = torch.randint(VOCAB, (3, 12))
    with torch.no_grad():
        start = model(ids[:, :4]).state
        logits, state, _, served = steps(model, ids[:, 4:], start)
        with ops.backend("reference"):
            expected, end, _, _ = steps(model, ids[:, 4:], start)
    assert served == ["c"] * 8
    same([logits], [expected], 1e-3)  # activations of 16 bits
    same(tensors(state), tensors(end), 1e-3)


QUANTISED = {
    "mamba": dict(n_layer=2, ssm_cfg={"d_state": 4}),
    "mamba2": dict(n_layer=2, ssm_cfg={"d_state": 4, "headdim": 8, "bias": True}),
    "moe_mamba": dict(n_blocks=2, n_experts=4, top_k=2),
    "mamba_hybrid_moe": dict(n_layer=2, layer_pattern="MA", head_dim=24, n_experts=3, d_ff=64, mixers={}),
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("mode", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("threads, options", [(1, {"untie": True}), (2, {"rotate": False, "smooth": 0.5})])
def test_what_quantise_makes(name, mode, threads, options):
    torch.manual_seed(0)
    model = create_model(name, vocab_size=VOCAB, d_model=48, **QUANTISED[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    samples = [torch.randint(VOCAB, (128,)) for _ in range(5)]
    model, ids = adapt.quantise(model, samples, mode=mode, method="nearest", **options), torch.randint(VOCAB, (3, 16))
    before, _ = torch.get_num_threads(), torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            start = model(ids[:, :4]).state
            logits, state, _, served = steps(model, ids[:, 4:], start)
            with ops.backend("torch"):
                expected, end, _, _ = steps(model, ids[:, 4:], start)
            decoding = Decoding(model, start)
            again = torch.stack([decoding(token).clone() for token in ids[:, 4:].T], 1)
    finally:
        torch.set_num_threads(before)
    assert served == ["c"] * 12 and decoding.session is not None and torch.equal(again, logits)
    error = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() < 1e-3  # a number at the edge may be rounded to the other side, by one in 128
    assert error.max() < 5e-2
    for one, other in zip(tensors(state), tensors(end)):
        assert (one.double() - other.double()).norm() <= 2e-2 * other.double().norm()


@pytest.mark.parametrize("name", FUSED)
def test_what_acts_on_a_module_acts_on_a_token(name):
    model, ids = model_of(name), torch.randint(VOCAB, (2, 5))
    with torch.no_grad():
        start = model(ids[:, :4]).state
        logits, _, _, served = steps(model, ids[:, 4:], start)
        inner = [m for m in (model.get_submodule(n) for n in leaves(model)) if len(list(m.parameters()))]
        for m in inner:
            hook = m.register_forward_hook(lambda m, i, o: 1.3 * o + 0.1)
            changed, _, _, used = steps(model, ids[:, 4:], start)
            with ops.backend("torch"):
                expected, _, _, _ = steps(model, ids[:, 4:], start)
            hook.remove()
            same([changed], [expected], 1e-5)
            acts = not torch.allclose(expected, logits, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(changed, logits, rtol=1e-6, atol=1e-7) or not acts, type(m).__name__
        again, _, _, served = steps(model, ids[:, 4:], start)
        assert served == ["c"] and torch.equal(again, logits)
        for m in inner:  # weights that lie elsewhere
            m.weight.data = 1.3 * m.weight + 0.1
        changed, _, _, served = steps(model, ids[:, 4:], start)
        with ops.backend("torch"):
            expected, _, _, _ = steps(model, ids[:, 4:], start)
        assert served == ["c"] and not torch.equal(changed, logits)
        same([changed], [expected], 1e-5)


def test_changed_attributes_modules_and_forwards_are_seen():
    model, ids = model_of("mamba_hybrid"), torch.randint(VOCAB, (1, 5))
    start = model(ids[:, :4]).state

    def changed(change):
        change()
        got, _, _, served = steps(model, ids[:, 4:], start)
        with ops.backend("torch"):
            expected, _, _, _ = steps(model, ids[:, 4:], start)
        same([got], [expected], 1e-5)
        return got, served

    first, _ = changed(lambda: None)
    block = model.blocks[0]
    second, served = changed(lambda: setattr(block.norms["mixer"], "eps", 0.3))
    assert served == ["c"] and not torch.equal(first, second)
    third, served = changed(lambda: setattr(block.layers["ff"], "activation", torch.relu))
    assert not served and not torch.equal(second, third)
    block.layers["ff"].activation = nn.functional.gelu
    fourth, served = changed(lambda: block.layers.__setitem__("ff", nn.Identity()))
    assert not served and not torch.equal(third, fourth)
    block.layers["ff"] = model.blocks[2].layers["ff"]
    _, served = changed(lambda: None)
    assert served == ["c"]
    model.blocks[2].layers["ff"].forward = lambda x: 0 * x
    fifth, served = changed(lambda: None)
    assert not served and not torch.equal(fourth, fifth)


@pytest.mark.parametrize("name", UNFUSED)
def test_what_has_no_program_takes_the_modules(name):
    model, ids = model_of(name), torch.randint(VOCAB, (1, 5))
    _, _, _, served = steps(model, ids[:, 4:], model(ids[:, :4]).state)
    assert not served


def test_other_precisions_states_and_observers_take_the_modules():
    model, ids = model_of("mamba"), torch.randint(VOCAB, (2, 5))
    start, seen = model(ids[:, :4]).state, []
    expected, _, _, _ = steps(model, ids[:, 4:], start)
    with torch.no_grad(), ops.observe(mamba_step=lambda call, *a: seen.append(1) or call(*a)):
        torch.testing.assert_close(model(ids[:, 4:], start).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(seen) == len(model.backbone.layers)
    half = model_of("mamba").bfloat16()
    assert not steps(half, ids[:, 4:], half(ids[:, :4]).state)[3]
    masked = torch.tensor([[True], [False]])
    with torch.no_grad(), ops.observe(token_step=lambda call, *a: seen.append(2) or call(*a)):
        model(ids[:, 4:], start, mask=masked)
    with ops.observe(token_step=lambda call, *a: seen.append(2) or call(*a)):
        model(ids[:, 4:], start)  # with gradients
    assert 2 not in seen
    strided = map_state(lambda t: t.mT.contiguous().mT, start)
    logits, _, _, served = steps(model, ids[:, 4:], strided)
    assert served == ["c"] and torch.equal(logits, expected)
    kept = {weakref.ref(m) for m in (model.backbone, half.backbone) if m in _kept}
    del model, half
    gc.collect()
    assert kept and all(m() is None for m in kept)
