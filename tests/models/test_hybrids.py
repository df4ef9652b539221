"""Striped hybrids, lightning attention and the models of the gated delta rule: patterns, sizes, published numbers."""

import math

import pytest
import torch

import ssmzoo
from ssmzoo.layers.mixers.gated_delta import GatedDeltaNet, KimiDeltaAttention
from ssmzoo.layers.state import map_state, state_bytes
from ssmzoo.models.gated_deltanet import GatedDeltaNetLM, KimiDeltaLM
from ssmzoo.models.hybrid import MIXERS, HybridLM
from ssmzoo.models.lightning import LightningAttention, slopes
from ssmzoo.ops import ssd_scan

V = 64
PRESETS = ["gated_deltanet", "kda", "mamba_hybrid", "mamba_hybrid_moe", "mamba2_hybrid", "lightning"]
SMALL = dict(vocab_size=V, d_model=32, n_layer=6, head_dim=8, d_ff=16)


def published(*shape, p):
    return torch.sin(0.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + p).reshape(shape)


def test_numbers_of_the_published_lightning_attention():
    q, k, v = (torch.nn.functional.silu(published(1, 5, 2, 2, p=p)) for p in range(3))
    s = slopes(2, 1, 4).double()
    torch.testing.assert_close(s, torch.tensor([0.041667, 0.002604]).double(), rtol=0, atol=1e-6)
    y, _ = ssd_scan(v, -s.expand(1, 5, 2), k, q)
    last = torch.tensor([[-0.325075, -0.209570], [0.287883, 0.026989]]).double()
    torch.testing.assert_close(y[0, 4], last, rtol=0, atol=1e-6)
    assert abs(float(y.sum()) - 0.553272) < 2e-6


def test_lightning_attention_by_its_equations():
    torch.manual_seed(0)
    mixer = LightningAttention(6, 2, head_dim=4, layer=1, n_layer=3).double()
    x = torch.randn(1, 5, 6).double()
    q, k, v = torch.nn.functional.silu(mixer.in_proj(x)).view(5, 2, 3, 4).unbind(2)  # (l h p)
    S, rows = torch.zeros(2, 4, 4).double(), []
    for t in range(5):
        S = (-mixer.slopes).exp()[:, None, None] * S + k[t, :, :, None] * v[t, :, None, :]
        rows.append((S * q[t, :, :, None]).sum(1).flatten())
    o = torch.stack(rows)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mixer.norm.weight
    expected = mixer.out_proj(mixer.gate(x)[0].sigmoid() * o)
    torch.testing.assert_close(mixer(x)[0][0], expected)


@pytest.mark.parametrize("kind", [GatedDeltaNet, KimiDeltaAttention])
@pytest.mark.parametrize("twice", [False, True])
def test_the_delta_mixers_by_their_equations(kind, twice):
    torch.manual_seed(0)
    mixer = kind(6, num_heads=2, head_dim=3, expand_v=2, conv_size=2, allow_neg_eigval=twice).double()
    x = torch.randn(1, 5, 6).double()
    qkv, gate, beta, decay = mixer.in_proj(x)[0].split(mixer.widths, -1)
    kernel = mixer.conv1d.weight[:, 0]  # (c 2)
    before = torch.cat([torch.zeros_like(qkv[:1]), qkv[:-1]])
    q, k, v = torch.nn.functional.silu(qkv * kernel[:, 1] + before * kernel[:, 0]).split([6, 6, 12], -1)
    q, k = (t.view(5, 2, 3) / (t.view(5, 2, 3).square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    if kind is KimiDeltaAttention:
        g = -mixer.A_log.exp()[:, None] * torch.nn.functional.softplus(mixer.f_proj(decay) + mixer.dt_bias).view(
            5, 2, 3
        )
        act = mixer.g_proj(gate).view(5, 2, 6).sigmoid()
    else:
        g = (-mixer.A_log.exp() * torch.nn.functional.softplus(decay + mixer.dt_bias))[..., None]
        act = torch.nn.functional.silu(gate.view(5, 2, 6))
    S, rows = torch.zeros(2, 3, 6).double(), []
    for t in range(5):
        S = g[t].exp()[..., None] * S
        error = v[t].view(2, 6) - torch.einsum("hnp,hn->hp", S, k[t])
        S = S + (1 + twice) * beta[t].sigmoid()[:, None, None] * k[t, :, :, None] * error[:, None, :]
        rows.append(torch.einsum("hnp,hn->hp", S, q[t] / math.sqrt(3)))
    o = torch.stack(rows)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0][0], mixer.out_proj((o * act).flatten(1)))


@pytest.mark.parametrize("name", PRESETS)
def test_an_untrained_preset_knows_nothing(name):
    torch.manual_seed(0)
    model = ssmzoo.create_model(name, vocab_size=V)
    ids = torch.randint(V, (4, 33))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss.detach()) - math.log(V)) < 0.3
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", PRESETS)
def test_the_state_is_as_large_as_the_mixers_tell(name):
    model, held = ssmzoo.create_model(name, vocab_size=V).eval(), []
    with torch.no_grad():
        map_state(lambda t: held.append(t.numel() * t.element_size()), model(torch.zeros(1, 40).long()).state)
    assert state_bytes(model, 40) == sum(held)


@pytest.mark.parametrize("kind", [GatedDeltaNetLM, KimiDeltaLM])
def test_published_sizes(kind):
    with torch.device("meta"):
        count = sum(p.numel() for p in kind().parameters())
    assert 1.2e9 < count < 1.5e9, f"{kind.__name__} of fla's defaults has {count:,} parameters"


def test_letters_stand_where_the_pattern_says_and_experts_in_every_second_layer():
    model = HybridLM(**SMALL, layer_pattern="MSDKLA", n_experts=3)
    assert [type(block.layers["mixer"]) for block in model.blocks] == list(MIXERS.values())
    assert [type(block.layers["ff"]).__name__ for block in model.blocks] == ["GatedMLP", "MoE"] * 3
    assert float(model(torch.zeros(2, 5).long()).aux["load_balancing_loss"].detach()) > 0


@pytest.mark.parametrize("pattern", ["M", "MMA", "LLLLLA", "SD", "KA"])
@pytest.mark.parametrize("experts", [0, 3])
def test_patterns_are_compared_at_equal_parameters(pattern, experts):
    model = HybridLM(**SMALL | {"layer_pattern": pattern}, n_experts=experts, parameters=150_000)
    assert abs(sum(p.numel() for p in model.parameters()) / 150_000 - 1) < 0.01


def test_the_residual_of_minimax():
    torch.manual_seed(0)
    model = HybridLM(**SMALL | {"n_layer": 1}, layer_pattern="L", alpha=1.5).eval()
    x, block = torch.randn(1, 4, 32), model.blocks[0]
    n = block.norms["mixer"](x)
    y = 1.5 * n + block.layers["mixer"](n)[0]
    n = block.norms["ff"](y)
    torch.testing.assert_close(block(x)[0], 1.5 * n + block.layers["ff"](n))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_pattern": "MX"}, "unknown letters X; known are M, S, D, K, L, A"),
        ({"layer_pattern": "MMMA"}, "has 4 letters; expected 6"),
        ({"mixers": {"Q": {}}}, "mixers has unknown letters Q; known are M, S, D, K, L, A"),
        ({"layer_pattern": "MA", "head_dim": 5}, "head_dim = 5 must divide d_model = 32"),
        ({"parameters": 1000}, "leaves nothing for the feed-forward layers"),
        ({"n_experts": 2, "top_k": 3}, "top_k = 3 experts per token, but there are n_experts = 2"),
        ({"moe_every": 0}, "moe_every >= 1"),
    ],
)
def test_bad_hybrids_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        HybridLM(**SMALL | {"layer_pattern": "M"} | change)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer_pattern": "DA"}, "give attn_cfg \\(at least num_heads\\)"),
        ({"layer_pattern": "DM"}, "unknown letters M; known are D, A"),
        ({"num_heads": 2, "num_v_heads": 3}, "num_v_heads a multiple of num_heads"),
        ({"head_dim": 0}, "positive sizes"),
    ],
)
def test_bad_delta_models_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        GatedDeltaNetLM(**{"vocab_size": V, "d_model": 16, "n_layer": 2, "num_heads": 2, "head_dim": 4} | change)


def test_a_negative_eigenvalue_is_parity():
    """With beta = 2 on ones and 0 on zeros, and one key, the state's sign is the parity of the ones."""
    ones = torch.randint(2, (3, 50)).double()
    k = torch.ones(3, 50, 1, 1).double()
    nothing = torch.zeros(3, 50, 1, 1).double()
    y, _ = ssmzoo.ops.gated_delta_rule(
        k, k, nothing, nothing[..., 0], 2 * ones[..., None], torch.ones(3, 1, 1, 1).double()
    )
    torch.testing.assert_close(y[..., 0, 0], 1 - 2 * (ones.cumsum(1) % 2))
