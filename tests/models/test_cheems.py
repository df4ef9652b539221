"""Cheems: sizes, retrieval by product keys, what hides keys, both signs of A, wrong arguments."""

import pytest
import torch

import ssmzoo
from ssmzoo.layers.feedforward.product_key import ProductKeys
from ssmzoo.models.cheems import CheemsLM
from ssmzoo.models.cheems_layers.cross_domain import CrossDomainExperts
from ssmzoo.models.cheems_layers.dynamic_mask import DynamicMaskAttention
from ssmzoo.models.cheems_layers.rotary_ssd import RotarySSD
from ssmzoo.released.cheems import from_official, to_official


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("cheems_370m", 369_493_248),
        ("cheems_moe_1.5b", 1_452_672_256),
        ("cheems_doge_160m", 152_697_744),
        ("cheems_doge_moe_120m", 122_864_192),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        model = ssmzoo.create_model(name, vocab_size=32768)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_product_keys_find_what_comparing_with_every_entry_finds():
    torch.manual_seed(0)
    keys = ProductKeys(5, 7, 4, top_k=3, n_heads=2, init_std=1.0)
    queries = torch.randn(2, 6, 2, 2, 4)
    scores, entries = keys(queries)
    first, second = (torch.einsum("blhr,hnr->blhn", q, k) for q, k in zip(queries.unbind(-2), (keys.keys1, keys.keys2)))
    expected = (first[..., :, None] + second[..., None, :]).flatten(-2).topk(3)
    torch.testing.assert_close(scores, expected.values)
    assert torch.equal(entries, expected.indices)


def test_experts_are_the_sum_that_is_written_down():
    torch.manual_seed(0)
    layer = CrossDomainExperts(8, 12, n_experts=16, n_heads=2, experts_per_head=3, d_retrieval=6)
    torch.nn.init.normal_(layer.keys.keys1)
    torch.nn.init.normal_(layer.keys.keys2)
    x = torch.randn(1, 1, 8)
    halves = layer.queries(x)[0, 0].view(2, 2, 3)  # (half, head, 3)
    expected = layer.down_proj(torch.nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x))[0, 0]
    for head in range(2):
        first, second = layer.keys.keys1[head] @ halves[0, head], layer.keys.keys2[head] @ halves[1, head]
        score = {4 * i + j: first[i] + second[j] for i in range(4) for j in range(4)}
        best = sorted(score, key=score.get)[-3:]
        for e, p in zip(best, torch.stack([score[e] for e in best]).softmax(0)):
            weight = torch.nn.functional.silu(x[0, 0] @ layer.down_embed.weight[e]) * p
            expected = expected + weight * layer.up_embed.weight[e]
    torch.testing.assert_close(layer(x)[0, 0], expected)


def test_a_hidden_key_is_hidden_for_those_who_have_seen_enough():
    """Of n keys in sight the floor(r n) - 1 with the smallest m are hidden; over all keys later ones count too."""
    torch.manual_seed(0)
    m, seen = torch.rand(1, 6, 1), torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    past = DynamicMaskAttention(8, 1, mask_ratio=0.5).bias(m, seen, torch.float32)[0, 0] > -1e30
    everything = DynamicMaskAttention(8, 1, mask_ratio=0.5, mask_over="all").bias(m, seen, torch.float32)[0, 0] > -1e30
    for t in range(6):
        k = (t + 1) // 2
        hidden = set(m[0, : t + 1, 0].argsort()[: max(k - 1, 0)].tolist())
        assert {s for s in range(t + 1) if not past[t, s]} == hidden
        smallest = set(m[0, :, 0].argsort()[:2].tolist())
        assert {s for s in range(t + 1) if not everything[t, s]} == smallest & set(range(t + 1))


def test_published_masks_do_not_continue_from_a_state():
    model = CheemsLM(11, 16, 2, 2, 8, "SA", mask_ratio=0.4, mask_over="all")
    assert not model.causal and CheemsLM(11, 16, 2, 2, 8, "SA", mask_ratio=0.4).causal
    ids = torch.randint(11, (1, 5))
    with pytest.raises(ValueError, match="cannot continue from a state; use 'past'"):
        model(ids, model(ids).state)


def test_a_grows_or_decays():
    x = torch.randn(1, 30, 8)
    raw, decaying = RotarySSD(8, 2, "raw"), RotarySSD(8, 2)
    assert (raw.decay() == 1).all() and torch.allclose(decaying.decay(), torch.tensor([-1.0, -2.0]))
    raw.load_state_dict({"A": decaying.decay()} | {k: v for k, v in decaying.state_dict().items() if k != "A_log"})
    torch.testing.assert_close(raw(x)[0], decaying(x)[0])


def test_a_model_trained_here_is_written_with_the_official_names():
    model = CheemsLM(11, 16, 2, 2, 8, "SA", n_experts=4, experts_per_head=2, d_retrieval=4)
    theirs = to_official(model, model.state_dict())
    assert theirs["model.layers.0.ssd.A"].lt(0).all() and "lm_head.weight" not in theirs
    raw = CheemsLM(11, 16, 2, 2, 8, "SA", a_mode="raw", n_experts=4, experts_per_head=2, d_retrieval=4)
    raw.load_state_dict(from_official(raw, theirs))
    ids = torch.randint(11, (2, 7))
    torch.testing.assert_close(raw(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"n_experts": 1000}, "n_experts = 1000 is no square, .* choose 961 or 1024"),
        ({"n_experts": -1}, "n_experts >= 0"),
        ({"n_experts": 4, "experts_per_head": 3}, "only 2 half keys"),
        ({"n_experts": 4, "experts_per_head": 2, "d_retrieval": 5}, "d_retrieval = 5 must be even"),
        ({"n_heads": 3}, "n_heads = 3 does not divide d_model = 16 into heads of even width.* choose one of 1, 2, 4"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3 must divide n_heads = 2"),
        ({"mask_ratio": 1.0}, r"mask_ratio = 1.0 must lie in \[0, 1\)"),
        ({"mask_ratio": 0.1, "mask_over": "pasta"}, "did you mean 'past'|choose past or all"),
        ({"a_mode": "row"}, "a_mode is 'row'.*raw"),
        ({"layer_pattern": "SX"}, "unknown letters X"),
        ({"layer_pattern": "SSA"}, "has 3 letters"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    arguments = dict(vocab_size=11, d_model=16, n_layer=2, n_heads=2, d_ff=8, layer_pattern="SA") | wrong
    with pytest.raises(ValueError, match=message):
        CheemsLM(**arguments)
