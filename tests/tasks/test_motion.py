"""Motion: rotations and parts, generated clips whose beats can be seen, folders of BEAT2, and both stages as runs."""

import re
import wave

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ssmzoo.data.motion import skeleton
from ssmzoo.data.motion.data import MotionData
from ssmzoo.data.motion.files import read_clips
from ssmzoo.data.motion.generated import PER_FRAME, RATE, clip, envelope
from ssmzoo.models.mambatalk import MambaTalkBody
from ssmzoo.models.motion_vqvae import MotionCodes, Quantizer
from ssmzoo.ops.rotation import axis_angle_to_matrix, geodesic, matrix_of_6d, matrix_to_6d, positions
from ssmzoo.tasks.metrics import motion as metrics
from ssmzoo.tasks.objectives.motion import changes, part_loss, random_mask, seed_mask, speech_loss
from ssmzoo.train.init_from import start_from

SMALL = ["data.clips=2", "data.val_clips=1", "data.clip_frames=152", "data.frames=32", "data.batch_size=2",
         "trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.accelerator=cpu", "name=a"]  # fmt: skip
WIDTHS = ["model.codes=8", "model.n_layers=1", "model.lower_layers=1"]


def test_rotations_equal_scipys():
    r = torch.randn(20, 3, dtype=torch.float64)
    m = axis_angle_to_matrix(r)
    assert np.allclose(m, Rotation.from_rotvec(r.numpy()).as_matrix())
    assert torch.allclose(matrix_of_6d(matrix_to_6d(m)), m) and torch.allclose(matrix_of_6d(3 * matrix_to_6d(m)), m)
    turned = (Rotation.from_matrix(m[:10].numpy()).inv() * Rotation.from_matrix(m[10:].numpy())).magnitude()
    assert np.allclose(geodesic(m[:10], m[10:]), turned, atol=1e-5)


def test_positions_follow_the_tree():
    quarter = axis_angle_to_matrix(torch.tensor([[0, 0, torch.pi / 2], [0, 0, torch.pi / 2], [0.0, 0, 0]]))
    offset = torch.tensor([[0.0, 1, 0], [1, 0, 0], [1, 0, 0]])
    found = positions(quarter, torch.zeros(3), offset, (-1, 0, 1))
    assert torch.allclose(found, torch.tensor([[0.0, 1, 0], [0, 2, 0], [-1, 2, 0]]), atol=1e-6)


def test_a_body_has_its_parts():
    joints = [*skeleton.UPPER, *skeleton.HANDS, *skeleton.LOWER, skeleton.JAW, 23, 24]
    assert sorted(joints) == list(range(55)) == [*range(skeleton.JOINTS)]
    assert all(up < joint for joint, up in enumerate(skeleton.PARENT))
    made = clip(160, 0, np.random.default_rng(0))
    parts = skeleton.parts_of(made.whole, made.expression)
    assert {k: v.shape[-1] for k, v in parts.items()} == skeleton.CHANNELS and made.whole.shape == (160, 337)
    assert torch.allclose(skeleton.whole_of(parts), made.whole)


def test_beats_of_generated_clips_are_heard_and_seen():
    scores = []
    for seed in range(4):
        made = clip(300, seed % 2, np.random.default_rng(seed))
        place = skeleton.joints_of(made.whole).numpy()
        own = metrics.beat_consistency(place, made.beats, skeleton.BEAT_JOINTS)
        late = metrics.beat_consistency(place, made.beats + 0.5, skeleton.BEAT_JOINTS)
        scores.append((own, late))
        frame = int(made.beats[3] * 30)
        loud = made.audio[:, 0].reshape(-1, PER_FRAME).mean(1)
        assert loud[frame : frame + 3].max() > 2 * loud[frame - 5 : frame - 3].max()
    assert np.mean([a - b for a, b in scores]) > 0.15
    again, other = (clip(300, 0, np.random.default_rng(s)).whole for s in (0, 1))
    assert torch.equal(again, clip(300, 0, np.random.default_rng(0)).whole) and not torch.equal(again, other)


def test_beat_consistency_is_one_on_the_beat_and_falls_with_distance():
    time = np.arange(300) / 30
    speed = 1 - 0.6 * np.cos(2 * np.pi * time)  # slowest at whole seconds
    x = np.cumsum(speed)[:, None, None] / 30 * np.array([1.0, 0, 0])
    beats = np.arange(3.0, 8)
    on = metrics.beat_consistency(x, beats, [0])
    late = metrics.beat_consistency(x, beats + 0.3, [0])
    assert on > 0.98 and late == pytest.approx(np.exp(-0.5), abs=0.08)  # a frame is 1/30 s
    assert np.isnan(metrics.beat_consistency(x, np.array([0.5]), [0]))  # within the frames left out
    assert metrics.beat_consistency(np.zeros((300, 1, 3)), beats, [0]) == 0


def test_other_metrics_have_known_answers():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4000, 3))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + [3, 0, 0]) == pytest.approx(9, rel=1e-6)
    assert metrics.frechet(a, 2 * a) == pytest.approx(
        np.square(2 * a.mean(0) - a.mean(0)).sum() + np.trace(np.cov(a.T))
    )
    steps = np.array([[[0.0, 0, 0]], [[2.0, 0, 0]]])
    assert metrics.diversity([steps, np.zeros((2, 1, 3))]) == pytest.approx(2 / 4)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4))
    assert metrics.face_velocity(x, y) == pytest.approx(np.abs(x[1:] - y[1:]).mean())  # what the mixture comes down to
    assert metrics.face_error(x, y) == pytest.approx(np.square(x - y).mean())


def test_losses_are_zero_for_the_truth_and_weigh_as_published():
    made = clip(160, 1, np.random.default_rng(0))
    for part, x in skeleton.parts_of(made.whole[None], made.expression[None]).items():
        same = part_loss(part, x, x)
        assert same < 3e-3 and part_loss(part, x.roll(9, 1), x) > same + 0.005  # the cosine is clamped
    a, b = torch.randn(1, 5, 2), torch.randn(1, 5, 2)
    first = [x[:, 1:] - x[:, :-1] for x in (a, b)]
    second = [x[:, 1:] - x[:, :-1] for x in first]
    expected = (first[0] - first[1]).abs().mean() + (second[0] - second[1]).abs().mean()
    assert torch.isclose(changes(a, b), expected)
    rec, latent = ({p: torch.randn(2, 3, 4) for p in ("face", "upper")} for _ in range(2))
    cls, code = {p: torch.randn(2, 3, 4) for p in rec}, {p: torch.randint(4, (2, 3)) for p in rec}
    nll = {p: -cls[p].log_softmax(-1).gather(-1, code[p][..., None]).mean() for p in rec}
    mse = sum((rec[p] - latent[p]).square().mean() for p in rec)
    assert torch.isclose(speech_loss(rec, cls, latent, code, 0.0), 3 * mse + nll["upper"])
    assert torch.isclose(speech_loss(rec, cls, latent, code), 3 * mse + nll["upper"] + nll["face"])
    assert seed_mask(torch.zeros(1, 6, 2)).sum(1).tolist() == [[2, 2]]
    assert 0.2 < random_mask(torch.zeros(1000), 0.3).mean() < 0.4


def beat2(folder, frames=200, rate=RATE, seconds=None, fps=30):
    folder.mkdir()
    for name in ("2_scott_0_1_1", "3_x_0_2_2"):
        rng = np.random.default_rng(0)
        poses, face = 0.1 * rng.normal(size=(frames, 165)), rng.normal(size=(frames, 100))
        np.savez(
            folder / f"{name}.npz", poses=poses, trans=np.zeros((frames, 3)), expressions=face, mocap_frame_rate=fps
        )
        samples = np.zeros(int((seconds or frames / 30) * rate))
        samples[:: rate // 2] = 0.5
        with wave.open(str(folder / f"{name}.wav"), "wb") as sound:
            sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(rate)
            sound.writeframes((samples * 32767).astype(np.int16).tobytes())
    return folder


def test_folders_of_beat2(tmp_path):
    clips = read_clips(str(beat2(tmp_path / "a")))
    assert [c.speaker for c in clips] == [1, 2] and clips[0].whole.shape == (200, 337)
    assert clips[0].audio.shape == (200 * PER_FRAME, 3) and clips[0].audio[:, 1].abs().sum() == 0
    assert np.allclose(np.diff(clips[0].beats), 0.5, atol=0.04) and len(clips[0].beats) >= 10
    data = MotionData(str(tmp_path / "a"), frames=32, batch_size=2)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["audio"].shape == (2, 32 * PER_FRAME, 3) and batch["lower"].shape == (2, 32, 61)
    with pytest.raises(ValueError, match="clip to train on has 200 frames, fewer than the 201 of data.frames = 201"):
        MotionData(str(tmp_path / "a"), frames=201, clip_frames=400).setup()


@pytest.mark.parametrize(
    "given, words",
    [
        ({"rate": 44100}, "44100 samples a second.*expected 16000"),
        ({"seconds": 20}, "lasts 20.0 s and .* 6.7 s; both must belong together"),
        ({"fps": 60}, "has 60 frames a second; expected 30"),
    ],
    ids=["another rate", "unequal lengths", "another frame rate"],
)
def test_sound_and_motion_that_do_not_fit_are_refused(tmp_path, given, words):
    folder = beat2(tmp_path / "a", **given)
    with pytest.raises(ValueError) as error:
        read_clips(str(folder))
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_folders_that_are_not_beat2_are_refused(tmp_path):
    cases = (
        (lambda f: (f / "2_scott_0_1_1.wav").unlink(), "has no sound 2_scott_0_1_1.wav"),
        (lambda f: (f / "2_scott_0_1_1.wav").write_bytes(b"x"), "is no WAV file"),
        (lambda f: (f / "2_scott_0_1_1.npz").write_bytes(b"PK junk"), "expected poses"),
        (lambda f: np.savez(f / "2_scott_0_1_1.npz", poses=np.full((200, 165), np.nan), trans=np.zeros((200, 3)),
                            expressions=np.zeros((200, 100))), "poses hold nan in frame 0, channel 0"),
        (lambda f: np.savez(f / "2_scott_0_1_1.npz", poses=np.zeros((9, 165))), "expected poses"),
        (lambda f: np.savez(f / "2_scott_0_1_1.npz", poses=np.zeros((9, 4)), trans=np.zeros((9, 3)),
                            expressions=np.zeros((9, 100))), r"expected \(l 165\)"),
        (lambda f: [x.unlink() for x in f.iterdir()], "holds no NAME.npz"),
    )  # fmt: skip
    for i, (change, words) in enumerate(cases):
        folder = beat2(tmp_path / str(i))
        change(folder)
        with pytest.raises(ValueError, match=words):
            read_clips(str(folder))


def test_the_envelope_looks_ahead():
    assert envelope(np.array([0.0, -3, 1, 2, 0]), 2).tolist() == [3, 3, 2, 2, 0]


def test_code_books_are_in_use_from_the_start():
    torch.manual_seed(0)
    clips = [clip(160, speaker, np.random.default_rng(speaker)) for speaker in (0, 1)]
    parts = skeleton.parts_of(torch.stack([c.whole for c in clips]), torch.stack([c.expression for c in clips]))
    codes = MotionCodes(16, 16, 1, 1)
    codes.start_at(parts)
    for part, x in parts.items():
        latent = getattr(codes, part).encoder(x)[:, 4:-4]  # the ends see zeros instead of the mean pose
        assert 0.2 < latent.var((0, 1)).mean() < 2
        rebuilt = getattr(codes, part)(x.mean((0, 1), keepdim=True).expand(1, 40, -1), quantise=False).motion[:, 12:-12]
        assert torch.allclose(rebuilt, x.mean((0, 1)).expand_as(rebuilt), atol=1e-3)
    codes.fit_codes(parts)
    used = {part: codes(parts)[part].code.unique().numel() for part in parts}
    assert min(used.values()) >= 14, used
    few = Quantizer(8, 4, 1.0)
    few.fit(torch.randn(3, 4))  # fewer latents than codes
    assert few.embedding.weight.isfinite().all()


def test_the_first_stage_runs_and_feeds_the_second(call):
    status, out, err = call("model=motion_codes", *SMALL, "model.width=8", *WIDTHS)
    assert (status, err) == (0, ""), err
    assert "rebuilt to a loss of" in out
    body = MambaTalkBody(32, 16, 8, 8, codes=8, n_layers=1, lower_layers=1)
    assert "into model.codes" in start_from(body, "runs/motion_codes/a") and body.codes.trained == 2
    assert not any(p.requires_grad for p in body.codes.parameters())


def test_the_second_stage_trains_the_first_where_none_is_given(call, tmp_path):
    small = [*SMALL, *WIDTHS, "model.d_model=16", "model.audio_dim=8", "model.motion_dim=8"]
    status, out, err = call("model=mambatalk", "task.codes_steps=2", *small)
    assert (status, err) == (0, ""), err
    assert "stage 1: 2 steps of the code books" in out and "beat consistency" in out
    run = tmp_path / "runs/mambatalk/a"
    for file in ("motion.gif", "trajectories.png", "measures.csv"):
        assert (run / file).stat().st_size > 100
    status, out, _ = call("ckpt=runs/mambatalk/a", "out=again", entry="eval")
    assert status == 0 and (tmp_path / "again" / "motion.gif").exists()
    status, _, err = call("model=mambatalk", "task.codes_steps=0", *small[:-4], "name=b")
    assert status == 2 and "the code books are not trained: give init_from" in err
