"""Routers beyond Switch: noise and its losses, cumulated probability, unequal experts, competition, a z-loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from ssmzoo.layers.feedforward.moe import build_moe
from ssmzoo.layers.feedforward.router import ExpertChoice
from ssmzoo.layers.feedforward.routers import NoisyTopK, TopP, squared_variation
from ssmzoo.models.moe_mamba import MoEMambaLM

D, E = 6, 5


def drawn(router):
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_noisy_top_k_in_eval_mode_is_the_softmax_over_the_k_largest():
    router, x = drawn(NoisyTopK(D, E, top_k=2)).eval(), torch.randn(2, 7, D)
    groups, weight, aux = router(x)
    logits = x.flatten(0, 1) @ router.gate
    best = logits.topk(2)
    assert torch.equal(groups.token.bincount(minlength=14), torch.full((14,), 2))
    torch.testing.assert_close(weight, best.values.softmax(-1).flatten()[groups.choice])
    gates = torch.zeros(14, E).scatter(1, best.indices, best.values.softmax(-1))
    importance = gates.sum(0)
    torch.testing.assert_close(aux["importance_loss"], 0.1 * (importance.std(correction=0) / importance.mean()) ** 2)


def test_the_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again():
    router, x = drawn(NoisyTopK(D, E, top_k=2)), torch.randn(1, 3, D)
    clean = router.logits(x[0])
    spread = F.softplus(x[0] @ router.noise)
    noisy = clean + torch.randn_like(clean) * spread
    estimate = torch.zeros(3, E)
    for e in range(E):
        again = noisy.expand(20_000, 3, E).clone()
        again[..., e] = clean[:, e] + torch.randn(20_000, 3) * spread[:, e]
        estimate[:, e] = (again.topk(2).indices == e).any(-1).float().mean(0)
    four_standard_errors = 4 * 0.5 / 20_000**0.5  # of a share
    torch.testing.assert_close(router.stays(clean, noisy, spread), estimate, atol=four_standard_errors, rtol=0)


def test_noise_acts_in_training_only_and_losses_reach_both_matrices():
    router, x = NoisyTopK(D, E, top_k=2), torch.randn(4, 50, D)
    assert not router.gate.any() and not router.noise.any()
    first, second = (router.train()(x)[0].choice for _ in range(2))
    assert not torch.equal(first, second)
    drawn(router)
    aux = router(x)[2]
    gradients = torch.autograd.grad(aux["importance_loss"] + aux["load_loss"], [router.gate, router.noise])
    assert all(g.norm() > 0 for g in gradients)
    assert torch.equal(router.eval()(x)[1], router(x)[1])


def test_top_p_takes_the_fewest_experts_that_reach_it():
    router, x = drawn(TopP(D, E, top_p=0.7)), torch.randn(2, 4, D)
    groups, weight, aux = router(x)
    n = int(groups.ends[-1])
    p = (x.flatten(0, 1) @ router.gate).softmax(-1)
    for t in range(8):
        got = sorted(weight[:n][groups.token[:n] == t].tolist(), reverse=True)
        order = sorted(p[t].tolist(), reverse=True)
        fewest = next(k for k in range(1, E + 1) if sum(order[:k]) >= 0.7)
        assert got == pytest.approx(order[:fewest])
    mean = p.mean(0)
    torch.testing.assert_close(aux["router_entropy_loss"], 3e-2 * E * (mean * mean.log()).sum())
    torch.testing.assert_close(aux["experts_per_token"], torch.tensor(n / 8))
    assert TopP(D, E, top_p=1.0)(x)[0].ends[-1] == 8 * E


def test_unequal_experts_are_dense_networks_of_their_widths_and_wide_ones_cost_more():
    widths = [2, 4, 6]
    moe = build_moe(D, 3, widths, expert="swiglu", top_k=2, balance_weight=0.0, penalty_weight=0.1)
    x = torch.randn(2, 5, D)
    y, aux = moe(x)
    p = (x @ moe.gating.gate).softmax(-1)
    best = p.topk(2)
    expected = torch.zeros_like(x)
    for e, bank in enumerate(moe.expert_inner_function.banks):
        out = (F.silu(x @ bank.gate_weight[0]) * (x @ bank.lin1_weight[0])) @ bank.lin2_weight[0]
        expected += out * (best.values * (best.indices == e)).sum(-1, keepdim=True)
    torch.testing.assert_close(y, expected)
    chosen = torch.stack([(best.indices == e).any(-1).float().mean() for e in range(3)])
    penalty = 0.1 * 3 * sum(f * h / 4 * q for f, h, q in zip(chosen, widths, p.mean((0, 1))))
    torch.testing.assert_close(aux["parameter_penalty_loss"], penalty)
    assert sum(p.numel() for p in moe.expert_inner_function.parameters()) == 3 * D * sum(widths)


def test_in_a_competition_the_strongest_answers_win_and_the_router_learns_them():
    moe, x = build_moe(D, E, 8, router="competition", top_k=2, competition=1.0).train(), torch.randn(2, 6, D)
    y, aux = moe(x)
    bank = moe.expert_inner_function
    every = torch.stack([F.relu(x @ bank.lin1_weight[e]) @ bank.lin2_weight[e] for e in range(E)], dim=-2)  # (b l e d)
    best = every.norm(dim=-1).topk(2)
    expected = (
        every.gather(2, best.indices[..., None].expand(*best.indices.shape, D)) * best.values.softmax(-1)[..., None]
    ).sum(2)
    torch.testing.assert_close(y, expected)
    error = ((x @ moe.gating.gate).softmax(-1) - every.norm(dim=-1).softmax(-1)).square().mean()
    torch.testing.assert_close(aux["distillation_loss"], 5 * error)
    (gradient,) = torch.autograd.grad(aux["distillation_loss"], moe.gating.gate)
    assert gradient.norm() > 0
    plain = build_moe(D, E, 8, top_k=2)
    plain.load_state_dict(moe.state_dict())
    torch.testing.assert_close(moe.eval()(x)[0], plain(x)[0])  # the router decides alone


def test_z_loss_of_expert_choice():
    x = torch.randn(4, 3, D)
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[1, 2] = False
    router = ExpertChoice(D, E, 0.5, group_by_batch=True, z_loss_weight=0.01)
    z = torch.logsumexp(x @ router.gate, -1).square()
    torch.testing.assert_close(router(x)[2]["z_loss"], 0.01 * z.mean())
    torch.testing.assert_close(router(x, mask)[2]["z_loss"], 0.01 * z[mask].mean())


def test_variation_of_equal_shares_is_none():
    assert squared_variation(torch.full((4,), 3.0)) == 0
    assert math.isclose(squared_variation(torch.tensor([1.0, 3.0])), 0.25)


MODELS = {
    "noisy": dict(router="noisy_top_k", top_k=2, router_options={"load_weight": 0.2}),
    "top-p": dict(router="top_p", router_options={"top_p": 0.5}),
    "unequal": dict(d_expert=[4, 8, 12], top_k=2, balance_weight=0.0, router_options={"penalty_weight": 0.1}),
    "competition": dict(router="competition", top_k=2, router_options={"competition": 1.0}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_with_it_and_reads_in_pieces(name):
    model, ids = MoEMambaLM(17, 16, 1, 3, d_state=4, **MODELS[name]), torch.randint(17, (2, 9))
    out = model(ids)
    losses = [v for k, v in out.aux.items() if k.endswith("_loss")]
    assert losses
    (out.logits.square().mean() + sum(losses)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    first = model(ids[:, :4])
    second = model(ids[:, 4:], first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), model(ids).logits)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(router="top_p", router_options={"top_p": 1.5}), r"top_p = 1.5 must lie in \(0, 1\]"),
        (dict(router="noisy", top_k=2), "unknown router 'noisy'.*noisy_top_k"),
        (
            dict(router="noisy_top_k", router_options={"load": 1}),
            "router_options.load is unknown; nearest: load_weight",
        ),
        (dict(d_expert=[4, 8]), "d_expert lists 2 widths .* expected n_experts = 3"),
        (dict(d_expert=[4, 8, 0]), "expected n_experts = 3 positive"),
        (dict(router="competition", router_options={"competition": 2}), "competition = 2 is a share"),
        (dict(router_options={"penalty_weight": -1}), "must not be negative"),
        (dict(top_k=4), "only n_experts = 3"),
    ],
)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        MoEMambaLM(17, 16, 1, 3, d_state=4, **wrong)
