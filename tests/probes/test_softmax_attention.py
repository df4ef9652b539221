"""Softmax attention beside the scans: the same taps, maps, explanations and rules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import ssmzoo
from ssmzoo.probes import hidden_attention
from ssmzoo.probes.attention_matrices import attention, attention_rows, exactness
from ssmzoo.probes.entry import enter
from ssmzoo.probes.explain import ATTENTION_METHODS, attention_layers, attention_scores
from ssmzoo.probes.mamba_lrp import relevance
from ssmzoo.probes.subject import Subject
from ssmzoo.probes.tap import Attention, Scan, tap

HYBRID = dict(
    vocab_size=20,
    d_model=16,
    n_layer=3,
    ssm_cfg={"headdim": 8, "d_state": 8},
    attn_layer_idx=[1],
    attn_cfg={"num_heads": 4, "num_heads_kv": 2, "d_conv": 2, "rotary_emb_dim": 4},
)


def model_and_ids(name):
    torch.manual_seed(0)
    sizes = HYBRID if name == "mamba2" else dict(vocab_size=20, d_model=16, n_blocks=2, n_heads=2)
    return ssmzoo.create_model(name, **sizes).eval(), torch.randint(0, 20, (2, 9))


@pytest.mark.parametrize("name, kinds", [("transformer", [Attention] * 2), ("mamba2", [Scan, Attention, Scan])])
@torch.no_grad()
def test_attention_is_tapped_where_it_is_asked_for(name, kinds):
    model, ids = model_and_ids(name)
    plain = model(ids).logits
    with tap(model, attention=True) as found:
        torch.testing.assert_close(model(ids).logits, plain)
    assert [type(s) for s in found] == kinds
    for record in found:
        assert exactness(record) < 1e-5, record.name
        matrix = attention(record)
        assert torch.equal(matrix, matrix.tril())
        torch.testing.assert_close(attention_rows(record, [0, 4]), attention(record, False)[:, :, [0, 4]])
        if isinstance(record, Attention):
            torch.testing.assert_close(matrix.sum(-1), torch.ones(matrix.shape[:-1]))
            torch.testing.assert_close(attention(record.take([1]))[:, 0], matrix[:, 1])
    if name == "mamba2":
        with tap(model) as found:
            model(ids)
        assert [type(s) for s in found] == [Scan, Scan], "left out unless asked for"
    else:
        with pytest.raises(ValueError, match="ran no scan, so"), tap(model):
            model(ids)


@torch.no_grad()
def test_channels_rows_and_positions_of_attention():
    model, ids = model_and_ids("transformer")
    with tap(model, attention=True) as whole:
        model(ids)
    with tap(model, attention=True, layers=[1], channels=[9], rows=1, positions=[0, -1]) as found:  # heads of 8
        model(ids)
    (record,) = found
    assert record.channels.tolist() == [1] and record.q.shape == (1, 1, 2, 8)
    torch.testing.assert_close(record.weights(), whole[1].weights()[:1, 1:, [0, 8]])
    with pytest.raises(ValueError, match="needs every step"):
        attention(record)
    with pytest.raises(ValueError, match="heads"):
        whole[0].take([2])
    with pytest.raises(ValueError, match=r"positions \[9\]"), tap(model, attention=True, positions=[9]):
        model(ids)


@torch.no_grad()
def test_masks_are_taken_as_torch_takes_them():
    class Masked(nn.Module):
        def forward(self, q, k, v, mask):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)

    q, k, v = torch.randn(3, 2, 4, 5, 6)
    keep = torch.rand(2, 1, 5, 5) > 0.3
    keep |= torch.eye(5, dtype=torch.bool)
    for mask in (keep, torch.randn(1, 4, 5, 5), torch.randn(5, 5), None):
        with tap(model := Masked(), attention=True) as found:
            model(q, k, v, mask)
        assert exactness(found[0]) < 1e-5
        assert exactness(found[0].take([2])) < 1e-5


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_relevance_is_conserved_through_attention(name):
    model, ids = model_and_ids(name)
    entry = enter(model, ids)
    lrp = relevance(entry.logits, model, entry.values, torch.tensor([3, 4]))
    assert lrp.conservation_error() < 1e-4
    plain = relevance(entry.logits, model, entry.values, torch.tensor([3, 4]), on=())
    assert plain.conservation_error() > 1e-2


def test_attnlrp_shares_relevance_among_queries_keys_and_values():
    from ssmzoo.probes.lrp_rules import rules

    torch.manual_seed(0)
    tensors = [t.requires_grad_() for t in torch.randn(3, 2, 4, 5, 6)]
    plain = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).sum(), tensors)
    with rules(("attention",)):
        y = F.scaled_dot_product_attention(*tensors)
    assert torch.allclose(y, F.scaled_dot_product_attention(*tensors), atol=1e-6)
    for found, gradient, share in zip(torch.autograd.grad(y.sum(), tensors), plain, (0.25, 0.25, 0.5)):
        assert torch.allclose(found, share * gradient, atol=1e-6)


@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_raw_attention_rollout_and_attribution_take_both_kinds(name):
    model, ids = model_and_ids(name)
    entry = enter(model, ids)
    layers = attention_layers(entry, torch.tensor([3, 4]))
    assert len(layers.absolute) == (2 if name == "transformer" else 3)
    for method in ATTENTION_METHODS:
        scores = attention_scores(entry, layers, method)
        assert scores.shape == ids.shape and torch.isfinite(scores).all()
    finding = hidden_attention.probe(Subject(model, ids))
    assert {"token_maps", "channels", "explanations"} <= set(finding.figures)


def test_a_vit_of_timm_is_explained():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=3).eval()
    entry = enter(model, torch.rand(2, 3, 32, 32))
    assert entry.special == (0,) and entry.grid == (4, 4)
    layers = attention_layers(entry, torch.tensor([0, 1]))
    assert [type(s) for s in layers.scans] == [Attention, Attention]
    scores = attention_scores(entry, layers, "rollout")
    assert entry.map(scores).shape == (2, 4, 4)
    assert relevance(entry.logits, model, entry.values, torch.tensor([0, 1])).conservation_error() < 1e-3
