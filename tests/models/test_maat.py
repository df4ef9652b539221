"""MAAT and Anomaly Transformer against an independent transcription of their equations, and their special options."""

import math

import pytest
import torch
from torch.func import functional_call
from walker import check

import ssmzoo
from ssmzoo.models.anomaly_transformer import AnomalyTransformer
from ssmzoo.models.maat import MAAT
from ssmzoo.presets import build_model, read_model_config
from ssmzoo.released.family import family_of, to_official
from ssmzoo.tasks.objectives.association import anomaly_score, association_losses

SMALL = {"d_model": 12, "n_heads": 3, "e_layers": 2, "d_ff": 10}


def make(kind=MAAT, **more):
    torch.manual_seed(1)
    model = kind(4, **(SMALL | more)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4) if parameter.ndim > 1 else None
    return model, torch.randn(2, 15, 4, dtype=torch.float64)


def by_hand(model, x, mamba=True, gate=True, block=None, causal=True):
    """The card's equations point by point, from the model's tensors by name; the Mamba itself is the zoo's."""
    w = dict(model.state_dict())
    b, l, _ = x.shape
    h, d = 3, 12
    conv = w["embedding.value_embedding.tokenConv.weight"]
    z = sum(x.roll(1 - tap, 1) @ conv[:, :, tap].T for tap in range(3))
    z = z + w["embedding.position_embedding.pe"][0, :l]

    def linear(name, v):
        return v @ w[f"{name}.weight"].reshape(len(w[f"{name}.weight"]), -1).T + w[f"{name}.bias"]

    def norm(name, v):
        v = v - v.mean(-1, keepdim=True)
        return v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    series, prior = [], []
    for layer in range(2):
        at = f"encoder.attn_layers.{layer}"
        q, k, v = (linear(f"{at}.attention.{n}_projection", z).view(b, l, h, d // h) for n in ("query", "key", "value"))
        s = linear(f"{at}.attention.sigma_projection", z)
        S, P, y = (
            torch.zeros(b, h, l, l).double(),
            torch.zeros(b, h, l, l).double(),
            torch.zeros(b, l, h, d // h).double(),
        )
        for n in range(b):
            for head in range(h):
                for i in range(l):
                    sigma = 3 ** (1 / (1 + math.exp(-5 * s[n, i, head])) + 1e-5) - 1
                    seen = [
                        j for j in range(l) if (j <= i or not causal) and (block is None or j // block == i // block)
                    ]
                    a = torch.stack([q[n, i, head] @ k[n, j, head] for j in seen])
                    a = (a / math.sqrt(d // h) if block is None else a).exp()
                    S[n, head, i, seen] = a / a.sum()
                    y[n, i, head] = sum(S[n, head, i, j] * v[n, j, head] for j in seen)
                    for j in range(l):
                        P[n, head, i, j] = math.exp(-((i - j) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
        series, prior = [*series, S], [*prior, P]
        a = norm(f"{at}.norm1", z + linear(f"{at}.attention.out_projection", y.flatten(2)))
        inner = linear(f"{at}.conv1", a)
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        out = norm(f"{at}.norm2", a + linear(f"{at}.conv2", inner))
        if isinstance(model, MAAT):
            skip = norm("encoder.norm", (model.encoder.mamba(out)[0] if mamba else out) + z)
            g = torch.sigmoid(linear("encoder.gate", torch.cat([out, skip], -1))) if gate else 1.0
            z = g * skip + (1 - g) * out
        else:
            z = out
    return linear("projection", norm("encoder.norm", z)), series, prior


@pytest.mark.parametrize(
    "kind, options, how",
    [
        (MAAT, {}, {}),
        (MAAT, {"attention": "sparse", "causal": False, "block_size": 5}, {"block": 5, "causal": False}),
        (MAAT, {"attention": "sparse", "causal": True, "block_size": 5}, {"block": 5}),
        (MAAT, {"mamba": False}, {"mamba": False}),
        (MAAT, {"gate": False}, {"gate": False}),
        (AnomalyTransformer, {}, {"causal": False}),
    ],
    ids=["released", "sparse", "sparse causal", "no mamba", "no gate", "anomaly transformer"],
)
@torch.no_grad()
def test_equals_its_equations(kind, options, how):
    model, x = make(kind, **options)
    expected = by_hand(model, x, **how)
    out = model(x)
    for got, wanted in zip((out.reconstruction, *out.series, *out.prior), (expected[0], *expected[1], *expected[2])):
        assert (got - wanted).norm() < 1e-9 * wanted.norm()


def test_both_losses_and_the_score_equal_their_definition_point_by_point():
    model, x = make()
    out = model(x)

    def kl(p, q):
        return (p * ((p + 1e-4).log() - (q + 1e-4).log())).sum(-1).mean(1)

    losses = association_losses(out, x, k=3.0)
    rows = [(s, p / p.sum(-1, keepdim=True)) for s, p in zip(out.series, out.prior)]
    sg = torch.Tensor.detach
    series = sum(kl(s, sg(p)).mean() + kl(sg(p), s).mean() for s, p in rows) / 2
    prior = sum(kl(p, sg(s)).mean() + kl(sg(s), p).mean() for s, p in rows) / 2
    rec = torch.nn.functional.mse_loss(out.reconstruction, x)
    parameters = list(model.parameters())
    for got, wanted in ((losses.loss1, rec - 3 * series), (losses.loss2, rec + 3 * prior)):
        assert torch.isclose(got, wanted)
        ours, theirs = (torch.autograd.grad(v, parameters, retain_graph=True, allow_unused=True) for v in (got, wanted))
        for a, b in zip(ours, theirs):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-12))
    weight = torch.softmax(-50 * sum(kl(s, p) + kl(p, s) for s, p in rows), -1)
    assert torch.allclose(anomaly_score(out, x), weight * (out.reconstruction - x).square().mean(-1))


def test_the_series_loss_trains_queries_and_the_prior_loss_widths():
    model, x = make(e_layers=1)
    losses = association_losses(model(x), x)
    attention = model.encoder.attn_layers[0].attention
    for loss, still, moved in (
        (losses.series, attention.sigma_projection, attention.query_projection),
        (losses.prior, attention.query_projection, attention.sigma_projection),
    ):
        a, b = torch.autograd.grad(loss, (still.weight, moved.weight), retain_graph=True, allow_unused=True)
        assert a is None and b.norm() > 0


def test_a_key_bias_has_no_gradient_and_every_other_parameter_has_one():
    model, x = make()
    losses = association_losses(model(x), x)
    (losses.loss1 + losses.loss2 + anomaly_score(model(x), x).square().sum()).backward()
    for name, parameter in model.named_parameters():
        small = parameter.grad.norm() < 1e-12 * model.encoder.attn_layers[0].attention.key_projection.weight.grad.norm()
        assert bool(small) == name.endswith("key_projection.bias"), name


def test_positions_are_sines_and_cosines():
    table = make(d_model=12)[0].embedding.position_embedding.pe[0]
    for i in range(0, 12, 2):
        angle = torch.arange(5000.0, dtype=torch.float64) / 10000 ** (i / 12)
        assert (table[:, i] - angle.sin()).abs().max() < 1e-6 and (table[:, i + 1] - angle.cos()).abs().max() < 1e-6


def test_one_mamba_norm_and_gate_serve_all_layers():
    deep, shallow = (sum(p.numel() for p in MAAT(4, **(SMALL | {"e_layers": n})).parameters()) for n in (3, 1))
    layer = sum(p.numel() for p in MAAT(4, **SMALL).encoder.attn_layers[0].parameters())
    assert deep - shallow == 2 * layer


def test_published_sizes():
    """From the released code at 38 channels, which owns a norm per layer that nothing calls (512 and 512 values)."""
    unused = 3 * 2 * 512
    with torch.device("meta"):
        assert sum(p.numel() for p in MAAT(38).parameters()) + unused == 7_023_166
        assert sum(p.numel() for p in AnomalyTransformer(38).parameters()) + unused == 4_828_222


def test_the_convolution_starts_as_the_card_says():
    weight = MAAT(40, d_model=256).embedding.value_embedding.tokenConv.weight
    assert abs(weight.std() / math.sqrt(2 / (1 + 0.01**2) / (40 * 3)) - 1) < 0.05 and weight.mean().abs() < 0.01


@pytest.mark.parametrize("kind", [MAAT, AnomalyTransformer])
def test_official_files_come_and_go(kind):
    model = kind(5, **SMALL)
    official = to_official("maat", model, win_size=15, enc_in=5, c_out=5)
    assert family_of(official) == "maat" and official["encoder.attn_layers.0.attention.norm.weight"].shape == (12,)
    wrapped = {f"module.{k}": v for k, v in official.items()}  # as DataParallel saves them
    x = torch.randn(2, 15, 5)
    loaded = ssmzoo.load_official({k.removeprefix("module."): v for k, v in wrapped.items()}, dropout=0.0)
    reconstruction, series, prior, sigma = loaded(x)
    assert torch.allclose(reconstruction, model.eval()(x).reconstruction) and sigma[0].shape == prior[0].shape
    with pytest.raises(ValueError, match="c_out=3 and enc_in=5"):
        ssmzoo.load_official(
            "maat", official | {"projection.weight": torch.zeros(3, 12), "projection.bias": torch.zeros(3)}
        )


def test_sizes_that_do_not_fit_are_refused_in_words():
    for options, words in (
        ({"n_heads": 5}, "choose one of"),
        ({"attention": "sprase"}, "choose one of full, sparse"),
        ({"activation": "silu"}, "choose one of gelu, relu"),
    ):
        with pytest.raises(ValueError, match=words):
            MAAT(4, **(SMALL | options))
    sparse, x = make(attention="sparse", block_size=10)
    with pytest.raises(ValueError, match="multiple of block_size = 10, got 15; .* such as 5"):
        sparse(x)
    with pytest.raises(ValueError, match=r"\(batch, length, 4 channels\), got \(2, 15, 3\)"):
        sparse(x[..., :3])


@pytest.mark.parametrize("name", ["maat", "anomaly_transformer"])
def test_adapters_and_hooks_act_on_every_module(name):
    node = read_model_config(name)["model"] | SMALL | {"enc_in": 4, "e_layers": 1}
    torch.manual_seed(0)
    model = build_model(node).double().eval()
    x = torch.randn(2, 8, 4, dtype=torch.float64)

    def out(*parts):
        return torch.cat([t.flatten(1) for part in parts for t in (part.reconstruction, *part.series, *part.prior)], 1)

    passes = {
        "one": lambda: out(model(x)),
        "func": lambda: out(functional_call(model, dict(model.named_parameters()), (x,))),
    }
    assert not check(model, passes)
