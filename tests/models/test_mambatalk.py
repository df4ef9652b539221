"""MambaTalk's two stages: sizes, equations by hand, official names; stage 2's stored case lies outside the checkout."""

import math

import pytest
import torch
from torch.nn import functional as F

import ssmzoo
from ssmzoo.models.mambatalk import PARTS, MambaTalk
from ssmzoo.models.mambatalk_layers.audio import AudioEncoder, to_frames
from ssmzoo.models.mambatalk_layers.scan import GatedMLP, ScanBlock
from ssmzoo.models.motion_vqvae import MotionVQVAE
from ssmzoo.released.family import family_of, to_official

SMALL = {"pose_dims": 15, "frames": 6, "d_model": 16, "audio_dim": 16, "motion_dim": 12, "codes": 10, "words": 13}


def talk(**more):
    torch.manual_seed(0)
    return MambaTalk(**SMALL | more).eval()


def batch(n=6, samples=3218):
    torch.manual_seed(1)
    word, speaker = torch.randint(13, (2, n)), torch.randint(25, (2, n))
    mask = torch.ones(2, n, 15)
    mask[:, :2] = 0
    return {"audio": torch.randn(2, samples, 3), "word": word, "motion": torch.randn(2, n, 15), "mask": mask,
            "speaker": speaker}  # fmt: skip


def test_published_size():
    """192.6 million without the two tables of words, with the attention that the released code never uses."""
    with torch.device("meta"):
        model = MambaTalk()
    total = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("text_pre_encoder"))
    h = 768
    unused = (3 * h * h + 3 * h) + (h * h + h) + 2 * (h * h + h) + 4 * h
    assert round((total + unused) / 1e6, 1) == 192.6


def test_the_transformer_twin_differs_in_its_mixers_alone():
    twin, scans = talk(mixer="attention", motion_dim=16), talk(motion_dim=16)
    parts = [{n for n, _ in m.named_parameters() if ".mixer." not in n} for m in (twin, scans)]
    assert parts[0] == parts[1] and not any("A_log" in n for n, _ in twin.named_parameters())
    out = twin(**batch())
    assert out.rec["face"].shape == scans(**batch()).rec["face"].shape and out.cls["upper"].isfinite().all()
    with pytest.raises(ValueError, match="mixer is 'atention'; nearest: attention"):
        talk(mixer="atention")


def test_bodies_know_their_own_frames_sound_only_where_it_is_added():
    """The memory of the cross attention has no positions: as released, the order of its frames does not matter."""
    out, b = {}, batch()
    for own in (False, True):
        model = talk(own_sound=own)
        face, body = model.hear(b["audio"], b["word"])
        moved = [model.move((face, x), b["motion"], b["mask"], b["speaker"]) for x in (body, body.flip(1))]
        out[own] = [(moved[0].cls[part] - moved[1].cls[part]).abs().max() for part in PARTS]
    assert max(out[False]) < 1e-5 and min(out[True][1:]) > 1e-3


def test_hidden_motion_starts_at_the_mean_once():
    model, motion = talk(), 3 + torch.randn(4, 6, 15)
    model.start_at(motion)
    assert torch.allclose(model.global_scan.learnable_query.flatten(), motion.mean((0, 1)))
    before = {n: w.clone() for n, w in model.state_dict().items()}
    model.start_at(motion + 1)  # a run that goes on
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())


def test_codes_are_the_nearest_and_gradients_pass_straight_through():
    torch.manual_seed(0)
    model = MotionVQVAE(5, 8, 2, codes=7).double()
    model.quantizer.embedding.weight.data.normal_()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    out, z, e = model(x), model.encoder(x), model.quantizer.embedding.weight
    by_hand = torch.stack([torch.stack([(row - e).square().sum(-1).argmin() for row in rows]) for rows in z])
    assert (out.code == by_hand).all() and torch.allclose(out.latent, e[by_hand])
    assert torch.isclose(out.loss, 2 * (z - e[by_hand]).square().mean())
    assert torch.allclose(model.decode(out.code), out.motion)
    (latent,) = torch.autograd.grad(out.motion.square().sum(), out.latent, retain_graph=True)
    (bias,) = torch.autograd.grad(out.motion.square().sum(), model.encoder.main[-1].model[2].bias)
    assert torch.allclose(bias, latent.sum((0, 1)))


def test_encoder_and_decoder_are_the_cards_and_keep_every_frame():
    torch.manual_seed(0)
    model = MotionVQVAE(5, 8, 2, codes=0).double()
    x = torch.randn(1, 7, 5, dtype=torch.float64)
    w = model.state_dict()

    def conv(name, v):
        return F.conv1d(v, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    def res(name, v):
        return v + conv(f"{name}.model.2", F.leaky_relu(conv(f"{name}.model.0", v), 0.2))

    v = x.mT
    for first in (0, 3):
        v = res(f"encoder.main.{first + 2}", F.leaky_relu(conv(f"encoder.main.{first}", v), 0.2))
    v = res("decoder.main.1", res("decoder.main.0", v))
    for at in (2, 4):
        v = F.leaky_relu(conv(f"decoder.main.{at}", v), 0.2)
    out = model(x)
    assert torch.allclose(out.motion, conv("decoder.main.6", v).mT) and out.motion.shape == x.shape and out.loss == 0


def test_inner_widths_are_rounded_up_to_128():
    for wanted, got in ((16, 128), (128, 128), (129, 256), (768, 768)):
        assert GatedMLP(8, wanted).fc1.weight.shape == (2 * got, 8)


def test_a_block_starts_smaller_by_the_root_of_twice_its_layers():
    torch.manual_seed(0)
    one, four = (ScanBlock(64, 128, n).mlp.fc2.weight.detach().std() for n in (1, 4))
    assert one / four == pytest.approx(2, rel=0.03)
    assert one == pytest.approx(1 / math.sqrt(3 * 128) / math.sqrt(2), rel=0.03)


def test_64_frames_of_sound_give_64_frames():
    with torch.device("meta"):
        encoder = AudioEncoder(2, 16)
        y = encoder.feat_extractor(torch.zeros(1, 2, 64 * 533))
    assert y.shape[-1] == 64
    x = torch.arange(6.0).view(1, 6, 1)
    assert to_frames(x, 4).flatten().tolist() == [0, 1, 2, 3]
    assert to_frames(x, 8).flatten().tolist() == [0, 1, 2, 3, 4, 5, 4, 5]
    with pytest.raises(ValueError, match="gives 6 frames and the motion has 13"):
        to_frames(x, 13)


def test_what_reaches_which_part():
    """The face sees no speaker of the body but through the global scan; masked motion is not seen; sound is."""
    model, given = talk(), batch()
    base = model(**given)
    assert {k: v.shape for k, v in base.cls.items()} == dict.fromkeys(PARTS, (2, 6, 10))
    hidden = given | {"motion": given["motion"] + given["mask"]}
    assert all(torch.equal(model(**hidden).rec[p], base.rec[p]) for p in PARTS)
    shown = given | {"motion": given["motion"] + 1 - given["mask"]}
    louder = given | {"audio": given["audio"] * 3}
    for changed in (
        shown,
        louder,
        given | {"word": (given["word"] + 1) % 13},
        given | {"speaker": given["speaker"] * 0},
    ):
        assert all((model(**changed).rec[p] - base.rec[p]).norm() > 0 for p in PARTS)


def test_fusion_weighs_text_and_sound_channel_by_channel():
    model = talk()
    sound, word = torch.randn(2, 6, 16), torch.randint(13, (2, 6))
    text = model.text_encoder_body(model.text_pre_encoder_body(word))
    logits = model.at_attn_body(torch.cat([text, sound], -1))
    share = torch.sigmoid(logits[..., 1::2] - logits[..., ::2])  # of the text
    assert torch.allclose(model.fuse("body", sound, word), share * text + (1 - share) * sound, atol=1e-6)


def test_every_parameter_gets_a_gradient():
    model, given = talk(dropout=0.0).train(), batch()
    out = model(**given)
    sum(v.square().sum() for v in [*out.cls.values(), *out.rec.values()]).backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.norm() > 0]
    assert not still


def test_official_files_come_and_go():
    model, given = talk(), batch()
    official = to_official("mambatalk", model)
    assert family_of(official) == "mambatalk" and len(official) == len(model.state_dict()) + 12
    loaded = ssmzoo.load_official(official)
    found = loaded(given["audio"], given["word"], given["mask"], given["motion"], given["speaker"][..., None])
    out = model(**given)
    expected = [values[p] for values in out for p in ("face", "upper", "lower", "hands")]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected))
    vq = MotionVQVAE(9, 12, 2, 11)
    x = torch.randn(1, 7, 9)
    assert torch.equal(ssmzoo.load_official(vq.state_dict(), vae_quantizer_lambda=1.0)(x)[0], vq.eval()(x).motion)


def test_motion_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, frames, 9 channels\), got \(1, 7, 8\)"):
        MotionVQVAE(9, 12)(torch.zeros(1, 7, 8))
