"""The tap and hidden attention: exact for every kind of scan, bounded in memory, clear about what does not exist."""

import pytest
import torch
from torch.nn import functional as F

import ssmzoo
from ssmzoo.layers.mamba import Mamba
from ssmzoo.probes.attribution_maps import min_max, rollout
from ssmzoo.probes.hidden_attention import (
    attention,
    attention_row,
    class_row,
    dense_map,
    implicit_attention,
    scan_output,
)
from ssmzoo.probes.interception import operators
from ssmzoo.probes.tap import DenseScan, Scan, tap

IMAGE = dict(in_chans=3, num_classes=4)
MODELS = {  # name: (arguments, input)
    "mamba": (dict(vocab_size=20, d_model=16, n_layer=2), "ids"),
    "mamba2": (dict(vocab_size=20, d_model=16, n_layer=2, ssm_cfg={"headdim": 8, "d_state": 8}), "ids"),
    "vim": (dict(IMAGE, img_size=16), "image"),
    "shuffle_mamba": (dict(IMAGE, img_size=16), "image"),
    "adventurer": (dict(IMAGE, img_size=16), "image"),
    "vmamba": (IMAGE, "image"),
    "spatial_mamba": (IMAGE, "image"),
    "mamba_reorder": (dict(IMAGE, img_size=16), "image"),
    "mambair_v2": ({}, "small image"),
}


def build(name):
    torch.manual_seed(0)
    arguments, kind = MODELS[name]
    model = ssmzoo.create_model(name, **arguments).eval()
    with torch.no_grad():  # scans that do something
        for key, p in model.named_parameters():
            if "x_proj" in key and p.is_floating_point():
                p.mul_(4)
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
    assert torch.equal(before, after), "looking changed the model"
    assert scans
    for scan in scans:
        scan = scan.take(range(0, len(scan.channels), max(1, len(scan.channels) // 6)))
        y = scan_output(scan)
        y = y if scan.z is None else y * F.silu(scan.z)
        assert (y - scan.y).norm() <= 1e-5 * scan.y.norm(), scan.name
        h = scan.states()
        by_state = (h * scan.read()).sum(-1)
        by_state = by_state if scan.D is None else by_state + scan.D[:, None] * scan.u
        by_state = by_state if scan.z is None else by_state * F.silu(scan.z)
        assert (by_state - scan.y).norm() <= 1e-5 * scan.y.norm(), scan.name
        torch.testing.assert_close(scan.states([0, -1]), h[:, :, [0, -1]])


@torch.no_grad()
def test_directions_are_brought_back_to_their_tokens():
    model, x = build("vim")
    with tap(model, layers=[1], rows=1) as scans:
        model(x)
    scan, = scans
    e = scan.total // 2
    matrices = attention(scan.take([0, e]))[0]
    assert torch.equal(matrices[0], matrices[0].tril()) and torch.equal(matrices[1], matrices[1].triu())
    model, x = build("vmamba")
    with tap(model, rows=1) as scans:
        model(x)
    scan = scans[0]
    assert scan.directions == 4
    side = int(scan.u.shape[-1] ** 0.5)
    down = scan.places(scan.total // 4)  # the second direction runs down the columns
    assert down[:3].tolist() == [0, side, 2 * side]
    tokens = scan_output(scan)[0, 0][scan.places(0).argsort()]
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
    scan, = scans
    assert scan.u.shape == (1, 2, 12) and scan.channels.tolist() == [3, 5] and not scan.u.requires_grad
    assert scan.decay().shape == (1, 2, 12, 16) and scans["backbone.layers.1.mixer"] is scan
    with tap(model, keep_graph=True) as scans:
        model(x)
    assert torch.autograd.grad(attention(scans[0]).sum(), model.backbone.layers[0].mixer.A_log)[0].abs().max() > 0
    with pytest.raises(KeyError, match="no scan in 'nowhere'"):
        scans["nowhere"]


@pytest.mark.parametrize("arguments, message", [
    (dict(max_bytes=1000), "max_bytes = 1,000: choose layers="),
    (dict(channels=[99]), "has 32 channels, numbered from 0"),
    (dict(layers=[7]), r"layers \[7\] do not exist: the pass ran 2 scans"),
])
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


def test_operators_are_restored_after_an_error():
    import ssmzoo.layers.mamba as home

    model, x = build("mamba")
    original = home.selective_scan_fn
    with pytest.raises(RuntimeError), operators(model, selective_scan_fn=lambda call, *a, **k: call(*a, **k)):
        assert home.selective_scan_fn is not original
        raise RuntimeError
    assert home.selective_scan_fn is original


@torch.no_grad()
def test_dense_transitions_of_sd_ssm():
    model = ssmzoo.create_model("sd_ssm", input_size=4, num_classes=3, state_size=6)
    ids = torch.randint(0, 4, (2, 7))
    with tap(model) as scans:
        model(ids)
    scan, = scans
    assert isinstance(scan, DenseScan) and not isinstance(scan, Scan)
    h = torch.zeros(2, 6)
    for t in range(7):
        h = (scan.transitions[:, t] @ h[..., None])[..., 0] + scan.inputs[:, t]
    torch.testing.assert_close(h, scan.states[:, -1])
    assert torch.equal(dense_map(scan).diagonal(dim1=1, dim2=2), torch.ones(2, 7))


def test_rollout_keeps_row_sums_and_scales():
    torch.manual_seed(3)
    maps = [torch.rand(2, 5, 5).tril() for _ in range(3)]
    product = rollout(maps)
    torch.testing.assert_close(product.sum(-1), torch.ones(2, 5))
    assert torch.equal(product, product.tril())
    assert min_max(torch.tensor([2.0, 4.0, 3.0])).tolist() == [0, 1, 0.5]
    assert min_max(torch.ones(3)).tolist() == [0, 0, 0]
