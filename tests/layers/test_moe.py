"""The mixture-of-experts layer against a loop over tokens, its losses against their formulas."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from against_reference import random_walk

from ssmzoo.layers.feedforward.mlp import FeedForward, GatedMLP
from ssmzoo.layers.feedforward.moe import Experts, MoE, build_moe, merge_aux
from ssmzoo.layers.feedforward.router import ExpertChoice, TokenChoice
from ssmzoo.ops.moe_dispatch import _grouped_matmul, group_by_expert, grouped_matmul, grouped_matmul_reference
from ssmzoo.released.golden import relative_error


def naive_groups(expert, n_experts, capacity, mask):
    """Choices per expert, in the order in which they come, first come first served."""
    queues = [[] for _ in range(n_experts)]
    for position, e in enumerate(expert.flatten().tolist()):
        if mask is None or mask[position // expert.shape[1]]:
            queues[e].append(position)
    return [q[:capacity] for q in queues], [len(q) for q in queues]


@pytest.mark.parametrize("capacity", [None, 0, 1, 3, torch.tensor(2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (17, 2), (40, 1)])
def test_groups_are_the_first_choices_of_every_expert(capacity, masked, shape):
    expert = torch.randint(5, shape)
    mask = torch.rand(shape[0]) > 0.4 if masked else None
    queues, counts = naive_groups(expert, 5, None if capacity is None else int(capacity), mask)
    groups = group_by_expert(expert, 5, capacity, mask)
    kept = sum(queues, [])
    assert groups.choice[: len(kept)].tolist() == kept and groups.ends[-1] == len(kept)
    assert groups.ends.tolist() == [len(sum(queues[: e + 1], [])) for e in range(5)]
    assert groups.counts.tolist() == counts
    assert sorted(groups.choice.tolist()) == list(range(shape[0] * shape[1]))  # shapes do not depend on the routing
    assert torch.equal(groups.token, groups.choice // shape[1])


@pytest.mark.parametrize("dtype, widths", [(torch.float32, (8, 12)), (torch.float32, (7, 5)), (torch.float64, (8, 12))])
@pytest.mark.parametrize("ends", [[3, 3, 9, 14], [0, 0, 0, 0], [0, 0, 0, 20], [20, 20, 20, 20]])
def test_grouped_matmul_is_its_definition_also_in_gradients(dtype, widths, ends):
    x = torch.randn(20, widths[0], dtype=dtype, requires_grad=True)
    w = torch.randn(4, *widths, dtype=dtype, requires_grad=True)
    ends = torch.tensor(ends, dtype=torch.int32)
    expected = torch.zeros(20, widths[1], dtype=dtype)
    for e, (start, end) in enumerate(zip([0, *ends.tolist()], ends.tolist())):
        for r in range(start, end):
            expected[r] = x[r] @ w[e]
    got, reference = grouped_matmul(x, w, ends), grouped_matmul_reference(x, w, ends)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(reference, expected)
    weight = torch.randn_like(got)
    attached = (expected * weight).sum() + 0 * (x.sum() + w.sum())  # also when no row belongs to anybody
    for a, b in zip(torch.autograd.grad((got * weight).sum(), (x, w)), torch.autograd.grad(attached, (x, w))):
        torch.testing.assert_close(a, b)
    got = grouped_matmul(x, w, ends).sum()  # whose gradient is an expanded tensor, which grouped_mm refuses
    assert torch.autograd.grad(got, x)[0].shape == x.shape


def test_grouped_matmul_is_a_well_formed_operator():
    ends = torch.tensor([2, 5], dtype=torch.int32)
    for width in (4, 3):
        args = (torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, width, requires_grad=True), ends)
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(_grouped_matmul, args, test_utils=checks)
    with pytest.raises(ValueError, match="grouped_matmul wants"):
        grouped_matmul(torch.randn(6, 3), torch.randn(2, 4, 4), ends)
    with pytest.raises(ValueError, match="one entry per expert"):
        grouped_matmul(torch.randn(6, 4), torch.randn(3, 4, 4), ends)


def naive_moe(moe: MoE, x, mask=None):
    """Token by token, expert by expert; drops what comes late."""
    router, bank = moe.gating, moe.expert_inner_function
    flat = x.flatten(0, 1)
    p = (flat @ router.gate).softmax(-1)
    load, out = [0] * bank.n_experts, []
    real = torch.ones(len(flat), dtype=torch.bool) if mask is None else mask.flatten()
    capacity = router.capacity(len(flat), mask)
    for t, token in enumerate(flat):
        y = torch.zeros_like(token)
        weights, chosen = p[t].topk(router.top_k)
        if router.renormalise:
            weights = weights / weights.sum()
        for weight, e in zip(weights, chosen.tolist()):
            load[e] += int(real[t])
            if not real[t] or (capacity is not None and load[e] > capacity):
                continue
            h = token @ bank.lin1_weight[e]
            h = bank.activation(h) if bank.gate_weight is None else bank.activation(token @ bank.gate_weight[e]) * h
            y = y + weight * (h @ bank.lin2_weight[e])
        out.append(y)
    return torch.stack(out).view_as(x), torch.tensor(load)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(top_k=2, expert="swiglu"),
        dict(top_k=3, renormalise=True, expert="geglu"),
        dict(capacity_factor=0.7),
        dict(top_k=2, capacity_factor=1.0, expert="gelu"),
        dict(capacity_factor=0.01),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_moe_is_a_loop_over_tokens_also_in_gradients(options, masked):
    moe = build_moe(8, 5, 12, **options).double()
    x = torch.randn(3, 7, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7) > 0.3 if masked else None
    y, aux = moe(x, mask)
    expected, load = naive_moe(moe, x, mask)
    torch.testing.assert_close(y, expected)
    n = x[..., 0].numel() if mask is None else int(mask.sum())
    torch.testing.assert_close(aux["tokens_per_expert"], load.double() / n)
    capacity = moe.gating.capacity(21, None if mask is None else mask.flatten())
    dropped = 0 if capacity is None else (load - int(capacity)).clamp(min=0).sum()
    assert float(aux["dropped_fraction"]) == pytest.approx(float(dropped) / (n * moe.gating.top_k), abs=1e-9)
    weight = torch.randn_like(y)
    leaves = [x, *moe.parameters()]
    gradients = (torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True) for out in (y, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_capacity_is_the_floor_of_the_cards_formula_and_at_least_one():
    router = TokenChoice(4, 3, top_k=2, capacity_factor=1.25)
    assert router.capacity(18, None) == 15 and router.capacity(7, None) == 5  # floor(5.83)
    assert TokenChoice(4, 3, capacity_factor=9.0).capacity(5, None) == 5  # never more than there are tokens
    assert TokenChoice(4, 32, capacity_factor=1.0).capacity(3, None) == 1
    assert router.eval().capacity(18, None) is None  # nothing is dropped in eval mode
    assert TokenChoice(4, 3, eval_capacity_factor=1.0).eval().capacity(18, None) == 6
    mask = torch.tensor([True] * 11 + [False] * 7)
    assert TokenChoice(4, 3, capacity_factor=1.0).capacity(18, mask) == 3  # of 11 real tokens


def test_balance_loss_counts_before_dropping_and_has_its_gradient_through_the_probabilities():
    moe = build_moe(6, 4, 8, top_k=2, capacity_factor=0.3, z_loss_weight=0.5)
    x = torch.randn(2, 9, 6)
    _, aux = moe(x)
    s = x.flatten(0, 1) @ moe.gating.gate
    p = s.softmax(-1)
    share = torch.nn.functional.one_hot(p.topk(2).indices, 4).sum(1).float().mean(0)
    expected = 0.01 * 4 * (share * p.mean(0)).sum()
    torch.testing.assert_close(aux["load_balancing_loss"], expected)
    torch.testing.assert_close(aux["z_loss"], 0.5 * s.logsumexp(-1).square().mean())
    gate = moe.gating.gate
    torch.testing.assert_close(*(torch.autograd.grad(v, gate)[0] for v in (aux["load_balancing_loss"], expected)))
    with torch.no_grad():
        moe.gating.gate.zero_()  # P uniform: the loss is alpha k whatever the choices
    _, aux = moe(x)
    assert aux["load_balancing_loss"].item() == pytest.approx(0.02)
    assert float(aux["router_entropy"]) == pytest.approx(math.log(4), rel=1e-5)


def test_padding_changes_nothing_for_real_tokens():
    moe = build_moe(6, 4, 8, top_k=2, capacity_factor=0.8, z_loss_weight=0.1)
    x = torch.randn(2, 9, 6)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    y, aux = moe(x, mask)
    other = torch.where(mask[..., None], x, torch.full_like(x, 7.0))
    again, aux2 = moe(other, mask)
    assert torch.equal(y[mask], again[mask]) and (y[~mask] == 0).all()
    packed, aux3 = moe(x[mask][None])
    torch.testing.assert_close(y[mask], packed[0])
    for key in aux:
        torch.testing.assert_close(aux[key], aux2[key])
        torch.testing.assert_close(aux[key], aux3[key])


def test_jitter_acts_in_training_only_and_router_stays_in_fp32_under_autocast():
    moe = build_moe(8, 4, 16, jitter=0.5)
    x = torch.randn(1, 64, 8)
    assert not torch.equal(moe(x)[1]["load_balancing_loss"], moe(x)[1]["load_balancing_loss"])
    moe.eval()
    assert torch.equal(moe(x)[0], moe(x)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moe.gating.logits(x.bfloat16()).dtype == torch.float32
        y, aux = moe(x)
    assert y.dtype == torch.bfloat16 and aux["load_balancing_loss"].dtype == torch.float32
    assert relative_error(y, moe(x)[0]) < random_walk(torch.bfloat16, 8)  # the input, two products, weights and output


@pytest.mark.parametrize("softmax_over", ["tokens", "experts"])
@pytest.mark.parametrize("grouped", [False, True])
def test_expert_choice_takes_the_largest_probabilities(softmax_over, grouped):
    moe = build_moe(6, 3, 8, router="expert_choice", fraction=0.5, softmax_over=softmax_over, group_by_batch=grouped)
    x = torch.randn(4, 5, 6)
    s = x @ moe.gating.gate  # (b l e)
    s = s if grouped else s.reshape(20, 1, 3)  # candidates, positions, e
    p = s.softmax(0 if softmax_over == "tokens" else 2)
    take = 2 if grouped else 10
    chosen = torch.zeros_like(p).scatter(0, p.topk(take, dim=0).indices, 1.0)
    bank = moe.expert_inner_function
    hidden = torch.einsum("td,edf->tef", x.flatten(0, 1), bank.lin1_weight).relu()
    every = torch.einsum("tef,efd->ted", hidden, bank.lin2_weight)
    expected = torch.einsum("te,ted->td", (p * chosen).flatten(0, 1), every).view_as(x)
    y, aux = moe(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(aux["tokens_per_expert"], torch.full((3,), 0.5))
    missed = (chosen.flatten(0, 1).sum(1) == 0).float().mean()
    torch.testing.assert_close(aux["dropped_fraction"], missed)
    assert not any(key.endswith("_loss") for key in aux)


def test_expert_choice_over_the_batch_does_not_leak_along_time_and_skips_padding():
    moe = build_moe(6, 3, 8, router="expert_choice", fraction=0.5, group_by_batch=True, norm=True)
    x = torch.randn(4, 5, 6)
    later = x.clone()
    later[:, 3:] = torch.randn(4, 2, 6)
    assert torch.equal(moe(x)[0][:, :3], moe(later)[0][:, :3])
    moe = build_moe(6, 3, 8, router="expert_choice", fraction=0.5)
    mask = torch.rand(4, 5) > 0.3
    y, _ = moe(x, mask)
    again, _ = moe(torch.where(mask[..., None], x, torch.full_like(x, 9.0)), mask)
    assert torch.equal(y[mask], again[mask]) and (y[~mask] == 0).all()
    regrouped = build_moe(6, 3, 8, router="expert_choice", fraction=0.5, group_by_batch=True, group_size=2)
    assert regrouped(x)[0].shape == x.shape


def test_shared_dense_branch_and_linear_experts():
    x = torch.randn(2, 3, 6)
    router, bank, dense = TokenChoice(6, 3), Experts(6, 3, 8), FeedForward(6, 4)
    torch.testing.assert_close(MoE(router, bank, shared=dense)(x)[0], MoE(router, bank)(x)[0] + dense(x))
    linear = build_moe(6, 3, 10, expert="linear")
    p = (x @ linear.gating.gate).softmax(-1)
    weight, e = p.max(-1)
    expected = weight[..., None] * torch.einsum("bld,bldf->blf", x, linear.expert_inner_function.lin1_weight[e])
    torch.testing.assert_close(linear(x)[0], expected)


def test_initialisation_is_the_cards():
    torch.manual_seed(0)
    moe = build_moe(64, 8, 96)
    bank = moe.expert_inner_function
    for tensor, fan_in in ((bank.lin1_weight, 64), (bank.lin2_weight, 8 * 96), (moe.gating.gate, 64)):
        assert tensor.abs().max() <= 0.2
        near = min(0.05, 4 / math.sqrt(2 * tensor.numel()))  # four standard errors of a deviation
        assert tensor.std().item() == pytest.approx(math.sqrt(0.1 / fan_in), rel=near)
    chosen = build_moe(64, 8, 96, router="expert_choice", fraction=0.25).expert_inner_function
    near = 4 / math.sqrt(2 * chosen.lin2_weight.numel())
    assert chosen.lin2_weight.std().item() == pytest.approx(math.sqrt(0.1 / (2 * 96)), rel=near)


def test_aux_of_layers_is_summed_averaged_and_stacked():
    layers = [
        {"a_loss": torch.tensor(1.0), "m": torch.tensor(2.0), "tokens_per_expert": torch.tensor([0.1, 0.9])},
        {"a_loss": torch.tensor(2.0), "m": torch.tensor(4.0), "tokens_per_expert": torch.tensor([0.5, 0.5])},
    ]
    merged = merge_aux(layers)
    assert merged["a_loss"] == 3 and merged["m"] == 3 and merged["tokens_per_expert"].shape == (2, 2)
    assert float(merged["busiest_expert"]) == pytest.approx(0.9)
    assert merge_aux([]) == {}


@pytest.mark.parametrize(
    "options",
    [
        dict(capacity_factor=1.0),
        pytest.param(dict(top_k=2, expert="swiglu", z_loss_weight=0.1), marks=pytest.mark.slow),
        pytest.param(dict(router="expert_choice", fraction=0.25), marks=pytest.mark.slow),
    ],
)
def test_one_graph_for_torch_compile(options):
    torch._dynamo.reset()
    moe = build_moe(16, 4, 32, **options)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 9, 16, requires_grad=True)
    for mask in (None, torch.rand(2, 9) > 0.3):
        results = []
        for module in (moe, compiled):
            y, aux = module(x, mask)
            loss = y.square().sum() + sum(v for k, v in aux.items() if k.endswith("_loss"))
            results.append([y, *torch.autograd.grad(loss, [x, *moe.parameters()])])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


def balance_over_two_halves():
    """A router, what two processes see of a batch, and the loss and gate gradient of one process that sees it all."""
    moe = build_moe(6, 4, 8, capacity_factor=1.0)
    x = torch.randn(2, 11, 6) + torch.tensor([1.0, -1.0])[:, None, None]
    alone = copy.deepcopy(moe)
    loss = alone(x)[1]["load_balancing_loss"]
    loss.backward()
    return moe, x, loss.item(), alone.gating.gate.grad


def test_balance_is_over_the_global_batch_under_data_parallel(monkeypatch):
    moe, x, expected, gradient = balance_over_two_halves()
    seen, others = [], []

    def all_reduce(totals):
        seen.append(totals.clone())
        if others:
            totals.add_(others.pop())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    for half in x.split(1):
        moe(half)
    total = torch.zeros_like(gradient)
    for half, other in zip(x.split(1), (seen[1], seen[0])):
        others.append(other)
        loss = moe(half)[1]["load_balancing_loss"]
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        total += torch.autograd.grad(loss, moe.gating.gate)[0] / 2  # data parallelism averages gradients
    torch.testing.assert_close(total, gradient)
    moe.eval()
    moe(x)  # evaluation waits for nobody
    assert len(seen) == 4


def _train_rank(rank: int, folder: str, moe: MoE, x, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    _, aux = moe(x[rank : rank + 1])
    aux["load_balancing_loss"].backward()
    gradient = moe.gating.gate.grad
    dist.all_reduce(gradient)  # what data parallelism does, with the division below
    queue.put((rank, aux["load_balancing_loss"].item(), (gradient / 2).tolist()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_balance_in_two_real_processes(tmp_path):
    moe, x, expected, expected_gradient = balance_over_two_halves()
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_train_rank, args=(str(tmp_path), moe, x, queue), nprocs=2)
    for _ in range(2):
        _, loss, gradient = queue.get()
        assert loss == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(torch.tensor(gradient), expected_gradient)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: build_moe(8, 4, 8, top_k=5), "top_k is 5.*1 to n_experts = 4"),
        (lambda: build_moe(8, 4, 8, router="tokenchoice"), "unknown router 'tokenchoice'; nearest: token_choice"),
        (lambda: build_moe(8, 4, 8, expert="swigl"), "unknown activation 'swigl'; nearest: swiglu"),
        (lambda: build_moe(8, -4, 8), "positive sizes"),
        (lambda: build_moe(8, 4, 0), "positive sizes"),
        (lambda: build_moe(8, 4, 8, capacity_factor=0), "capacity_factor must be positive"),
        (lambda: build_moe(8, 4, 8, jitter=1.5), "jitter must lie"),
        (lambda: build_moe(8, 4, 8, balance_weight=-1.0), "must not be negative"),
        (lambda: build_moe(8, 4, 8, router="expert_choice", fraction=2.0), "fraction of the tokens"),
        (lambda: build_moe(8, 4, 8, router="expert_choice", fraction=0.5, softmax_over="token"), "nearest: tokens"),
        (
            lambda: build_moe(8, 4, 8, router="expert_choice", fraction=0.1)(torch.randn(1, 3, 8)),
            "0 of its 3 candidates",
        ),
        (lambda: MoE(TokenChoice(8, 4), Experts(8, 3, 8)), "knows 4 experts, the bank has 3"),
        (lambda: ExpertChoice(8, 4, 0.5, group_size=0), "group_size"),
        (lambda: Experts(8, 4, 8, kind="linear", d_output=4), "linear expert"),
        (lambda: FeedForward(8, 8, activation="swiglu"), "use GatedMLP"),
        (lambda: GatedMLP(8, 0), "positive sizes"),
    ],
)
def test_bad_input_is_refused_in_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_unknown_router_option_names_itself():
    with pytest.raises(TypeError, match="topk"):
        build_moe(8, 4, 8, topk=2)
