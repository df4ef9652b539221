"""MoE-Mamba and its baselines: published sizes, wiring, training from scratch, decoding, checkpoints' names."""

import math

import pytest
import torch
from torch.nn import functional as F
from toy import assert_checkpointing_changes_nothing

import ssmzoo
from ssmzoo.layers.decoder import Block
from ssmzoo.layers.feedforward.moe import MoE
from ssmzoo.layers.mixers.attention import Attention
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.rope import rope_table
from ssmzoo.models.baselines import TransformerLM, selections, weights_above_threshold
from ssmzoo.models.moe_mamba import InnerMoEMamba, MoEMambaLM
from ssmzoo.ops.rotary import rotate

V = 31
SMALL = {
    "interleaved": lambda: MoEMambaLM(V, 16, 2, 4, d_state=4),
    "parallel": lambda: MoEMambaLM(V, 16, 2, 4, arrangement="parallel", expert="swiglu", top_k=2, d_state=4),
    "inner": lambda: MoEMambaLM(V, 16, 2, 3, d_expert=8, arrangement="inner", moe_every=2, d_state=4),
    "inner, output": lambda: MoEMambaLM(V, 16, 1, 3, d_expert=8, arrangement="inner", inner_moe="output", d_state=4),
    "plain": lambda: MoEMambaLM(V, 16, 2, arrangement="none", d_state=4),
    "expert choice": lambda: MoEMambaLM(V, 16, 2, 4, router="expert_choice", top_k=2, d_state=4),
    "transformer": lambda: TransformerLM(V, 16, 2, 2),
    "transformer, selective": lambda: TransformerLM(V, 16, 2, 2, attention="selective"),
    "transformer, threshold": lambda: TransformerLM(V, 16, 2, 2, attention="threshold"),
    "transformer, top-2": lambda: TransformerLM(V, 16, 2, 2, n_experts=4, top_k=2, z_loss_weight=1e-3),
}
every_model = pytest.mark.parametrize("name", SMALL)
causal = pytest.mark.parametrize("name", [n for n in SMALL if n != "expert choice"])


def loss_of(model, ids):
    out = model(ids)
    return F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) + sum(
        v for k, v in out.aux.items() if k.endswith("_loss")
    )


@pytest.mark.parametrize(
    "name, total, active",
    [
        ("mamba_25m", 27, 27),
        ("moe_mamba_25m", 542, 26),
        ("transformer_25m", 25, 25),
        ("transformer_moe_25m", 545, 25),
        ("mamba_100m", 121, 121),
        ("moe_mamba_100m", 2439, 117),
        ("transformer_moe_100m", 2454, 114),
    ],
)
def test_published_sizes(name, total, active):
    with torch.device("meta"):
        model = ssmzoo.create_model(name)
    counted, used = model.num_parameters(embeddings=False)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters())
    assert round(counted / 1e6) == total and round((used - norms) / 1e6) == active  # the paper leaves the norms out
    assert model.num_parameters()[0] == counted + 2 * 50257 * model.embedding.embedding_dim


def test_ablation_sizes():
    with torch.device("meta"):
        counts = {e: MoEMambaLM(n_experts=e).num_parameters(embeddings=False)[0] / 1e6 for e in (1, 4, 8, 16, 32)}
    assert {e: round(n) for e, n in counts.items()} == {1: 26, 4: 64, 8: 114, 16: 215, 32: 416}


def test_laptop_presets_have_equal_active_parameters():
    active = {
        name: ssmzoo.create_model(name, vocab_size=256).num_parameters()[1]
        for name in ("moe_mamba", "moe_mamba_parallel", "moe_mamba_inner", "transformer", "transformer_moe")
    }
    assert max(active.values()) < 1.15 * min(active.values()), active
    assert ssmzoo.create_model("moe_mamba", vocab_size=256, n_experts=4).num_parameters()[1] == pytest.approx(
        active["moe_mamba"], rel=0.01
    )


@every_model
def test_untrained_loss_is_that_of_guessing_and_every_parameter_learns(name):
    model = SMALL[name]()
    ids = torch.randint(V, (4, 24))
    logits = model(ids).logits
    assert abs(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item() - math.log(V)) < 0.3
    loss_of(model, ids).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


@every_model
def test_one_batch_is_learnt(name):
    model = SMALL[name]()
    ids = torch.randint(V, (4, 16))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = loss_of(model, ids).item()
    for _ in range(25):
        optimizer.zero_grad()
        loss_of(model, ids).backward()
        optimizer.step()
    assert loss_of(model, ids).item() < 0.6 * first


@causal
def test_chunks_packing_and_padding_compute_what_one_pass_does(name):
    model = SMALL[name]().double().eval()
    ids = torch.randint(V, (3, 14))
    full = model(ids).logits
    logits, state = [], None
    for chunk in ids.split([5, 1, 1, 7], dim=1):
        out = model(chunk, state)
        logits.append(out.logits)
        state = out.state
    torch.testing.assert_close(torch.cat(logits, 1), full)
    documents = torch.tensor([0] * 6 + [1] + [2] * 7).expand(3, -1)
    packed = model(ids, seq_idx=documents).logits
    torch.testing.assert_close(packed, torch.cat([model(part).logits for part in ids.split([6, 1, 7], 1)], 1))
    mask = torch.zeros(3, 20, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(20)[:14]] = True
    padded = torch.randint(V, (3, 20)).masked_scatter(mask, ids)
    torch.testing.assert_close(model(padded, mask=mask).logits[mask].view_as(full), full)


@every_model
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    model = SMALL[name]()
    ids = torch.randint(V, (4, 12))
    assert_checkpointing_changes_nothing(model, lambda: loss_of(model, ids), rtol=0, atol=0)


def test_checkpointing_keeps_the_choice_of_experts(monkeypatch):
    """If the second forward pass saw slightly different logits, tokens would still go where they went."""
    model = SMALL["interleaved"]()
    model.set_grad_checkpointing()
    calls, gate = [], model.blocks[0].layers["feedforward"].gating
    sort = torch.Tensor.sort

    def spy(tensor, *args, **kwargs):
        calls.append(tensor.clone())
        return sort(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "sort", spy)
    loss = loss_of(model, torch.randint(V, (2, 12)))
    with torch.no_grad():
        gate.gate.copy_(gate.gate.flip(1))  # the router now prefers the opposite experts
    loss.backward()
    first, second = calls[0], calls[-1]  # block 0 runs first, and is recomputed last
    assert len(calls) == 4 and torch.equal(first, second)


def test_wiring_of_the_arrangements():
    model = SMALL["parallel"]().eval()
    ids = torch.randint(V, (2, 5))
    block, x = model.blocks[0], model.embedding(ids)
    h = block.norms["shared"](x)
    expected = x + block.layers["mamba"](h)[0] + block.layers["feedforward"](h)[0]
    torch.testing.assert_close(block(x)[0], expected)

    model = SMALL["interleaved"]().eval()
    block, x = model.blocks[0], model.embedding(ids)
    y = x + block.layers["mamba"](block.norms["mamba"](x))[0]
    expected = y + block.layers["feedforward"](block.norms["feedforward"](y))[0]
    torch.testing.assert_close(block(x)[0], expected)
    last = model.blocks[1](expected)[0]
    torch.testing.assert_close(model(ids).logits, last @ model.head.weight.T)  # no norm before the head

    every_other = SMALL["inner"]()
    kinds = [type(block.layers["mamba"]) is InnerMoEMamba for block in every_other.blocks]
    assert kinds == [False, True]
    mixer = SMALL["inner, output"]().blocks[0].layers["mamba"]
    assert isinstance(mixer.out_proj, MoE) and isinstance(mixer.in_proj.conv_proj, torch.nn.Linear)


def test_attention_is_softmax_of_rotated_dot_products():
    attention = Attention(12, 3, bias=True).double()
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = attention.input_projection(x).view(2, 7, 3, 12).chunk(3, -1)
    angle = torch.arange(7.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(2, dtype=torch.float64) * 2 / 4)
    rotation = torch.polar(torch.ones_like(angle), angle)[
        None, :, None
    ]  # channel i is paired with channel i + width / 2
    q, k = (torch.complex(t[..., :2], t[..., 2:]) * rotation for t in (q, k))
    scores = torch.einsum("blhp,bshp->bhls", q, k.conj()).real / 2
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -math.inf)
    expected = torch.einsum("bhls,bshp->blhp", scores.softmax(-1), v).flatten(2)
    torch.testing.assert_close(attention(x)[0], attention.output_projection(expected))


def test_rotation_depends_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    scores = []
    for start in (0, 1000):
        cos, sin = rope_table(torch.tensor([[start]]), 8, 1e4, torch.float64)
        cos2, sin2 = rope_table(torch.tensor([[start + 5]]), 8, 1e4, torch.float64)
        scores.append((rotate(q, cos, sin) * rotate(k, cos2, sin2)).sum())
    torch.testing.assert_close(*scores)


def test_attention_state_forgets_closed_documents():
    attention = Attention(8, 2).double()
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    _, state = attention(x[:, :4], seq_idx=torch.tensor([[0, 0, 1, 1]]))
    assert state.position.tolist() == [[-1, -1, 0, 1]]
    torch.testing.assert_close(attention(x[:, 4:], state)[0], attention(x[:, 2:])[0][:, 2:])


def test_expert_choice_scores_batches_and_refuses_to_continue():
    model = SMALL["expert choice"]().eval()
    out = model(torch.randint(V, (4, 6)))
    with pytest.raises(ValueError, match="router=token_choice"):
        model(torch.randint(V, (4, 1)), out.state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["interleaved", "transformer, top-2"])
def test_compiles_and_checkpoints_together(name):
    torch._dynamo.reset()
    model = SMALL[name]()
    model.set_grad_checkpointing()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.randint(V, (2, 12))
    gradients = []
    for f in (model, compiled):
        loss = f(ids).logits.square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_official_names_come_back():
    """A checkpoint in llm-random's naming, written from our weights, computes our logits."""
    model = MoEMambaLM(V, 16, 2, 4, d_expert=12).eval()
    official = {}
    for key, value in model.state_dict().items():
        key = key.replace("embedding.", "embedding_layer.layers.0.")
        for kind in ("mamba", "feedforward"):
            key = key.replace(f".norms.{kind}.", f".residual_{kind}.layer.pre_norm.")
            key = key.replace(f".layers.{kind}.", f".residual_{kind}.layer.{kind}.")
        for i in range(2):
            key = key.replace(f"blocks.{i}.", f"encoder.blocks.block_{i}.block.")
        official[key] = value
    kwargs = dict(
        block_modules=["mamba", "feedforward"],
        n_blocks=2,
        dmodel=16,
        vocab_size=V,
        ff_mode="token_choice",
        n_experts=4,
        expert_size=12,
        capacity_factor=4.0,
    )
    loaded = ssmzoo.load_official("moe_mamba", official, **kwargs)
    ids = torch.randint(V, (2, 9))
    logits, balance, cross_entropy = loaded(ids)
    out = model(ids)
    torch.testing.assert_close(logits, out.logits)
    torch.testing.assert_close(balance, out.aux["load_balancing_loss"])
    torch.testing.assert_close(cross_entropy, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    official.pop("head.weight")
    with pytest.raises(ValueError, match="missing keys 1: model.head.weight"):
        ssmzoo.load_official("moe_mamba", official, **kwargs)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MoEMambaLM(V, 16, 2, 4, top_k=5), "top_k = 5 experts per token.*n_experts = 4"),
        (lambda: MoEMambaLM(V, -16, 2, 4), "d_model must be a positive integer, got -16"),
        (lambda: MoEMambaLM(V, 16, 2, 4, arrangement="paralel"), "nearest: parallel"),
        (lambda: MoEMambaLM(V, 16, 2, 4, router="token_choise"), "nearest: token_choice"),
        (lambda: MoEMambaLM(V, 16, 2, 4, arrangement="inner", inner_moe=["cnv"]), "inner_moe must name some of"),
        (
            lambda: TransformerLM(V, 16, 2, 3),
            r"d_model = 16 is not divisible by n_heads = 3; choose one of \[1, 2, 4\]",
        ),
        (lambda: TransformerLM(V, 6, 2, 2), "heads of even width, got 3"),
        (lambda: TransformerLM(V, 16, 2, 2, n_experts=-1), "n_experts must be 0"),
        (lambda: MoEMambaLM(V, 16, 1)(torch.zeros(2, 3).long(), mask=torch.ones(2, 4).bool()), "mask has"),
        (
            lambda: ssmzoo.load_official(
                "moe_mamba", {}, block_modules=["atention"], n_blocks=1, dmodel=4, vocab_size=4
            ),
            "nearest: attention",
        ),
        (
            lambda: ssmzoo.load_official(
                "moe_mamba", {}, block_modules=["mamba"], n_blocks=1, dmodel=4, vocab_size=4, mamba_mode="conv"
            ),
            "unknown mamba_mode",
        ),
    ],
)
def test_bad_input_is_refused_in_words(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_block_of_any_official_list():
    block = Block(8, {"mamba": Mamba(8), "attention": Attention(8, 2)})
    y, state, aux = block(torch.randn(2, 5, 8))
    assert y.shape == (2, 5, 8) and set(state) == {"mamba", "attention"} and aux == []


def test_selective_attention_by_hand():
    """Scores sin(0.7 i + 1) of two heads and four tokens: what the first head masks, and the second's last row."""
    z = 2 * torch.sin(0.7 * torch.arange(32, dtype=torch.float64) + 1).view(1, 2, 4, 4)
    seen, keys = torch.ones(1, 4, 4, dtype=torch.bool).tril(), 2 * torch.eye(4, dtype=torch.float64)[None]
    chosen = selections(z[:, 0], keys, seen, torch.arange(4)[None], None)  # scaled by 1 / sqrt(4)
    hidden = chosen.cumsum(1)[0, 2]  # of the three tokens before the last
    torch.testing.assert_close(hidden, torch.tensor([0, 1.700873, 0, 0], dtype=torch.float64), atol=1e-6, rtol=0)
    last = (z[0, 1, 3] - hidden).softmax(-1)
    expected = torch.tensor([0.789512, 0.072065, 0.108408, 0.030014], dtype=torch.float64)
    torch.testing.assert_close(last, expected, atol=1e-6, rtol=0)


def test_threshold_attention_by_hand():
    """Scores sin(0.7 i + 0.5) of one head and four tokens; a row that keeps nothing is zero."""

    def f(*shape, p):
        return torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) + p).view(shape)

    seen = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    A = weights_above_threshold(f(1, 1, 4, 4, p=0.5), f(1, 1, 4, p=2), seen)[0, 0]
    torch.testing.assert_close(A[2, :3], torch.tensor([0, 0.218754, 0.781246]).double(), atol=1e-6, rtol=0)
    assert A[1].eq(0).all() and A.triu(1).eq(0).all()
