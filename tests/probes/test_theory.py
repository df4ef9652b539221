"""Token dynamics, polynomials, bounds, dynamical systems, memory and recall: what the papers derive holds."""

import math

import numpy as np
import pytest
import torch
from paths import GOLDEN
from test_attention import build

import ssmzoo
from ssmzoo.models.token_dynamics import SCENARIOS, Scenario, soft_sort
from ssmzoo.probes import dsf, polynomial, recall
from ssmzoo.probes.dsf_layers import QLSTM, S6, LinearAttention, NormalizedAttention, ScalarS6, SoftmaxAttention
from ssmzoo.probes.entry import enter
from ssmzoo.probes.free_a_ssm import FreeAClassifier, FreeASSM
from ssmzoo.probes.generalization_bound import (
    constants,
    decay_rate,
    length_factor,
    measured_gap,
    output_bound,
    stability,
    worst_case,
)
from ssmzoo.probes.majority import excerpts, majority, prose_and_code, train_majority
from ssmzoo.probes.memory import channel_memory, gradient_influence, memory_length, substitution_influence
from ssmzoo.probes.receptive_field import receptive_field
from ssmzoo.probes.separation import fit
from ssmzoo.probes.tap import tap
from ssmzoo.probes.token_dynamics import criterion, field, growth, integrate, io_spectrum, trajectories

# ---- token dynamics


def one_dimension(mu, S_dt, x0, until):
    x = torch.tensor(x0, dtype=torch.float64)[:, None]
    one = torch.ones(1, 1, dtype=torch.float64)
    return integrate(x, mu * one, one, torch.tensor([S_dt], dtype=torch.float64), until=until, dt=5.0)


def test_one_dimensional_tokens_converge_like_one_over_root_t():
    times, path = one_dimension(-1.0, 1.0, (1, 0.5, -0.7), 400.0)
    assert path[-1, :, 0].tolist() == pytest.approx([0.041, 0.030, -0.031], abs=6e-4)
    assert (path[-1].sign() == path[0].sign()).all()  # no token changes its sign


def test_one_dimensional_tokens_diverge_fast_or_slowly():
    times, path = one_dimension(1.0, 1.0, (0.4, 0.3, 0.2), 100.0)
    assert float(times[-1]) == pytest.approx(2.9, abs=0.1) and float(path[-1].abs().max()) >= 1e6
    _, path = one_dimension(1.0, -1.0, (0.4, 0.5, 0.6), 2000.0)
    assert path[-1, :, 0].tolist() == pytest.approx([15.6, 95.8, 327], rel=0.02)


def test_mu_of_a_channel_is_the_diagonal_and_mamba2_has_a_criterion():
    torch.manual_seed(0)
    model = ssmzoo.create_model("mamba", vocab_size=16, d_model=16, n_layer=1)
    (found,) = criterion(model)
    S_B, S_C = model.backbone.layers[0].mixer.x_proj.weight.detach().double()[-32:].split(16)
    torch.testing.assert_close(found.channels, (S_C.T @ S_B).diagonal())
    found = criterion(
        ssmzoo.create_model(
            "mamba2", vocab_size=16, d_model=16, n_layer=2, ssm_cfg={"headdim": 8, "d_state": 8, "ngroups": 2}
        )
    )
    assert len(found) == 4 and all(len(c.eigenvalues) == 8 and len(c.channels) == 16 for c in found)


def test_a_model_keeps_its_scenario_in_steps():
    torch.manual_seed(0)
    model = ssmzoo.create_model("mamba_scenario", vocab_size=16, d_model=16, n_layer=1, scenario="divergent")
    assert {c.scenario for c in criterion(model)} == {"divergent"}
    ids = torch.randint(0, 16, (2, 7))
    with torch.no_grad():
        whole = model.eval()(ids).logits
        _, state, _ = model(ids[:, :5])
        for t in (5, 6):
            step, state, _ = model(ids[:, t : t + 1], state)
            torch.testing.assert_close(step[:, 0], whole[:, t], atol=1e-5, rtol=1e-4)


def test_field_is_the_scan_of_a_layer():
    torch.manual_seed(0)
    d, n, l = 3, 2, 5
    S_C, S_B, S_dt, x = torch.randn(n, d), torch.randn(n, d), torch.randn(d), torch.randn(l, d)
    step = torch.nn.functional.softplus(x @ S_dt)
    y = ssmzoo.ops.selective_scan_fn(
        x.T[None], step.expand(1, d, l), -torch.ones(d, n), (x @ S_B.T).T[None], (x @ S_C.T).T[None]
    )
    torch.testing.assert_close(field(x, S_C, S_B, S_dt), y[0].T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scenario, positive", list(zip(SCENARIOS, (1.0, 0.0, 0.5))))
def test_parametrised_models_have_the_scenario_and_train_within_it(scenario, positive):
    torch.manual_seed(0)
    model = ssmzoo.create_model("mamba_scenario", vocab_size=16, d_model=16, n_layer=2, scenario=scenario)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ids = torch.randint(0, 16, (2, 8))
    loss = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten())
    loss.backward()
    optimizer.step()
    found = criterion(model)
    assert [c.scenario for c in found] == [scenario] * 2 and {c.positive for c in found} == {positive}
    with pytest.raises(ValueError, match="expected one of divergent"):
        Scenario("upwards", 1, 4)


def test_small_spectrum_equals_the_large_one():
    torch.manual_seed(1)
    weight = torch.randn(2 + 8, 12, dtype=torch.float64)
    S_B, S_C = weight[2:6], weight[6:]
    large = torch.linalg.eigvals(S_C.T @ S_B).real
    large = large[large.abs().argsort(descending=True)[:4]].sort().values
    torch.testing.assert_close(io_spectrum(weight, 2), large)


def test_token_norms_of_a_model_without_scans():
    names, path = trajectories(
        ssmzoo.create_model("transformer", vocab_size=16, d_model=12, n_blocks=2, n_heads=2),
        torch.randint(0, 16, (2, 6)),
    )
    assert len(names) == 4 and path[0].shape == (2, 6, 12) and growth(path).shape == (6,)


def test_trajectories_follow_the_residual_stream():
    model = ssmzoo.create_model("mamba", vocab_size=16, d_model=16, n_layer=3).eval()
    ids = torch.randint(0, 16, (2, 6))
    names, path = trajectories(model, ids)
    assert len(names) == 3
    torch.testing.assert_close(path[0], model.backbone.embedding(ids))
    with pytest.raises(ValueError, match="no scan with an x_proj"):
        criterion(ssmzoo.create_model("sd_ssm", input_size=3, num_classes=2))


def test_soft_sort_sorts_when_cold():
    v = torch.tensor([[0.3, 2.0, -1.0]], requires_grad=True)
    P = soft_sort(v, tau=1e-3, hard=True)
    torch.testing.assert_close((P @ v[..., None])[0, :, 0], torch.tensor([2.0, 0.3, -1.0]))
    P[0, 0, 1].backward()
    assert v.grad is not None and torch.allclose(soft_sort(v, tau=0.7).sum(-1), torch.ones(1, 3))


# ---- polynomials


CENSUS = [  # layer, options, length -> degree, degree per token, tokens per monomial, monomials
    ("s6", dict(order=1), 6, 9, [3, 3, 3, 3, 3, 4], 6, 63),
    ("s6", dict(order=2), 4, 10, [3, 3, 3, 4], 4, 40),
    ("s6", dict(order=1, write_step=False), 6, 8, [2, 2, 2, 2, 2, 3], 6, 63),
    ("s6", dict(order=0), 6, 4, [3, 3, 3, 3, 3, 4], 2, 6),
    ("s6", dict(constant=True), 6, 1, [1] * 6, 1, 6),
    ("linear_attention", {}, 6, 3, [2, 2, 2, 2, 2, 3], 2, 6),
]


def test_layers_have_the_derived_degrees():
    for kind, options, length, *expected in CENSUS:
        found = polynomial.census(polynomial.rational_layer(kind, **options), length)
        assert list(found[:4]) == expected, (kind, options)
    two = polynomial.stacked([polynomial.rational_layer("linear_attention", seed=s) for s in (1, 2)])
    assert list(polynomial.census(two, 4)[:2]) == [9, [8, 8, 8, 9]]


def test_degrees_along_a_ray_and_interactions():
    x = np.random.default_rng(0).normal(size=(8, 3))
    s6, attention = polynomial.random_layer("s6", 3, 2), polynomial.random_layer("linear_attention", 3, 2)
    assert polynomial.total_degree(s6, x) == 11 and polynomial.total_degree(attention, x) == 3
    assert polynomial.token_degrees(s6, x) == [3] * 7 + [4] and polynomial.token_degrees(attention, x) == [2] * 7 + [3]
    x = np.random.default_rng(1).normal(size=(6, 2))
    assert polynomial.interaction_order(polynomial.random_layer("s6", 2, 2), x) == 6
    assert polynomial.interaction_order(polynomial.random_layer("linear_attention", 2, 2), x) == 2
    with pytest.raises(ValueError, match="no polynomial of degree below nodes"):
        polynomial.degree(abs)
    assert polynomial.separation(27)[1:3] == (3, 4)


@pytest.mark.slow
def test_one_s6_layer_learns_a_product_that_one_linear_attention_layer_does_not():
    assert fit("s6", 3, steps=1500)[1] < 0.5 * fit("linear_attention", 3, steps=1500)[1]


# ---- the bound


def test_constants_are_those_of_the_released_code():

    from ssmzoo.released.golden import GoldenCase

    for file in sorted((GOLDEN / "generalization_bound").glob("*.json")):
        case = GoldenCase.load(file)
        from ssmzoo.verify import generalization_bound

        model, state = generalization_bound.official(dict(case.params), **case.official_kwargs)
        model.load_state_dict(state)
        assert constants(model.ssm, model.embedding.weight) == pytest.approx(case.meta["constants"], rel=1e-5)


def test_length_factor_and_output_bound():
    T = torch.tensor([1, 10, 1000])
    assert length_factor(1.0, T).tolist() == [1, 10, 1000]
    assert length_factor(0.5, T).tolist() == pytest.approx([1, (1 - 0.5**10) * 2, 2])
    assert decay_rate(-1.0, 0.0, 0.0, 0.0) == pytest.approx(0.5) and decay_rate(1.0, 0.0, 0.0, 0.0) == pytest.approx(2)
    for s_A in (-0.5, 0.01):
        torch.manual_seed(0)
        ssm, table = FreeASSM(4, 3, s_A), torch.randn(5, 4)
        with torch.no_grad():
            y = ssm(table[torch.randint(0, 5, (64, 20))]).norm(dim=-1).amax(0)
        bound = output_bound(ssm, table, torch.arange(1, 21))
        assert (y.double() <= 2 * bound).all()  # the norm of 4 channels is at most twice the largest


def test_stability_of_a_trained_layer_and_overflow_of_a_free_one():
    model = ssmzoo.create_model("mamba", vocab_size=16, d_model=16, n_layer=1).eval()
    with tap(model) as scans, torch.no_grad():
        model(torch.randint(0, 16, (2, 20)))
    found = stability(scans[0])
    assert found.s_A < 0 < found.rho < 1 and float(found.histogram.sum()) == pytest.approx(1)
    with pytest.raises(FloatingPointError, match="s_A = 50"):
        FreeAClassifier(3, s_A=50.0)(torch.zeros(1, 200, dtype=torch.long))


def test_decays_by_norms_bound_those_on_data_and_the_gap_is_measured():
    torch.manual_seed(0)
    model = ssmzoo.create_model("vim", in_chans=1, num_classes=3, img_size=16).eval()
    with tap(model) as scans, torch.no_grad():
        model(torch.rand(2, 1, 16, 16))
    for scan in scans:
        found = worst_case(scan, model.get_submodule(scan.name))
        assert len(found) == 2 and max(w.rho for w in found) >= stability(scan).rho
        assert all(0 < w.rho < 1 and w.limit >= 1 for w in found)

    class Known(torch.nn.Module):
        """Certain of the ids below 4, uniform over 8 otherwise."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            return torch.where(torch.arange(8) < 4, 50.0, 0.0).expand(*ids.shape, 8)

    draw = torch.Generator().manual_seed(0)
    train, other = (torch.randint(low, low + 4, (200,), generator=draw) for low in (0, 4))
    gap = measured_gap(Known(), train, other, [2, 16], sequences=8)
    torch.testing.assert_close(gap.train, torch.full((2,), math.log(4.0), dtype=torch.float64), atol=1e-4, rtol=0)
    assert (gap.validation - gap.train > 49).all()
    with pytest.raises(ValueError, match="sequences of 300 tokens"):
        measured_gap(Known(), train, other, [300])


def test_majority_strings_and_one_epoch():
    ids, label = majority(200, 21, torch.Generator().manual_seed(0))
    assert torch.equal(label, (ids.sum(1) > 10.5).float())
    point = train_majority(10, epochs=2, samples=128)
    assert len(point.s_A_path) == 2 and 0 <= point.test <= 100 and math.isfinite(point.gap)
    with pytest.raises(ValueError, match="expected one of majority, prose"):
        train_majority(10, task="verse")


def test_excerpts_of_prose_and_code_come_from_their_side_of_the_cut():
    texts = [bytes(t.tolist()) for t in prose_and_code()]
    for held_out in (False, True):
        rows, label = excerpts(20, 30, torch.Generator().manual_seed(1), held_out)
        assert rows.shape == (20, 30) and 0 < label.sum() < 20
        for row, prose in zip(rows, label):
            text = texts[0 if prose else 1]
            cut = 4 * len(text) // 5
            assert bytes(row.tolist()) in (text[cut:] if held_out else text[:cut])


def test_a_fixed_set_of_products_is_learnt_and_forgotten_by_none():
    train, test = fit("s6", 2, steps=60, samples=8)
    assert train < test  # eight strings do not tell the product


# ---- the dynamical-systems view


@pytest.mark.parametrize(
    "make",
    [
        lambda: LinearAttention(8, 6, 2),
        lambda: NormalizedAttention(8, 6, 2),
        lambda: S6(8, 5),
        lambda: ScalarS6(8, 5),
        lambda: QLSTM(8),
        lambda: QLSTM(8, reversed=True),
    ],
)
@torch.no_grad()
def test_every_mixer_is_its_recurrence_and_its_matrix(make):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 9, 8)
    if isinstance(layer, S6):
        with tap(layer) as scans:
            y = layer(x)
        r = dsf.of_scan(scans[0])
        torch.testing.assert_close(layer.out_proj(r.output()), y, atol=1e-5, rtol=1e-4)
    elif isinstance(layer, QLSTM):
        r, gate = dsf.of_qlstm(layer, x), layer.input(x).chunk(2, -1)[0]
        o = layer.gates(r.value).chunk(3, -1)[2]
        y = layer.output(torch.nn.functional.gelu(gate) * torch.sigmoid(o) * r.output())
        torch.testing.assert_close(y, layer(x), atol=1e-5, rtol=1e-4)
    else:
        r = dsf.of_attention(layer, x)
        torch.testing.assert_close(layer.out_proj(r.output()), layer(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.einsum("bcij,bjc->bic", r.phi(), r.value), r.output(), atol=1e-5, rtol=1e-4)
    assert r.state_size == r.lam.shape[2] * r.lam.shape[3] and (r.effective_rank() <= 9.01).all()


def test_dictionary_of_the_framework():
    rows = {e.model: e for e in dsf.dictionary(d=8, n=4, l=10)}
    assert len(rows) == 7 and rows["S6 (Mamba)"].carried == "32" and "infinite" in rows["softmax attention"].carried
    assert all(e.matrix < 1e-12 for e in rows.values())


@torch.no_grad()
def test_mamba3_and_spatial_mamba_are_recurrences_too():
    for name in ("mamba3", "mamba3, mimo", "spatial_mamba"):
        model, x = build(name)
        with tap(model, rows=1, layers=[0]) as scans:
            model(x)
        r = dsf.of_scan(scans[0])
        y = r.output()
        torch.testing.assert_close((r.phi() @ r.value.mT[..., None])[..., 0].mT, y, atol=1e-5, rtol=1e-4)
        if scans[0].fusion is None:
            torch.testing.assert_close(y.mT, scans[0].y, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_normaliser_is_a_decay_and_the_reversed_sigmoid_is_s6():
    torch.manual_seed(0)
    layer, x = NormalizedAttention(8, 6, 2).double(), torch.randn(2, 9, 8, dtype=torch.float64)
    r = dsf.of_attention(layer, x)
    eta = torch.exp(layer.Wn(x)).repeat_interleave(4, 2)
    as_ssd = dsf.normaliser_as_decay(r, eta)
    torch.testing.assert_close(as_ssd.output(), r.output())
    torch.testing.assert_close(torch.exp(-dsf.ssd_gates(eta)), as_ssd.lam[..., 0])
    f = torch.linspace(-20, 20, 101, dtype=torch.float64)
    assert dsf.reversed_sigmoid_error(f, torch.tensor(1.3, dtype=torch.float64)) < 1e-12


@torch.no_grad()
def test_softmax_attention_is_approached_but_has_no_finite_state():
    torch.manual_seed(0)
    q, k = 0.5 * torch.randn(4, 5), 0.5 * torch.randn(4, 5)
    exact = torch.exp(q @ k.T / 5**0.5)
    near = [dsf.softmax_features(q, p) @ dsf.softmax_features(k, p).T for p in (0, 1, 2, 4)]
    errors = [float((found - exact).abs().max()) for found in near]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4
    with pytest.raises(ValueError, match="infinite size"):
        dsf.of_attention(SoftmaxAttention(8), torch.randn(1, 3, 8))


# ---- memory, recall, receptive fields


def test_memory_of_known_decays():
    weights = 0.5 ** torch.arange(20.0)
    assert int(memory_length(weights)) == 3  # 1 + 1/2 + 1/4 + 1/8 is the first partial sum above 1.8
    model = ssmzoo.create_model("mamba", vocab_size=16, d_model=16, n_layer=1).eval()
    with torch.no_grad():
        model.backbone.layers[0].mixer.dt_proj.bias.fill_(5.0)  # long steps: everything is forgotten at once
    ids = torch.randint(0, 16, (2, 24))
    with tap(model) as scans, torch.no_grad():
        model(ids)
    assert float(channel_memory(scans[0]).max()) == 0
    entry = enter(model, ids)
    influence = gradient_influence(entry, probes=2)
    assert influence.memory <= 3 and influence.curve.shape == (24,)  # the convolution still reads three back
    change = substitution_influence(entry, [0, 10])
    assert change[0] > 0 and change[1] < 1e-3 * change[0]
    with pytest.raises(ValueError, match="lags go from 0 to 23"):
        substitution_influence(entry, [24])


class Copier(torch.nn.Module):
    """Predicts what followed the last earlier occurrence of the present token within a window."""

    def __init__(self, window):
        super().__init__()
        self.window, self.weight = window, torch.nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        same = ids[:, :, None] == ids[:, None]
        lag = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        same &= (lag > 0) & (lag <= self.window)
        last = (same * torch.arange(1, ids.shape[1] + 1)).amax(-1)
        return 10 * torch.nn.functional.one_hot(ids.gather(1, last.clamp(max=ids.shape[1] - 1)), 500).float()


def test_recall_finds_the_window_of_a_copier():
    curve = recall.recalling(Copier(50), 500, [0, 20, 100], sequences=64)
    assert curve.accuracy[0] > 95 and curve.accuracy[1] > 85 and curve.accuracy[2] < 10
    assert curve.novel_loss[0] > curve.loss[0]
    copy = recall.copying(Copier(50), 500, [0, 200], words=8, sequences=16, text=torch.arange(500).repeat(2))
    assert copy.accuracy[0] > 90 > 20 > copy.accuracy[1]
    with pytest.raises(ValueError, match="longer text"):
        recall.recalling(Copier(5), 500, [900], text=torch.arange(500))
    with pytest.raises(ValueError, match="names no tokens"):
        recall.recalling(ssmzoo.create_model("sd_ssm", input_size=5, num_classes=2), 5, [0])


def test_receptive_field_of_a_known_model():
    class Blur(torch.nn.Module):
        def forward_features(self, x):
            return torch.nn.functional.avg_pool2d(x, 5, stride=1, padding=2)

    found = receptive_field(Blur(), torch.rand(2, 3, 20, 20))
    assert int((found.map > 0).sum()) == 25 and found.shares[99] <= 0.3

    class ChannelsLast(Blur):
        output_fmt = "NHWC"

        def forward_features(self, x):
            return super().forward_features(x).permute(0, 2, 3, 1)

    assert torch.equal(receptive_field(ChannelsLast(), torch.ones(2, 3, 20, 20)).map, found.map)
    with pytest.raises(ValueError, match="needs an image model"):
        receptive_field(Blur(), torch.rand(2, 3))
