"""MambaLRP conserves, agrees with the forward pass, and explanations are true to known models."""

import pytest
import torch
from paths import CHECKPOINTS
from sklearn.datasets import load_digits
from test_attention import MODELS, build

import ssmzoo
from ssmzoo.probes.entry import enter
from ssmzoo.probes.explain import (
    ATTENTION_METHODS,
    METHODS,
    attention_layers,
    attention_scores,
    class_row_scores,
    explain,
)
from ssmzoo.probes.faithfulness import average_precision, deletion, perturbation, remove, segmentation
from ssmzoo.probes.mamba_lrp import ALL, relevance, rules

EXPLAINED = (
    "mamba",
    "mamba_scenario",
    "mamba2",
    "mamba2, initial states",
    "mamba3",
    "mamba3, mimo",
    "moe_mamba",
    "moe_mamba_inner",
    "vim",
    "shuffle_mamba",
    "vmamba",
    "res_vmamba",
    "adventurer",
    "spatial_mamba",
    "mamba_reorder",
)


def noisy(name):
    """Biases and norms away from their neutral start."""
    model, x = build(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model, x


@pytest.mark.parametrize("name", EXPLAINED)
def test_relevance_is_conserved_and_rules_do_not_change_values(name):
    model, x = noisy(name)
    entry = enter(model, x)
    logits = entry.logits(entry.values).detach()
    target = logits.argmax(1)
    lrp = relevance(entry.logits, model, entry.values, target)
    torch.testing.assert_close(lrp.logits, logits, rtol=1e-4, atol=1e-5)
    assert lrp.conservation_error() < 1e-4
    plain = relevance(entry.logits, model, entry.values, target, on=())
    assert plain.conservation_error() > 10 * lrp.conservation_error()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("left_out", ALL)
def test_every_rule_is_needed(left_out):
    model, x = noisy("mamba")
    entry = enter(model, x)
    target = torch.tensor([1, 2])
    whole = relevance(entry.logits, model, entry.values, target)
    part = relevance(entry.logits, model, entry.values, target, on=[r for r in ALL if r != left_out])
    assert part.conservation_error() > 100 * whole.conservation_error()


def trained(kind):
    """A model trained here with inputs that fit: the digits of scikit-learn, or a text."""
    from ssmzoo.zoo import load_model

    model, manifest = load_model(CHECKPOINTS / kind)
    if kind == "image":
        images = torch.from_numpy(load_digits().images[:6]).float()[:, None] / 16
        return model, torch.nn.functional.interpolate(images, 32, mode="bicubic").clamp(0, 1) * 2 - 1
    text = "import sys\nimport os\n\ndef main():\n    return sys.argv\n\nimport "
    return model, torch.tensor([list(text.encode())[i : i + 48] for i in range(6)])


@pytest.mark.parametrize("kind", ["image", "language"])
def test_trained_models_conserve_relevance(kind):
    """A classifier and a language model: with biases, relevances and their shares; without, relevances alone."""
    model, x = trained(kind)
    entry = enter(model, x)
    with torch.no_grad():
        answer = entry.logits(entry.values).argmax(1)
    lrp = relevance(entry.logits, model, entry.values, answer)
    plain = relevance(entry.logits, model, entry.values, answer, on=())
    assert lrp.conservation_error() < 1e-4 and plain.conservation_error() > 0.02
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias") and "dt_proj" not in name:
                p.zero_()
    entry = enter(model, x)
    lrp = relevance(entry.logits, model, entry.values, answer)
    assert float(lrp.absorbed.abs()) < 1e-6
    torch.testing.assert_close(lrp.relevance.sum(1), lrp.logit, rtol=1e-3, atol=1e-3 * float(lrp.logit.abs().mean()))


@pytest.mark.parametrize("kind", ["image", "language"])
def test_relevance_of_trained_models_beats_gradient_x_input(kind):
    model, x = trained(kind)
    entry = enter(model, x)
    with torch.no_grad():
        answer = entry.logits(entry.values).argmax(1)
    found = {
        m: deletion(entry, explain(entry, answer, m, steps=8), answer).delta
        for m in ("lrp", "gradient_x_input", "integrated_gradients")
    }
    assert found["lrp"] > max(found["gradient_x_input"], found["integrated_gradients"]), found


@pytest.mark.parametrize("name", ["adventurer", "mamba3", "spatial_mamba", "shuffle_mamba"])
def test_attention_maps_have_a_place_for_every_token(name):
    model, x = build(name)
    entry = enter(model, x)
    layers = attention_layers(entry, torch.tensor([0, 1]), 4)
    for method in ATTENTION_METHODS:
        assert attention_scores(entry, layers, method).shape == entry.values.shape[:2]
    released = class_row_scores(entry, layers)
    assert set(released) == (
        {"raw_cls_row", "rollout_cls_row", "attribution_cls_row"} if name == "shuffle_mamba" else set()
    )
    assert all(s.shape == (2, entry.values.shape[1] - 1) for s in released.values())


def test_without_biases_relevances_alone_sum_to_the_logit():
    model = ssmzoo.create_model("mamba", vocab_size=20, d_model=16, n_layer=2, ssm_cfg={"conv_bias": False}).eval()
    entry = enter(model, torch.randint(0, 20, (3, 12)))
    lrp = relevance(entry.logits, model, entry.values, torch.tensor([4, 5, 6]))
    torch.testing.assert_close(lrp.relevance.sum(1), lrp.logit, rtol=1e-3, atol=1e-6)


def test_partial_constants_and_bad_rules():
    model, x = noisy("mamba")
    entry = enter(model, x)
    with rules(constants=("A", "B")):
        values = entry.logits(entry.values)
    torch.testing.assert_close(values, entry.logits(entry.values), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="rules are act, scan, gate, norm"), rules(on=["skip"]):
        pass
    with pytest.raises(ValueError, match="float32 or float64"):
        relevance(entry.logits, model, entry.values.bfloat16(), torch.tensor([0, 0]))


@pytest.mark.parametrize("name", ["mamba", "mamba2", "vim", "vmamba"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_text_and_images(name, method):
    model, x = build(name)
    entry = enter(model, x)
    scores = explain(entry, torch.tensor([0, 1]), method, steps=2, max_channels=4)
    assert scores.shape == entry.values.shape[:2] and torch.isfinite(scores).all()
    if MODELS[name][1] == "image":
        assert entry.map(scores).shape == (2, *entry.grid)
    assert entry.patches(scores).shape[1] == scores.shape[1] - len(entry.special)


def test_integrated_gradients_are_complete():
    model, x = build("mamba")
    entry = enter(model, x)
    target = torch.tensor([1, 2])
    scores = explain(entry, target, "integrated_gradients", steps=64)
    gained = entry.logits(entry.values) - entry.logits(torch.zeros_like(entry.values))
    gained = gained.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(scores.sum(1), gained, rtol=64**-2, atol=0)  # the midpoint rule errs by some 1 / steps^2


class Picker(torch.nn.Module):
    """A language model whose logit 0 is the sum of known weights times its embeddings' first entry."""

    def __init__(self, weights):
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 3)
        self.register_buffer("weights", weights)

    def forward(self, ids):
        x = self.embedding(ids)[..., 0] * self.weights
        return torch.stack([x.sum(1), -x.sum(1)], dim=1)


def test_deletion_rewards_the_right_explanation():
    torch.manual_seed(0)
    model, ids = Picker(torch.arange(8.0)), torch.zeros(2, 8, dtype=torch.long)
    torch.nn.init.ones_(model.embedding.weight)
    entry, target = enter(model, ids), torch.tensor([0, 0])
    truth = torch.arange(8.0).expand(2, 8)
    assert deletion(entry, truth, target).delta > 0 > deletion(entry, -truth, target).delta
    assert torch.equal(remove(entry, truth, 0.0), entry.values)
    assert remove(entry, truth, 1.0)[:, :-1].abs().max() == 0  # the last token, where the model is read, stays
    positive, negative = perturbation(entry, truth, target)
    assert positive.shape == negative.shape == (9,) and (negative >= positive).all()


def test_segmentation_scores_have_known_values():
    truth = torch.zeros(1, 4, 4)
    truth[:, :2] = 1
    perfect = segmentation(truth.clone(), truth)
    assert perfect == (100, 100, 100, 100)
    assert segmentation(1 - truth, truth).pixel_accuracy == 0
    half = truth.clone()
    half[:, 1] = 0  # 4 of 8 foreground pixels found, 4 missed
    scores = segmentation(half, truth)
    assert scores.pixel_accuracy == 75 and scores.mean_iou == pytest.approx(100 * (4 / 8 + 8 / 12) / 2)
    found = average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]))
    assert found == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="resize the maps"):
        segmentation(truth[:, :2], truth)


def test_entry_says_when_there_is_none():
    with pytest.raises(ValueError, match="neither pos_drop nor patch_embed"):
        enter(torch.nn.Conv2d(3, 4, 1), torch.rand(1, 3, 4, 4))
