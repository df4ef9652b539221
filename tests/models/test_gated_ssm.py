"""Gated SSM and Hawk: published sizes, training from scratch, what the prefix may see, bad input."""

import math

import pytest
import torch
from torch.nn import functional as F

import ssmzoo
from ssmzoo.layers.decoder import reads_prefixes
from ssmzoo.models.hawk import MAX_SLOPE, HawkMixer, bounded_sqrt
from ssmzoo.train.optim import parameter_roles

both = pytest.mark.parametrize("name", ["gated_ssm", "hawk"])


@pytest.mark.parametrize("name, count", [("gated_ssm_1.4b", 1_258_981_376), ("hawk_1.4b", 1_248_770_048)])
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = ssmzoo.create_model(name)
        causal = ssmzoo.create_model(name, layer_pattern="C")
    assert sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel() == count
    assert sum(p.numel() for p in causal.parameters()) == sum(p.numel() for p in model.parameters())


@both
def test_untrained_loss_is_ln_v_and_every_parameter_learns(name):
    torch.manual_seed(0)
    model, ids = ssmzoo.create_model(name, vocab_size=256), torch.randint(256, (2, 64))
    loss = F.cross_entropy(model(ids[:, :-1], prefix=20).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.3
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@both
def test_nothing_before_a_label_sees_it(name):
    """Also with the prefix read both ways: a label changes what stands at and behind it."""
    torch.manual_seed(0)
    model = ssmzoo.create_model(name, vocab_size=32, d_model=16, d_state=8, n_layer=2).double()
    ids = torch.randint(32, (1, 10))
    for at in range(10):
        other = ids.clone()
        other[0, at] = (ids[0, at] + 1) % 32
        changed = (model(ids, prefix=6).logits - model(other, prefix=6).logits).abs().amax(-1)[0] > 0
        assert changed.tolist() == [at < 6 or t >= at for t in range(10)]


@both
def test_without_bidirectional_layers_a_prefix_is_refused(name):
    model = ssmzoo.create_model(name, vocab_size=32, d_model=16, d_state=8, n_layer=2, layer_pattern="C")
    assert not reads_prefixes(model)
    with pytest.raises(ValueError, match="reads in one direction only"):
        model(torch.zeros(1, 4, dtype=torch.long), prefix=2)


@both
@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_state": 0}, "d_state must be a positive integer, got 0"),
        ({"layer_pattern": "BX"}, "unknown letters X; known are B, C"),
        ({"layer_pattern": "BCC"}, "expected 2, one per layer, or a divisor"),
        ({"d_state": 1}, "shares its channels out to two directions"),
    ],
)
def test_bad_sizes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        ssmzoo.create_model(name, **{"vocab_size": 32, "d_model": 16, "d_state": 8, "n_layer": 2, **options})


def test_the_released_form_reads_one_way():
    with pytest.raises(ValueError, match="give layer_pattern=C"):
        ssmzoo.create_model("gated_ssm", vocab_size=32, form="released")
    with pytest.raises(ValueError, match="form is 'releasd'.*released"):
        ssmzoo.create_model("gated_ssm", vocab_size=32, form="releasd")


def test_what_decays_is_as_published():
    roles = parameter_roles(ssmzoo.create_model("gated_ssm", vocab_size=32))
    assert roles["blocks.0.layers.mixer.W_f.weight"] != "decay" == roles["blocks.0.layers.mixer.W_z.weight"]
    roles = parameter_roles(ssmzoo.create_model("hawk", vocab_size=32))
    assert [n for n, role in roles.items() if "rg_lru" in n and role == "decay"] == []


def test_decays_of_the_rg_lru_start_in_their_range():
    lam = HawkMixer(8, 4096).rg_lru.recurrent_param
    a = torch.exp(-8 * F.softplus(lam))
    assert 0.9 <= a.min() < 0.905 and 0.995 < a.max() <= 0.999
    assert abs(a.mean() - 0.9495) < 0.003


def test_the_square_root_is_exact_and_its_slope_bounded():
    x = torch.tensor([0.0, 1e-9, 1e-6, 0.25, 1.0], dtype=torch.float64, requires_grad=True)
    y = bounded_sqrt(x)
    torch.testing.assert_close(y, x.detach().sqrt())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope, (0.5 / x.detach().sqrt()).clamp(max=MAX_SLOPE))
    (forward,) = torch.func.jvp(bounded_sqrt, (x.detach(),), (torch.ones_like(x),))[1:]
    torch.testing.assert_close(forward, slope)


def test_the_published_convolution_looks_over_boundaries():
    torch.manual_seed(0)
    x, seq_idx = torch.randn(1, 6, 8), torch.tensor([[0, 0, 0, 1, 1, 1]])
    ours, published = HawkMixer(8, 6), HawkMixer(8, 6, conv_across_documents=True)
    published.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x, seq_idx=seq_idx)[0][:, 3:], ours(x[:, 3:])[0])
    assert (published(x, seq_idx=seq_idx)[0] - ours(x, seq_idx=seq_idx)[0])[:, 3:].abs().max() > 1e-3
