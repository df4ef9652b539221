"""The tap and hidden attention: exact for every kind of scan, bounded in memory, clear about what does not exist."""

import gc
import warnings

import pytest
import torch
from torch.nn import functional as F

import ssmzoo
from ssmzoo.layers.mixers.mamba import Mamba
from ssmzoo.probes.attribution_maps import min_max, rollout
from ssmzoo.probes.hidden_attention import (
    attention,
    attention_row,
    attention_rows,
    class_row,
    dense_map,
    exactness,
    implicit_attention,
    scan_output,
)
from ssmzoo.probes.modules import ModuleTracker
from ssmzoo.probes.tap import DenseScan, Scan, tap

IMAGE = dict(in_chans=3, num_classes=4)
MODELS = {  # name, and what distinguishes it: (arguments, input)
    "mamba": (dict(vocab_size=20, d_model=16, n_layer=2), "ids"),
    "mamba_scenario": (dict(vocab_size=20, d_model=16, n_layer=2), "ids"),
    "moe_mamba": (dict(vocab_size=20, d_model=16, n_blocks=2, n_experts=2), "ids"),
    "moe_mamba_inner": (dict(vocab_size=20, d_model=16, n_blocks=2, n_experts=2), "ids"),
    "mamba2": (dict(vocab_size=20, d_model=16, n_layer=2, ssm_cfg={"headdim": 8, "d_state": 8}), "ids"),
    "mamba2, initial states": (
        dict(
            vocab_size=20,
            d_model=16,
            n_layer=2,
            ssm_cfg={"headdim": 8, "d_state": 8, "ngroups": 2, "rmsnorm": False, "learnable_init_states": True},
        ),
        "ids",
    ),
    "mamba3": (dict(vocab_size=20, d_model=16, n_layer=2, ssm_cfg={"headdim": 8, "d_state": 8}), "ids"),
    "mamba3, mimo": (
        dict(
            vocab_size=20,
            d_model=16,
            n_layer=2,
            ssm_cfg={"headdim": 8, "d_state": 8, "is_mimo": True, "mimo_rank": 3, "is_outproj_norm": True},
        ),
        "ids",
    ),
    "vim": (dict(IMAGE, img_size=16), "image"),
    "shuffle_mamba": (dict(IMAGE, img_size=16), "image"),
    "adventurer": (dict(IMAGE, img_size=16), "image"),
    "vmamba": (IMAGE, "image"),
    "res_vmamba": (IMAGE, "image"),
    "spatial_mamba": (IMAGE, "image"),
    "mamba_reorder": (dict(IMAGE, img_size=16), "image"),
    "mamba_fscil": (dict(num_classes=4, img_size=32, in_chans=3), "image"),
    "mambair": ({}, "small image"),
    "mambair_v2": ({}, "small image"),
}
GATES_OUTSIDE = ("mamba2", "mamba3", "adventurer", "res_vmamba", "spatial_mamba", "mambair")


def build(name):
    torch.manual_seed(0)
    arguments, kind = MODELS[name]
    model = ssmzoo.create_model(name.partition(",")[0], **arguments).eval()
    with torch.no_grad():  # scans that do something
        for key, p in model.named_parameters():
            if "x_proj" in key and p.is_floating_point():
                p.mul_(4)
            if "init_states" in key:
                p.normal_()
    side = 16 if "small" in kind else 32
    return model, torch.randint(0, 20, (2, 12)) if kind == "ids" else torch.rand(2, 3, side, side)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_matrix_times_input_is_the_output_of_every_scan(name):
    model, x = build(name)
    plain = model(x)
    with tap(model, rows=1) as scans:
        seen = model(x)
    before, after = (o.logits if hasattr(o, "logits") else o for o in (plain, seen))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6, msg="looking changed the model")
    assert scans
    for scan in scans:
        scan = scan.take(range(0, len(scan.channels), max(1, len(scan.channels) // 6)))
        assert (scan.fusion is not None) == (name == "spatial_mamba")
        assert exactness(scan) <= 1e-5, scan.name
        assert (scan.output() - scan.y).norm() <= 1e-5 * scan.y.norm(), scan.name  # by the states
        torch.testing.assert_close(scan.states([0, -1]), scan.states()[:, :, [0, -1]])
        rows = [0, scan.length // 2, scan.length - 1]
        torch.testing.assert_close(attention_rows(scan, rows), attention(scan, False)[:, :, rows])
        if name.partition(",")[0] in GATES_OUTSIDE:
            assert scan.z is None and scan.gate.shape == scan.y.shape, scan.name
        elif name in ("mamba", "moe_mamba", "moe_mamba_inner", "vim", "shuffle_mamba"):
            assert scan.gate is None and scan.z.shape == scan.y.shape, scan.name


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_following_the_modules_changes_no_operator(name):
    model, x = build(name)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    with ModuleTracker(model) as modules:
        seen = model(x)
        assert modules.current.module is model and len(modules.calls) == 1
    before, after = (o.logits if hasattr(o, "logits") else o for o in (plain, seen))
    assert torch.equal(before, after), "a fused operator was left for another"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_chosen_positions_hold_what_all_of_them_hold(name):
    model, x = build(name)
    with tap(model, rows=1, channels=[0, 3]) as whole:
        model(x)
    at = [0, 5, whole[-1].length - 1]
    with tap(model, rows=1, channels=[0, 3], positions=[0, 5, -1]) as some:
        model(x)
    for scan, part in zip(whole, some):
        if scan.length != whole[-1].length:
            continue
        for name in ("u", "delta", "z", "gate", "y"):
            if (expected := getattr(scan, name)) is not None:
                torch.testing.assert_close(getattr(part, name), expected[..., at])
        for method in ("decay", "write", "read", "states"):
            torch.testing.assert_close(getattr(part, method)(), getattr(scan, method)()[:, :, at])
        torch.testing.assert_close(part.states([-1]), scan.states([-1]))
        assert torch.equal(part.tokens(1), scan.tokens(1)[..., at])
    with pytest.raises(ValueError, match="needs every step of .*tap without positions="):
        attention(part)
    with pytest.raises(ValueError, match="states at .* kept positions"):
        part.states([1])


def alive() -> int:
    """Bytes of all tensors that Python holds."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())


@torch.no_grad()
def test_memory_is_bounded_by_what_was_asked_for():
    model = ssmzoo.create_model("mamba", vocab_size=20, d_model=32, n_layer=4).eval()
    ids = torch.randint(0, 20, (2, 1000))
    inside, base = [], alive()
    model.backbone.layers[-1].norm.register_forward_pre_hook(lambda m, x: inside.append(alive() - base))
    model(ids)
    one = 4 * 1000 * (5 + 2 * 16)  # u, delta, z, y and the convolution's input of a channel, B and C of its group
    for options, kept in (
        (dict(layers=[0], channels=[1]), 2 * one),
        (dict(layers=[0], channels=[1], rows=1), one),
        (dict(channels=[1], positions=[7, 8]), 4 * 2 * 500),
        (dict(layers=[]), 0),
    ):
        with tap(model, **options) as scans:
            model(ids)
        more = inside[-1] - inside[0]  # while the last layer begins; one layer's convolution alone takes 512,000
        assert scans.bytes() <= kept + 300 and more <= kept + 300, (options, scans.bytes(), more)
    with tap(model) as scans:
        model(ids)
    assert inside[-1] - inside[0] > 4_000_000


@torch.no_grad()
def test_directions_are_brought_back_to_their_tokens():
    model, x = build("vim")
    with tap(model, layers=[1], rows=1) as scans:
        model(x)
    (scan,) = scans
    e = scan.total // 2
    matrices = attention(scan.take([0, e]))[0]
    assert torch.equal(matrices[0], matrices[0].tril()) and torch.equal(matrices[1], matrices[1].triu())
    model, x = build("vmamba")
    with tap(model, rows=1) as scans:
        model(x)
    scan = scans[0]
    assert scan.directions == 4
    side = int(scan.u.shape[-1] ** 0.5)
    down = scan.tokens(scan.total // 4)  # the second direction runs down the columns
    assert down[:3].tolist() == [0, side, 2 * side]
    tokens = scan_output(scan)[0, 0][scan.tokens(0).argsort()]
    by_tokens = attention(scan)[0, 0] @ scan.u[0, 0] + scan.D[0] * scan.u[0, 0]  # the first direction: rows in order
    torch.testing.assert_close(tokens, by_tokens, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_convolution_and_gate_fold_into_one_matrix():
    torch.manual_seed(1)
    mixer = Mamba(8, d_state=4, conv_bias=False)
    x = torch.randn(1, 10, 8)
    with tap(mixer) as scans:
        out, _ = mixer(x)
    scan = scans[0]
    before = (implicit_attention(scan) @ scan.conv.x[..., None])[..., 0] + F.silu(scan.z) * scan.D[:, None] * scan.u
    torch.testing.assert_close(mixer.out_proj(before.transpose(1, 2)), out, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_rows_equal_the_matrix_and_documents_do_not_mix():
    torch.manual_seed(2)
    mixer = Mamba(8, d_state=4)
    x, seq_idx = torch.randn(2, 9, 8), torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    with tap(mixer) as scans:
        mixer(x, seq_idx=seq_idx)
    alpha = attention(scans[0])
    assert alpha[0, :, 4:, :4].abs().max() == 0 and alpha[1, :, 4:, :4].abs().max() > 0
    torch.testing.assert_close(attention_row(scans[0], 7)[1], alpha[1, :, 7])
    y = scan_output(scans[0]) * F.silu(scans[0].z)
    torch.testing.assert_close(y, scans[0].y, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_class_row_is_the_class_token_s_row_of_both_directions():
    model, x = build("vim")
    with tap(model, layers=[0], rows=1) as scans:
        model(x)
    scan, e = scans[0], scans[0].total // 2
    token = scan.u.shape[-1] // 2
    alpha = attention(scan)[:, :, token]
    both = alpha[:, :e] + alpha[:, e:]
    both[..., token] = 0
    torch.testing.assert_close(class_row(scan, token), both)


def test_tap_keeps_what_was_asked_for_and_no_more():
    model, x = build("mamba")
    with tap(model, layers=["backbone.layers.1.mixer"], channels=[3, 5], rows=1) as scans, torch.no_grad():
        model(x)
    (scan,) = scans
    assert scan.u.shape == (1, 2, 12) and scan.channels.tolist() == [3, 5] and not scan.u.requires_grad
    assert scan.decay().shape == (1, 2, 12, 16) and scans["backbone.layers.1.mixer"] is scan
    with tap(model, keep_graph=True) as scans:
        model(x)
    assert torch.autograd.grad(attention(scans[0]).sum(), model.backbone.layers[0].mixer.A_log)[0].abs().max() > 0
    with pytest.raises(KeyError, match="no scan in 'nowhere'"):
        scans["nowhere"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(max_bytes=1000), "max_bytes = 1,000: choose layers="),
        (dict(channels=[99]), "has 32 channels, numbered from 0"),
        (dict(layers=[7]), r"layers \[7\] do not exist: the pass ran 2 scans"),
        (dict(positions=[0, 12]), r"positions \[0, 12\]: the scan in .* has 12 steps"),
    ],
)
def test_what_cannot_be_tapped_is_said(arguments, message):
    model, x = build("mamba")
    with pytest.raises(ValueError, match=message), tap(model, **arguments), torch.no_grad():
        model(x)
    with torch.no_grad():
        assert torch.isfinite(model(x).logits).all()  # the operators are back


def test_models_without_scans_and_long_inputs_are_refused():
    model = ssmzoo.create_model("transformer", vocab_size=20)
    with pytest.raises(ValueError, match="ran no scan.*relevance, memory, recall"), tap(model), torch.no_grad():
        model(torch.randint(0, 20, (1, 5)))
    model, x = build("mamba")
    with tap(model) as scans, torch.no_grad():
        model(x)
    with pytest.raises(ValueError, match="more than max_bytes = 100"):
        attention(scans[0], max_bytes=100)


@torch.no_grad()
def test_dense_transitions_of_sd_ssm():
    model = ssmzoo.create_model("sd_ssm", input_size=4, num_classes=3, state_size=6)
    ids = torch.randint(0, 4, (2, 7))
    with tap(model) as scans:
        model(ids)
    (scan,) = scans
    assert isinstance(scan, DenseScan) and not isinstance(scan, Scan)
    h = torch.zeros(2, 6)
    for t in range(7):
        h = (scan.transitions[:, t] @ h[..., None])[..., 0] + scan.inputs[:, t]
    torch.testing.assert_close(h, scan.states[:, -1])
    assert torch.equal(dense_map(scan).diagonal(dim1=1, dim2=2), torch.ones(2, 7))


@torch.no_grad()
def test_rotating_transitions_of_the_complex_diagonal_ssm():
    model = ssmzoo.create_model("complex_diagonal_ssm", input_size=4, num_classes=3, state_size=6)
    ids = torch.randint(0, 4, (2, 7))
    with tap(model) as scans:
        model(ids)
    (scan,) = scans
    h = scan.initial_state
    for t in range(7):
        h = (scan.transitions[:, t] @ h[..., None])[..., 0] + scan.inputs[:, t]
        torch.testing.assert_close(h, scan.states[:, t])


@torch.no_grad()
def test_sorted_tokens_are_brought_back():
    model, x = build("mamba_reorder")
    with tap(model, layers=[0], rows=1) as scans:
        model(x)
    (scan,) = scans
    tokens = torch.linalg.lstsq(scan.mixture[0].double(), scan.u[0, 0].double()[:, None]).solution[:, 0]
    y = attention(scan)[0, 0].double() @ tokens  # of the tokens as they were in front of the sorting
    torch.testing.assert_close(y, attention(scan, False)[0, 0].double() @ scan.u[0, 0].double(), atol=1e-4, rtol=1e-3)
    model, x = build("mambair_v2")
    with tap(model, layers=[0], rows=1) as scans:
        model(x)
    (scan,) = scans
    back = scan.tokens(0)[0].argsort()
    torch.testing.assert_close(attention(scan)[0, 0], attention(scan, False)[0, 0][back][:, back])


@torch.no_grad()
def test_adventurer_s_steps_are_the_mean_the_patches_and_the_class_token():
    model, x = build("adventurer")
    with tap(model, rows=1) as scans:
        model(x)
    l = scans[0].length
    assert {s.extra for s in scans} == {1} and scans[0].tokens(0).tolist() == [l - 1, *range(l - 1)]
    assert [l - 1, *range(l - 3, -1, -1), l - 2] in [s.tokens(0).tolist() for s in scans]


def test_rollout_keeps_row_sums_and_scales():
    torch.manual_seed(3)
    maps = [torch.rand(2, 5, 5).tril() for _ in range(3)]
    product = rollout(maps)
    torch.testing.assert_close(product.sum(-1), torch.ones(2, 5))
    assert torch.equal(product, product.tril())
    assert min_max(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]
    assert min_max(torch.ones(3)).tolist() == [0, 0, 0]
