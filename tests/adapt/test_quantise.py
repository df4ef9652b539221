"""Quantisation step by step: what leaves the function alone leaves it alone, integers come near, the form is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ssmzoo
import ssmzoo.models.hybrid
from ssmzoo.adapt.quantise import (
    FORMAT,
    MODES,
    fuse_norms,
    quantise,
    reorder,
    restructure,
    rotate,
    separate_experts,
    smooth,
    structure,
    untie,
)
from ssmzoo.layers.plain import matrix_of
from ssmzoo.layers.quantized import QuantizedEmbedding, QuantizedLinear, SeparateExperts

SIZES = dict(vocab_size=40, d_model=48)
MODELS = {
    "mamba": dict(n_layer=2),
    "mamba2": dict(n_layer=2, ssm_cfg={"d_state": 8, "headdim": 8, "ngroups": 1}),
    "mamba2, two groups, MLP": dict(
        n_layer=2,
        d_intermediate=64,
        ssm_cfg={"d_state": 8, "headdim": 8, "ngroups": 2, "d_ssm": 64, "D_has_hdim": True},
    ),
    "moe_mamba": dict(n_blocks=2, n_experts=4),
    "moe_mamba_parallel": dict(n_blocks=2, n_experts=4),
    "moe_mamba_inner": dict(n_blocks=2, n_experts=4),
    "mamba_hybrid": dict(n_layer=2, layer_pattern="MA", head_dim=16, d_ff=96, mixers={"A": {"num_heads": 3}}),
    "mamba_hybrid_moe": dict(
        n_layer=3,
        layer_pattern="MSA",
        head_dim=12,
        d_ff=96,
        n_experts=4,
        mixers={"S": {"d_state": 8}, "A": {"num_heads": 3}},
    ),
}


def build(title: str) -> nn.Module:
    torch.manual_seed(0)
    name = {"mamba_hybrid": "hybrid", "mamba_hybrid_moe": "hybrid"}.get(title, title.split(",")[0])
    options = SIZES | MODELS[title]
    if name == "hybrid":
        model = ssmzoo.models.hybrid.HybridLM(**options)
    else:
        model = ssmzoo.create_model(name, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "dt" not in name and "A_log" not in name:  # norms that are not 1, biases not 0
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def text(n: int = 4, length: int = 160) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randint(0, SIZES["vocab_size"], (length,), generator=g) for _ in range(n)]


def error(model: nn.Module, expected: torch.Tensor) -> float:
    logits = model(torch.stack(text(2, 24))).logits
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.fixture(params=MODELS)
def model(request):
    return build(request.param)


def test_float_steps_leave_the_logits_alone(model):
    """In float64 to 1e-8 and in float32 to 1e-5: experts apart, channels reordered, norms fused, rotated."""
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        for with_own_head in (False, True):
            m = copy.deepcopy(model).to(dtype)
            expected = m(torch.stack(text(2, 24))).logits
            separate_experts(m)
            assert error(m, expected) <= tolerance
            reorder(m, text())
            assert error(m, expected) <= tolerance
            if with_own_head:
                untie(m)
            fuse_norms(m)
            assert error(m, expected) <= tolerance
            rotate(m)
            assert error(m, expected) <= tolerance


def test_smoothing_leaves_the_logits_alone(model):
    model = separate_experts(model.double())
    expected = model(torch.stack(text(2, 24))).logits
    smooth(model, text(), 0.5)
    assert error(model, expected) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_integers_come_near_and_keep_their_form(model, mode):
    """The form and the tensors alone give the same model again, bit for bit; a quarter or less of the bytes."""
    expected = model(torch.stack(text(2, 24))).logits
    made = quantise(model, text(), mode=mode)
    assert error(made, expected) < (0.15 if mode.startswith("w8") else 0.6)
    again = restructure(copy.deepcopy(model), {"format": FORMAT, "modules": structure(made)})
    again.load_state_dict(made.state_dict())
    ids = torch.stack(text(2, 24))
    with torch.no_grad():  # with gradients another backend serves
        assert torch.equal(again(ids).logits, made(ids).logits)
    assert not any(type(m) is nn.Linear for m in made.modules()) and any(type(m) is nn.Linear for m in model.modules())
    integers = {b.data_ptr(): b for b in made.state_dict().values() if b.dtype in (torch.int8, torch.uint8)}
    assert sum(b.numel() for b in integers.values()) < (1.3 if mode.startswith("w8") else 0.75) * count(model)


def count(model: nn.Module) -> int:
    matrices = (m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    experts = [p for n, p in model.named_parameters() if p.ndim == 3 and "conv1d" not in n]
    return sum(p.numel() for p in {id(m.weight): m.weight for m in matrices}.values()) + sum(p.numel() for p in experts)


def test_token_by_token_is_the_whole_pass():
    made = quantise(build("mamba2"), text(), mode="w4a16")
    ids = torch.stack(text(2, 12))
    state, out = None, []
    for t in range(ids.shape[1]):
        logits, state, _ = made(ids[:, t : t + 1], state)
        out.append(logits)
    torch.testing.assert_close(torch.cat(out, 1), made(ids).logits, rtol=1e-4, atol=1e-4)


def test_gptq_beats_rounding_to_nearest():
    """On the text that it was calibrated on, at the output of the model."""
    model = build("mamba")
    expected = model(torch.stack(text(2, 24))).logits
    by = {m: error(quantise(model, text(16), method=m, rotate=False), expected) for m in ("gptq", "nearest")}
    assert by["gptq"] < by["nearest"]


def test_a_tied_table_is_stored_once_and_an_untied_one_twice():
    model = build("mamba")
    for with_own, same in ((False, True), (True, False)):
        made = quantise(model, mode="w8a16", untie=with_own)
        embedding, head = made.backbone.embedding, made.lm_head
        assert isinstance(embedding, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
        assert (embedding.weight.data_ptr() == head.weight.data_ptr()) is same
    only = quantise(model, mode="w8a16", embedding=False)
    assert type(only.backbone.embedding) is nn.Embedding and isinstance(only.lm_head, QuantizedLinear)


def test_a_mixture_of_modes():
    made = quantise(build("mamba"), text(), mode="w4a8", layers={"backbone.layers.1.*": "w8a16"})
    first, second = (layer.mixer.out_proj for layer in made.backbone.layers)
    assert (first.bits, first.activation, second.bits, second.activation) == (4, "static", 8, "float")
    assert made.backbone.layers[0].mixer.conv1d.output is not None
    assert type(made.backbone.layers[1].mixer.conv1d) is nn.Conv1d


def test_experts_are_quantised_one_by_one():
    made = quantise(build("moe_mamba"), text(), mode="w4a8")
    banks = [m for m in made.modules() if isinstance(m, SeparateExperts)]
    assert len(banks) == 2 and all(e.activation == "dynamic" and e.bits == 4 for e in banks[0].lin2)


def test_any_model_by_its_linear_layers_alone():
    model = ssmzoo.create_model("vim", num_classes=3, embed_dim=32, depth=2, img_size=32).eval()
    x = torch.rand(1, 3, 32, 32)
    made = quantise(model, [x], mode="w8a8", rotate=False, reorder=False)
    with torch.no_grad():
        expected, found = model(x), made(x)
    assert (found - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ValueError, match="no language model.*--no-rotate"):
        quantise(model, [x], mode="w8a8")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(mode="w4a4"), "unknown mode 'w4a4'.*w4a8"),
        (dict(method="round"), "unknown method 'round'"),
        (dict(group_size=1), "group_size = 1"),
        (dict(damping=0), "damping = 0"),
        (dict(percentile=2.0), "percentile = 2.0"),
        (dict(smooth=0.5), "smooth = 0.5.*without rotation"),
        (dict(layers={"*.nothing": "w8a8"}), "no linear layer is called '\\*.nothing'"),
    ],
)
def test_settings_that_have_no_meaning_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        quantise(build("mamba"), text(), **change)


def test_what_does_not_fit_is_refused_in_words():
    odd = ssmzoo.create_model("mamba", vocab_size=40, d_model=50, n_layer=1)
    with pytest.raises(ValueError, match="d_model = 50 has no Hadamard matrix.*\\[40, 48\\].*--no-rotate"):
        quantise(odd, text())
    assert error(quantise(odd, text(), rotate=False, mode="w8a16"), odd.eval()(torch.stack(text(2, 24))).logits) < 0.1
    few = ssmzoo.create_model("mamba2", vocab_size=40, d_model=48, n_layer=1, ssm_cfg={"d_state": 8, "headdim": 32})
    with pytest.raises(ValueError, match="3 heads per SSD group are fewer than the 4 clusters.*--no-reorder"):
        quantise(few, text(), mode="w8a8")
    with pytest.raises(ValueError, match="has 20 tokens in 1 samples, too few for GPTQ"):
        quantise(build("mamba"), text(1, 20))
    with pytest.raises(ValueError, match="quantised already"):
        quantise(quantise(build("mamba"), mode="w8a16"), text())
    with pytest.raises(ValueError, match="is GatedDeltaNet.*--no-rotate"):
        quantise(ssmzoo.create_model("gated_deltanet", vocab_size=40), text())


def test_foreign_forms_are_refused():
    model = build("mamba")
    for section, words in [
        ({"format": 2, "modules": []}, "no form that this version knows"),
        (
            {"format": 1, "modules": [["lm_head", "linear", {"in_features": 10**9, "out_features": 40}]]},
            "the model has 48",
        ),
        ({"format": 1, "modules": [["lm_head", "pickle", {}]]}, "unknown kind 'pickle'"),
        ({"format": 1, "modules": [["nowhere", "rotated", {}]]}, "does not fit the model"),
    ]:
        with pytest.raises(ValueError, match=words):
            restructure(copy.deepcopy(model), section)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_who_looks_into_a_model_sees_the_matrix_that_acts(bits, rotate):
    """What a module multiplies with, for a plain layer, a quantised one and one with an adapter beside it."""
    layer = QuantizedLinear(32, 12, bits, 16, rotate=rotate, bias=True)
    layer.weight.random_(0, 255) if bits == 4 else layer.weight.random_(-127, 128)
    layer.scale.uniform_(0.01, 0.02)
    layer.bias.normal_()
    x = torch.randn(5, 32)
    y = x @ matrix_of(layer).T + layer.bias
    assert (layer(x) - y).abs().max() < 1e-4 * y.abs().max()
    plain = torch.nn.Linear(32, 12)
    assert matrix_of(plain) is plain.weight

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x[..., :12].flip(-1)

    adapted = Adapted(32, 12)
    assert torch.allclose(adapted(x), x @ matrix_of(adapted).T + adapted.bias, atol=1e-5)
