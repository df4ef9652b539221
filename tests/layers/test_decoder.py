"""The skeleton of the language models: layer patterns, prefixes, kept logits, recomputation, blocks of slots."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssmzoo.layers.decoder import Block, CausalLM, layer_pattern
from ssmzoo.layers.feedforward.mlp import FeedForward
from ssmzoo.layers.mixers.attention import MHA, Attention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.models.baselines import TransformerLM
from ssmzoo.models.hybrid import HybridLM
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.models.moe_mamba import MoEMambaLM
from ssmzoo.train.memory import Peak

V = 23
ATTENTION = {"num_heads": 2, "rotary_emb_dim": 4, "d_conv": 0}
READERS = {
    "transformer": lambda: TransformerLM(V, 16, 2, 2),
    "experts": lambda: TransformerLM(V, 16, 2, 2, n_experts=3),
    "attention of the hybrids": lambda: MambaLM(V, 16, 2, attn_cfg=ATTENTION, layer_pattern="A", d_intermediate=8),
}
reader = pytest.mark.parametrize("name", READERS)


def read(model, pieces, **more):
    state, logits = None, []
    for i, piece in enumerate(pieces):
        out = model(piece, state, **(more if i == 0 else {}))
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@reader
def test_a_prefix_is_read_in_both_directions_and_the_rest_in_one(name):
    model = READERS[name]().double().eval()
    ids = torch.randint(V, (2, 10))
    plain, logits = model(ids).logits, model(ids, prefix=4).logits
    inside, outside = ids.clone(), ids.clone()
    inside[:, 3], outside[:, 4] = (ids[:, 3] + 1) % V, (ids[:, 4] + 1) % V
    assert not torch.allclose(logits[:, 0], model(inside, prefix=4).logits[:, 0])
    torch.testing.assert_close(logits[:, :4], model(outside, prefix=4).logits[:, :4])
    torch.testing.assert_close(plain[:, 0], model(inside).logits[:, 0])
    torch.testing.assert_close(model(ids, prefix=0).logits, plain)
    torch.testing.assert_close(model(ids, prefix=torch.tensor([4, 0])).logits[1], plain[1])


@reader
def test_the_prefix_whole_then_any_split_of_the_rest_is_one_pass(name):
    model = READERS[name]().double().eval()
    ids = torch.randint(V, (2, 10))
    logits = model(ids, prefix=4).logits
    for sizes in ([4, 6], [4, *[1] * 6], [7, 1, 2]):
        torch.testing.assert_close(read(model, ids.split(sizes, dim=1), prefix=4), logits)


@reader
def test_a_prefix_counts_real_tokens(name):
    model = READERS[name]().double().eval()
    rows, prefix = [torch.randint(V, (9,)), torch.randint(V, (5,))], torch.tensor([3, 5])
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, True
    logits = model(ids, mask=mask, prefix=prefix).logits
    for i, row in enumerate(rows):
        alone = model(row[None], prefix=int(prefix[i])).logits[0]
        torch.testing.assert_close(logits[i, mask[i]], alone)


@pytest.mark.parametrize(
    "model, arguments, words",
    [
        (lambda: MambaLM(V, 16, 2), dict(prefix=2), r"prefix: Mamba \(block 0, mixer\) reads in one direction only"),
        (lambda: MoEMambaLM(V, 16, 1, 2), dict(prefix=2), r"prefix: Mamba \(block 0, mamba\)"),
        (
            lambda: MambaLM(V, 16, 2, attn_cfg=ATTENTION, layer_pattern="AM"),
            dict(prefix=2),
            r"prefix: Mamba \(block 1, mixer\)",
        ),
        (READERS["transformer"], dict(prefix=7), r"prefix = 7 must lie in 0..\[6, 6\]"),
        (READERS["transformer"], dict(prefix=torch.tensor([1, -1])), "must lie in 0"),
        (READERS["transformer"], dict(prefix=torch.tensor([1, 2, 3])), "an integer or 2 of them"),
        (READERS["transformer"], dict(prefix=0.5), "an integer or 2 of them, got torch.float32"),
        (READERS["transformer"], dict(prefix=1, seq_idx=torch.zeros(2, 6).long()), "does not go with seq_idx"),
        (READERS["transformer"], dict(logits_to_keep=-1), "logits_to_keep must be 0"),
    ],
)
def test_what_cannot_be_is_refused_in_words(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model()(torch.zeros(2, 6, dtype=torch.long), **arguments)


def test_a_prefix_behind_a_state_is_refused():
    model = READERS["transformer"]()
    ids = torch.zeros(2, 6, dtype=torch.long)
    with pytest.raises(ValueError, match="does not go with state"):
        model(ids, model(ids).state, prefix=2)


def test_a_layer_pattern_says_what_stands_where():
    torch.manual_seed(0)
    by_pattern = MambaLM(V, 16, 6, attn_cfg=ATTENTION, layer_pattern="MMA")
    torch.manual_seed(0)
    by_number = MambaLM(V, 16, 6, attn_cfg=ATTENTION, attn_layer_idx=[2, 5])
    kinds = [type(layer.mixer) for layer in by_pattern.backbone.layers]
    assert kinds == [Mamba, Mamba, MHA] * 2
    torch.testing.assert_close(by_pattern.state_dict(), by_number.state_dict(), rtol=0, atol=0)
    assert layer_pattern("AB", 2, {"A": 1, "B": 2}) == [1, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(layer_pattern="MMX"), "layer_pattern 'MMX' has unknown letters X; known are M, A"),
        (dict(layer_pattern="MA", attn_cfg=ATTENTION), "has 2 letters; expected 3, one per layer"),
        (dict(layer_pattern=""), "has 0 letters"),
        (dict(layer_pattern="MMA"), "give attn_cfg \\(at least num_heads\\)"),
        (dict(layer_pattern="MMA", attn_layer_idx=[1], attn_cfg=ATTENTION), "not both"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        MambaLM(V, 16, 3, **arguments)


@pytest.mark.parametrize(
    "build", [lambda: Mamba2LM(V, 16, 2, ssm_cfg={"headdim": 8, "d_state": 4}), lambda: MoEMambaLM(V, 16, 2, 3)]
)
def test_logits_to_keep_are_the_last_ones(build):
    model = build().eval()
    ids, mask = torch.randint(V, (3, 8)), torch.rand(3, 8) > 0.3
    whole, last = model(ids, mask=mask), model(ids, mask=mask, logits_to_keep=2)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    assert model(ids, logits_to_keep=99).logits.shape == model(ids).logits.shape


RECOMPUTED = [
    lambda: MambaLM(V, 16, 2, d_intermediate=8),
    lambda: MoEMambaLM(V, 16, 2, 3),
    lambda: HybridLM(V, 16, 6, "MSDKLA", head_dim=8, d_ff=8, n_experts=3),
]


@pytest.mark.parametrize("how", [True, "full", "selective"])
@pytest.mark.parametrize("build", RECOMPUTED)
def test_recomputation_changes_no_gradient(build, how):
    torch.manual_seed(0)
    model = build().double()
    ids = torch.randint(V, (2, 9))
    gradients = []
    for mode in (False, how):
        model.set_grad_checkpointing(mode)
        loss = model(ids).logits.square().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with pytest.raises(ValueError, match="expected True, False, 'full' or 'selective'"):
        model.set_grad_checkpointing("some")


def test_selective_recomputation_keeps_the_projections_and_nothing_else():
    """Between none and all in memory; and in the backward pass every product with weights runs once as without it."""
    products, peaks = {}, {}
    for how in (False, "selective", True):
        torch.manual_seed(0)
        model = MambaLM(V, 64, 3, d_intermediate=128)
        model.set_grad_checkpointing(how)
        ids = torch.randint(V, (2, 200))

        def step(model=model, ids=ids):
            model(ids).logits.square().mean().backward()

        step()
        with Peak() as tracker:
            step()
        peaks[how] = tracker.peak
        with FlopCounterMode(display=False) as counter:
            step()
        products[how] = counter.get_total_flops()
    assert peaks[True] < peaks["selective"] < 0.75 * peaks[False]
    assert products[False] <= products["selective"] < 1.05 * products[False] and products[True] > 1.2 * products[False]


class Memory(nn.Module):
    """A slot of a new kind: a mixer that reports a loss beside its state."""

    def __init__(self, d: int):
        super().__init__()
        self.inner = Mamba(d, d_state=4)

    def forward(self, x, state=None, *, mask=None, seq_idx=None):
        y, state = self.inner(x, state, mask=mask, seq_idx=seq_idx)
        return y, state, [{"memory_loss": y.square().mean()}]


def test_slots_of_new_kinds_are_wiring():
    layers = {"memory": Memory(16), "attention": Attention(16, 2), "feedforward": FeedForward(16, 32)}
    model = CausalLM(nn.Embedding(V, 16), [Block(16, layers)], nn.Linear(16, V), norm=nn.LayerNorm(16)).double().eval()
    ids = torch.randint(V, (2, 7))
    out = model(ids)
    assert set(out.state[0]) == {"memory", "attention"} and out.aux["memory_loss"] > 0
    torch.testing.assert_close(read(model, ids.split([3, 1, 3], dim=1)), out.logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7]).bool()
    torch.testing.assert_close(model(ids, mask=mask).logits[0, 2:], model(ids[:1, 2:]).logits[0])
