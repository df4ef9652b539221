"""Hydra: sizes, what published forms look at, the workspace and the memory, wrong arguments."""

import math

import pytest
import torch

import ssmzoo
from ssmzoo.models.hydra_layers.chunk_experts import ChunkExperts
from ssmzoo.models.hydra_layers.memory import ProductKeyMemory, Workspace
from ssmzoo.models.hydra_lm import HydraLM


@pytest.mark.parametrize("pkm, millions", [(None, 5.77), ({}, 6.37)])
def test_sizes_of_the_prototype(pkm, millions):
    with torch.device("meta"):
        model = ssmzoo.create_model("hydra_lm_toy", vocab_size=4000, pkm=pkm)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


def looks_ahead(model) -> bool:
    """Does a change of the last token reach earlier logits?"""
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 8))
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 11], dim=1)
    with torch.no_grad():
        return not torch.allclose(model(ids).logits[:, :-1], model(other).logits[:, :-1])


@pytest.mark.parametrize(
    "options, ahead",
    [({}, False), ({"workspace": "causal"}, False), ({"routing": "chunk"}, True), ({"workspace": "published"}, True)],
)
def test_published_forms_look_ahead_and_say_so(options, ahead):
    torch.manual_seed(1)
    model = HydraLM(
        11, 16, 2, d_expert=64, chunk_size=8 if "routing" in options else 4, attn_every=0, n_slots=4, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    assert model.causal == (not ahead) and looks_ahead(model.eval()) == ahead
    if ahead:
        ids = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(ValueError, match="continue from a state|states and packing"):
            model(ids, model(ids).state)


def test_chunks_are_routed_by_the_mean_of_the_chunk_before():
    torch.manual_seed(0)
    layer = ChunkExperts(6, n_experts=3, d_expert=4, chunk_size=2)
    x = torch.randn(1, 6, 6)
    y = layer(x)[0]
    xn = layer.ln(x)[0]
    for t in range(2, 6):
        start = t // 2 * 2 - 2
        logits = xn[start : start + 2].mean(0) @ layer.gating.gate
        best = logits.topk(2)
        expected = 0
        for p, e in zip(best.values.softmax(0), best.indices):
            bank = layer.experts
            hidden = torch.nn.functional.silu(xn[t] @ bank.gate_weight[e]) * (xn[t] @ bank.lin1_weight[e])
            expected = expected + p * (hidden @ bank.lin2_weight[e])
        torch.testing.assert_close(y[0, t], expected)


def test_the_published_weights_differ_once_there_are_two_chunks():
    torch.manual_seed(0)
    right = ChunkExperts(6, 3, 4, chunk_size=4, routing="chunk")
    wrong = ChunkExperts(6, 3, 4, chunk_size=4, routing="chunk", legacy_chunk_reshape=True)
    wrong.load_state_dict(right.state_dict())
    x = torch.randn(2, 8, 6)
    torch.testing.assert_close(right(x[:, :4])[0], wrong(x[:, :4])[0])
    assert (right(x)[0] - wrong(x)[0]).norm() > 0.01 * right(x)[0].norm()


def test_a_workspace_hands_on_what_chunks_were_about(monkeypatch):
    torch.manual_seed(0)
    layer = Workspace(6, n_slots=3, chunk_size=2, rank=4)
    x, slots, expected = torch.randn(1, 11, 6), layer.slots.clone(), []
    for t in range(0, 11, 2):
        read = torch.zeros(1, 6)
        if t:  # before the first chunk nothing has been written
            mean = x[:, t - 2 : t].mean(1)
            gates = layer.gate(mean).softmax(-1)
            smallest = slots.norm(dim=-1).argmin()
            slots = torch.where(torch.arange(3)[:, None] == smallest, 0.9 * slots + 0.1 * gates[:, 1:] * mean, slots)
            read = gates[:, :1] * layer.attend(slots[None], mean)
        expected.append(x[:, t : t + 2] + read[:, None])
    for at_once in (64, 2):
        monkeypatch.setattr("ssmzoo.models.hydra_layers.memory.AT_ONCE", at_once)
        y, state = layer(x)
        torch.testing.assert_close(y, torch.cat(expected, dim=1))
        torch.testing.assert_close(state.slots, slots[None])


def test_the_fact_memory_is_nearly_closed_at_first():
    torch.manual_seed(0)
    memory, x = ProductKeyMemory(8, 4, 5, 3, 6, 2).eval(), torch.randn(1, 3, 8)
    assert 0 < (memory(x) - x).norm() < 0.1 * x.norm()


def test_an_untrained_model_guesses():
    torch.manual_seed(0)
    model, ids = ssmzoo.create_model("hydra_lm", vocab_size=256), torch.randint(256, (2, 65))
    loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.3


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"routing": "chnk"}, "routing is 'chnk'.*chunk"),
        ({"legacy_chunk_reshape": True}, "belongs to routing='chunk'"),
        ({"chunk_size": 0}, "chunk_size >= 1"),
        ({"window": 0}, "window >= 1"),
        ({"workspace": "yes"}, "workspace is 'yes'.*causal, published"),
        ({"ssm": "mamba"}, "ssm is 'mamba'.*conv, recurrent"),
        ({"n_experts": 1}, "top_k is 2, but a token can choose 1 to n_experts = 1"),
        ({"n_heads": 3, "attn_every": 1}, "n_heads = 3"),
        ({"pkm": {"n1": 2, "n2": 9, "top_k": 4}}, "only 2 half keys"),
        ({"workspace": "causal", "n_slots": 0}, "n_slots=0"),
        ({"embedding_std": 0}, "embedding_std > 0"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        HydraLM(**dict(vocab_size=11, d_model=16, n_layer=2) | wrong)
