"""Mamba, Mamba-2 and Mamba-3 as language models: published sizes, initialisation, released files, compile, errors."""

import json
import math

import pytest
import torch
from against_reference import random_walk
from safetensors.torch import save_file
from torch.nn import functional as F
from toy import assert_checkpointing_changes_nothing

import ssmzoo
from ssmzoo.layers.mixers.attention import MHA
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.layers.mixers.mamba2 import Mamba2
from ssmzoo.models.mamba import MambaLM
from ssmzoo.models.mamba2 import Mamba2LM
from ssmzoo.models.mamba3 import Mamba3, Mamba3LM, phase_sums
from ssmzoo.released.files import CheckpointError
from ssmzoo.released.golden import GoldenCase, relative_error

PUBLISHED = {
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
    "mamba2_130m": 128_989_632,
    "mamba2_370m": 368_346_624,
    "mamba2_780m": 780_161_280,
    "mamba2_1.3b": 1_343_757_312,
    "mamba2_2.7b": 2_702_599_680,
}
LAPTOP = {"mamba": MambaLM, "mamba2": Mamba2LM, "mamba3": Mamba3LM}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = ssmzoo.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", LAPTOP)
def test_untrained_loss_is_ln_v_and_every_parameter_learns(name):
    model = ssmzoo.create_model(name, vocab_size=256)
    ids = torch.randint(256, (2, 64))
    loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(256)) < 0.3
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("name", LAPTOP)
def test_a_few_steps_memorise_a_batch(name):
    model = ssmzoo.create_model(
        name, vocab_size=32, d_model=32, n_layer=2, ssm_cfg={} if name == "mamba" else {"d_state": 8, "headdim": 16}
    )
    ids = torch.randint(32, (2, 17))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 1.0


def test_initialisation_is_the_card():
    model = MambaLM(vocab_size=500, d_model=64, n_layer=4, ssm_cfg={"bias": True}, d_intermediate=100)
    mixer, mlp = model.backbone.layers[1].mixer, model.backbone.layers[1].mlp
    dt = F.softplus(mixer.dt_proj.bias)
    assert 1e-3 * 0.999 <= dt.min() and dt.max() <= 0.1 * 1.001
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.4  # log-uniform: the middle is the geometric mean
    assert mixer.dt_proj.weight.abs().max() <= mixer.dt_rank**-0.5
    assert torch.allclose(mixer.A[5], -torch.arange(1.0, 17.0))
    assert (mixer.D == 1).all() and (mixer.in_proj.bias == 0).all() and (mixer.out_proj.bias == 0).all()
    assert abs(model.backbone.embedding.weight.std() - 0.02) < 1e-3
    for weight in (mixer.out_proj.weight, mlp.fc2.weight):  # U(+-1/sqrt(fan_in)) / sqrt(n_layer)
        bound = weight.shape[1] ** -0.5 / 2
        assert 0.9 * bound < weight.abs().max() <= bound
    assert mixer.conv1d.weight.abs().max() <= 0.5 and mlp.fc1.weight.shape == (256, 64)
    block = Mamba2(64, headdim=16, conv_init=0.1)
    assert block.A.max() <= -1 and block.A.min() >= -16 and block.conv1d.weight.abs().max() <= 0.1
    mimo = Mamba3(32, d_state=8, headdim=8, is_mimo=True, mimo_rank=4)
    assert (mimo.mimo_x == 0.25).all() and (mimo.mimo_z == 1).all() and (mimo.B_bias == 1).all()


@pytest.mark.parametrize("name", LAPTOP)
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    model = ssmzoo.create_model(name, vocab_size=32)
    ids = torch.randint(32, (2, 9))
    assert_checkpointing_changes_nothing(model, lambda: model(ids).logits.square().sum())


@pytest.mark.parametrize("name", LAPTOP)
def test_the_whole_model_is_one_graph(name):
    """Nothing in the Python code depends on values; what the backends do with the graph is not this test's matter."""
    model = ssmzoo.create_model(name, vocab_size=32, n_layer=1)
    ids, mask = torch.randint(32, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    torch.testing.assert_close(compiled(ids, mask=mask).logits, model(ids, mask=mask).logits)


@pytest.mark.parametrize("name", LAPTOP)
def test_half_precision_keeps_the_recurrence_in_fp32(name):
    model = ssmzoo.create_model(name, vocab_size=32).eval()
    ids = torch.randint(32, (2, 20))
    expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids)
    assert all(s.ssm.dtype == torch.float32 for s in out.state)
    most = random_walk(torch.bfloat16, 10 * len(model.backbone.layers))  # norm, projections, convolution, gate
    assert relative_error(out.logits, expected) < most
    half = model.to(torch.bfloat16)(ids)
    assert all(s.ssm.dtype == torch.float32 for s in half.state) and half.logits.dtype == torch.bfloat16
    assert relative_error(half.logits, expected) < most


@pytest.mark.parametrize(
    "family, config",
    [
        (
            "mamba",
            {
                "d_model": 16,
                "n_layer": 2,
                "vocab_size": 30,
                "ssm_cfg": {},
                "rms_norm": True,
                "fused_add_norm": True,
                "residual_in_fp32": True,
                "pad_vocab_size_multiple": 8,
            },
        ),  # an old file: no tie_embeddings, no layer
        (
            "mamba2",
            {
                "d_model": 32,
                "n_layer": 3,
                "d_intermediate": 0,
                "vocab_size": 30,
                "attn_layer_idx": [1],
                "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
                "attn_cfg": {
                    "causal": True,
                    "d_conv": 4,
                    "head_dim": 8,
                    "num_heads": 4,
                    "out_proj_bias": False,
                    "qkv_proj_bias": False,
                    "rotary_emb_dim": 4,
                },
                "tie_embeddings": True,
            },
        ),
        ("mamba3", {"d_model": 32, "n_layer": 2, "vocab_size": 30, "ssm_cfg": {"layer": "Mamba3", "headdim": 16}}),
        (
            "mamba_hf",
            {
                "model_type": "mamba",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "vocab_size": 30,
                "intermediate_size": 32,
                "architectures": ["MambaForCausalLM"],
                "time_step_rank": 3,
            },
        ),
        (
            "mamba2_hf",
            {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "vocab_size": 30,
                "num_heads": 4,
                "head_dim": 16,
                "n_groups": 2,
                "state_size": 8,
                "tie_word_embeddings": True,
            },
        ),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_folders_with_config_json(family, config, file, tmp_path):
    """Write a checkpoint as the official code does, read it back."""
    hf = family.endswith("_hf")
    cls = {"mamba": MambaLM, "mamba2": Mamba2LM, "mamba3": Mamba3LM}[family.removesuffix("_hf")]
    if family == "mamba_hf":
        model = cls(30, 16, 2, ssm_cfg={"dt_rank": 3}, pad_vocab_size_multiple=1)
    elif hf:
        model = cls(30, 32, 2, ssm_cfg={"d_state": 8, "headdim": 16, "ngroups": 2}, pad_vocab_size_multiple=1)
    else:
        cfg = {k: v for k, v in config["ssm_cfg"].items() if k != "layer"}
        attention = {k: v for k, v in config.get("attn_cfg", {}).items() if k != "causal"}
        model = cls(
            30,
            config["d_model"],
            config["n_layer"],
            ssm_cfg=cfg,
            attn_layer_idx=config.get("attn_layer_idx", ()),
            attn_cfg=attention,
        )
    state = {k: v.clone() for k, v in model.state_dict().items() if not (k == "lm_head.weight" and "safe" in file)}
    if hf:
        state = {k.replace("backbone.embedding.", "backbone.embeddings."): v for k, v in state.items()}
    save_file(state, tmp_path / file) if "safe" in file else torch.save(state, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = ssmzoo.load_official(family, tmp_path)
    ids = torch.randint(30, (2, 7))
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)
    if hf:
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
        torch.testing.assert_close(loaded(ids, mask).logits[0, 2:], model(ids[:1, 2:]).logits[0])
        torch.testing.assert_close(loaded(ids, logits_to_keep=1).logits, loaded(ids).logits[:, -1:])
        out = loaded(ids[:, :3])
        torch.testing.assert_close(loaded(ids[:, 3:], out.state).logits, model(ids).logits[:, 3:])


@pytest.mark.parametrize(
    "family, case",
    [
        ("mamba", "lm"),
        ("mamba", "block"),
        ("mamba_hf", "lm_left_pad"),
        ("mamba2", "block"),
        ("mamba2_hf", "lm_groups"),
        ("mamba3", "siso_norm"),
    ],
)
def test_golden_cases_in_double_precision(family, case, request):
    path = request.config.rootpath / "tests" / "golden" / family / f"{case}.json"
    error, gradient_error = GoldenCase.load(path, dtype=torch.float64).check()
    assert error < 1e-5 and gradient_error < 1e-5  # the stored values are float32


def test_mamba3_mimo_against_its_equations():
    """Token by token as the equations stand, two B/C heads, partial rotation of channels i and i + n/2."""
    torch.manual_seed(3)
    layer = Mamba3(12, d_state=8, headdim=6, ngroups=2, is_mimo=True, mimo_rank=3, chunk_size=4).double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    h, p, n, r, m = layer.nheads, 6, 8, 3, layer.n_angles
    z, v, B, C, dt, dd_A, trap, ang = layer.in_proj(x).split(layer.widths, dim=-1)

    def rotate(k, phase):  # k (b r h n)
        out = k.clone()
        for i in range(m):
            a, b, c, s = k[..., i], k[..., i + n // 2], phase[:, None, :, i].cos(), phase[:, None, :, i].sin()
            out[..., i], out[..., i + n // 2] = a * c - b * s, a * s + b * c
        return out

    def heads(M, norm, bias):
        return norm(M.reshape(2, r, 2, n)).repeat_interleave(h // 2, dim=2) + bias.transpose(0, 1)

    S, phase = torch.zeros(2, h, p, n, dtype=x.dtype), torch.zeros(2, h, m, dtype=x.dtype)
    k_old, v_old, ys = torch.zeros(2, r, h, n, dtype=x.dtype), torch.zeros(2, r, h, p, dtype=x.dtype), []
    for t in range(9):
        step = F.softplus(dt[:, t] + layer.dt_bias)
        f = torch.where(dd_A[:, t] >= 0, 1 + dd_A[:, t], 1 / (1 - dd_A[:, t]))
        alpha, lam = torch.exp(step * torch.minimum(-f, torch.tensor(-1e-4))), trap[:, t].sigmoid()
        phase = phase + step[..., None] * math.pi * torch.tanh(ang[:, t])[:, None]
        k = rotate(heads(B[:, t], layer.B_norm, layer.B_bias), phase)
        q = rotate(heads(C[:, t], layer.C_norm, layer.C_bias), phase)
        vr = v[:, t].reshape(2, 1, h, p) * layer.mimo_x.transpose(0, 1)
        S = (
            alpha[..., None, None] * S
            + ((1 - lam) * step * alpha)[..., None, None] * torch.einsum("brhp,brhn->bhpn", v_old, k_old)
            + (lam * step)[..., None, None] * torch.einsum("brhp,brhn->bhpn", vr, k)
        )
        y = torch.einsum("bhpn,brhn->brhp", S, q) + layer.D[:, None] * vr
        y = y * F.silu(z[:, t].reshape(2, 1, h, p) * layer.mimo_z.transpose(0, 1))
        ys.append((y * layer.mimo_o.transpose(0, 1)).sum(1).flatten(1))
        k_old, v_old = k, vr
    expected = layer.out_proj(torch.stack(ys, dim=1))
    y, state = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state.ssm, S)


def test_phases_stay_exact_over_long_sequences():
    rotation = torch.rand(1, 5000, 2, 3)
    exact = rotation.double().cumsum(1) + 1
    got = phase_sums(rotation, torch.ones(1, 2, 3), None)
    assert (torch.polar(torch.ones_like(got), got) - torch.polar(torch.ones_like(exact), exact)).abs().max() < 3e-4
    documents = torch.arange(5000)[None] // 777
    inside = torch.cat([c.double().cumsum(1) for c in rotation.split(777, 1)], dim=1)
    got = phase_sums(rotation, torch.zeros(1, 2, 3), documents)
    assert (torch.polar(torch.ones_like(got), got) - torch.polar(torch.ones_like(inside), inside)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: MambaLM(n_layer=0), "n_layer=0"),
        (lambda: MambaLM(vocab_size=-5, d_model=8, n_layer=1), "vocab_size=-5"),
        (lambda: MambaLM(16, 8, 2, attn_layer_idx=[2], attn_cfg={"num_heads": 2}), "attn_layer_idx"),
        (lambda: MambaLM(16, 8, 2, ssm_cfg={"d_state": 0}), "d_state=0"),
        (lambda: Mamba(8, dt_init="uniform"), "uniform"),
        (lambda: Mamba2(32, headdim=48), "headdim"),
        (lambda: Mamba2(32, headdim=16, ngroups=3), "ngroups"),
        (lambda: Mamba3(32, headdim=16, rope_fraction=0.7), "rope_fraction"),
        (lambda: MHA(30, num_heads=4), "num_heads"),
        (lambda: MHA(32, num_heads=4, num_heads_kv=3), "num_heads_kv"),
        (
            lambda: Mamba2(16, d_state=4, headdim=8, learnable_init_states=True)(
                torch.randn(1, 3, 16), seq_idx=torch.tensor([[0, 0, 1]])
            ),
            "seq_idx",
        ),
        (lambda: MambaLM(16, 8, 1)(torch.zeros(1, 0, dtype=torch.long)), "empty"),
        (lambda: MambaLM(16, 8, 1)(torch.zeros(2, 3, dtype=torch.long), mask=torch.ones(2, 4).bool()), "mask"),
        (lambda: Mamba(8)(torch.zeros(2, 3, 8), mask=torch.ones(2, 3)), "bool"),
        (lambda: ssmzoo.load_official("mamba", {}, ssm_cfg={"layer": "Mamba2"}), "family 'mamba2'"),
        (lambda: ssmzoo.load_official("mamba2_hf", {}, hidden_size=16, num_heads=3, head_dim=8), "num_heads"),
    ],
)
def test_bad_input_is_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_a_checkpoint_that_does_not_fit_is_refused():
    state = MambaLM(16, 8, 2).state_dict()
    with pytest.raises(CheckpointError, match="d_model is 16, but the tensors say 8"):
        ssmzoo.load_official("mamba", state, d_model=16, n_layer=2, vocab_size=16)
    with pytest.raises(CheckpointError, match="n_layer is 1, but the tensors say 2"):
        ssmzoo.load_official("mamba", state, d_model=8, n_layer=1, vocab_size=16)
    with pytest.raises(TypeError, match="d_modell"):
        ssmzoo.load_official("mamba", state, d_modell=8)
    with pytest.raises(TypeError, match="d_stat"):
        ssmzoo.create_model("mamba", ssm_cfg={"d_stat": 4})


def test_a_block_alone_is_the_block_in_its_model():
    """Mamba's own initialisation survives the language model's, apart from what the model redraws."""
    torch.manual_seed(5)
    alone = Mamba(32)
    inside = MambaLM(16, 32, 1).backbone.layers[0].mixer
    assert {k: v.shape for k, v in alone.state_dict().items()} == {k: v.shape for k, v in inside.state_dict().items()}
    for key in ("A_log", "D"):
        assert torch.equal(getattr(alone, key), getattr(inside, key))
    assert inside.dt_proj.bias.abs().min() > 1  # softplus^-1 of small steps, not the zero of other biases
    x = torch.randn(2, 5, 32)
    inside.load_state_dict(alone.state_dict())
    torch.testing.assert_close(inside(x)[0], alone(x)[0])
