"""Based and JRT-RNN: published sizes, initial values, windows, and how padding and prefixes are read."""

import math

import pytest
import torch

import ssmzoo
from ssmzoo.layers.mixers.sliding_attention import SlidingAttention
from ssmzoo.models.based import BasedLM, TaylorAttention
from ssmzoo.models.jrt_rnn import JRTRNNLM, PrefixLinearAttention
from ssmzoo.presets import read_model_config

TINY = {"vocab_size": 29, "d_model": 16, "n_heads": 2, "d_ff": 8, "feature_dim": 3, "n_positions": 0}


@pytest.mark.parametrize("name, parameters", [("based_360m", 364_718_080), ("based_1b", 1_353_123_072)])
def test_published_parameter_counts(name, parameters):
    with torch.device("meta"):
        model = ssmzoo.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name, base, layers", [("jrt_rnn_360m", "based_360m", 26), ("jrt_rnn_1b", "based_1b", 36)])
def test_prefix_linear_attention_stands_where_based_has_taylor(name, base, layers):
    pattern = read_model_config(name)["model"]["layer_pattern"]
    assert pattern.replace("P", "T") == read_model_config(base)["model"]["layer_pattern"][:layers]
    with torch.device("meta"):
        model = ssmzoo.create_model(name)
    assert len(model.lm_head.weight) == 50264 and model.mask_token == 50263 and len(model.backbone.layers) == layers


def test_initial_values():
    torch.manual_seed(0)
    model = BasedLM(**TINY | {"vocab_size": 1000, "d_model": 64}, n_layer=6, layer_pattern="CTS")
    for name, p in model.named_parameters():
        near = min(0.1, 4 / math.sqrt(2 * p.numel()))  # four standard errors of a deviation
        if name.endswith(("out_proj.weight", "fc2.weight")):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(12), rel=near), name
        elif name.endswith("bias"):
            assert not p.any(), name
        elif p.ndim == 2:
            assert p.std().item() == pytest.approx(0.02, rel=near), name
    ids = torch.randint(1000, (2, 20))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - math.log(1000)) < 0.3


@pytest.mark.parametrize("window", [1, 2, 5, 70])
def test_a_window_is_attention_under_a_band(window):
    torch.manual_seed(0)
    layer, x = SlidingAttention(16, 2, window).double(), torch.randn(2, 150, 16, dtype=torch.float64)
    layer.rope = False
    q, k, v = layer.Wqkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    band = (distance >= 0) & (distance < window)
    y = torch.softmax((q @ k.mT / 8**0.5).masked_fill(~band, -math.inf), -1) @ v
    assert torch.allclose(layer(x)[0], layer.out_proj(y.transpose(1, 2).flatten(2)))


def test_memory_of_a_window_does_not_grow_with_the_length():
    layer = SlidingAttention(16, 2, 9)
    kept = []
    for l in (512, 1024):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            _, state = layer(torch.randn(1, l, 16, requires_grad=True))
        kept.append(sum(sizes))
        assert state.k.shape[1] == 8
    assert kept[1] < 2.1 * kept[0]


def test_positions_behind_the_table_are_refused_in_words():
    model = BasedLM(**TINY | {"n_positions": 6}, n_layer=3, layer_pattern="CTS")
    out = model(torch.zeros(2, 5, dtype=torch.long))
    model(torch.zeros(2, 1, dtype=torch.long), out.state)
    with pytest.raises(ValueError, match="reaches position 6, the model has learned positions for 6 tokens"):
        model(torch.zeros(2, 2, dtype=torch.long), out.state)


def test_padding_as_published_keeps_a_weight_of_one():
    torch.manual_seed(0)
    layer = PrefixLinearAttention(8, 2, 3, exact_mask=False)
    exact = PrefixLinearAttention(8, 2, 3)
    exact.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 6, 8), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    prefix = mask.sum(1)
    published, y = layer(x, mask=mask, prefix=prefix)[0], exact(x, mask=mask, prefix=prefix)[0]
    assert torch.allclose(published[1], y[1]) and not torch.allclose(published[0, 2:], y[0, 2:], atol=1e-3)
    alone = exact(x[:1, 2:], prefix=prefix[:1])[0]
    assert torch.allclose(y[0, 2:], alone[0], atol=1e-6)


def test_a_prefix_costs_nothing_per_token_and_counts_twice():
    torch.manual_seed(0)
    layer = PrefixLinearAttention(8, 2, 3).double()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    _, with_prefix = layer(x, prefix=torch.tensor([4]))
    _, without = layer(x)
    assert with_prefix.sums.shape == without.sums.shape
    ones = [s.sums[..., 0, -1] for s in (with_prefix, without)]  # the sum of the constant feature counts keys
    assert torch.allclose(ones[0], torch.full_like(ones[0], 11.0)) and torch.allclose(ones[1], ones[1] * 0 + 7)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: BasedLM(**TINY, n_layer=3, layer_pattern="CTS", window=0), "window = 0; it must be at least 1"),
        (lambda: BasedLM(**TINY, n_layer=3, layer_pattern="CXS"), "unknown letters X; known are C, T, S"),
        (lambda: BasedLM(**TINY, n_layer=4, layer_pattern="CTS"), "has 3 letters; expected 4"),
        (lambda: BasedLM(**TINY | {"n_heads": 3}, n_layer=1, layer_pattern="S"), "n_heads = 3 does not cut"),
        (lambda: TaylorAttention(16, 2, 0), "feature_dim be positive"),
        (lambda: JRTRNNLM(**TINY, n_layer=2, layer_pattern="CS"), "has no P"),
    ],
)
def test_bad_sizes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_bad_prefixes_are_named():
    model = JRTRNNLM(**TINY, n_layer=2, layer_pattern="CP")
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"prefix = 6 must lie in 0..\[5, 5\]"):
        model(ids, prefix=6)
    with pytest.raises(ValueError, match="does not go with state"):
        model(ids, model(ids).state, prefix=2)
    with pytest.raises(ValueError, match="BasedLM reads in one direction only"):
        BasedLM(**TINY, n_layer=3, layer_pattern="CTS")(ids, prefix=2)
