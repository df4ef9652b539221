"""Few-shot class-incremental learning: data in sessions, fixed directions, a silent new branch, the whole protocol."""

import types

import numpy as np
import pytest
import torch
from PIL import Image

from ssmzoo.data.image_sources import from_arrays
from ssmzoo.data.images_fewshot import CIFAR100, FewShotImages
from ssmzoo.models.mamba_fscil import MambaFSCIL, MambaNeck, simplex_etf
from ssmzoo.tasks.fscil import FewShotIncremental, of_session, session_rate
from ssmzoo.tasks.objectives.fscil import dot_regression, separation, suppression


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_base_session_and_few_images_of_new_classes():
    data = FewShotImages(image_size=16)
    assert data.sizes["num_classes"] == 10 and data.sessions == 2 and [data.seen(i) for i in range(3)] == [6, 8, 10]
    assert set(data._open()[0].labels) == set(range(6)) == set(data._open()[1].labels)
    labels = torch.cat([y for _, y in data.images("few")])
    assert labels.tolist() == [c for c in range(6, 10) for _ in range(5)]
    assert set(torch.cat([y for _, y in data.images("test")]).tolist()) == set(range(10))
    with pytest.raises(ValueError, match="leave 5, which sessions of data.way = 2 classes do not divide"):
        FewShotImages(base_classes=5).setup()


def test_index_files(tmp_path):
    data = FewShotImages()
    data.setup()
    rows = data.few_shot_indices()
    file = tmp_path / "few.txt"
    file.write_text("\n".join(",".join(map(str, row)) for row in rows))
    again = FewShotImages(few_shot=str(file))
    again.setup()
    assert np.array_equal(again.few_shot_indices(), rows)
    file.write_text("\n".join(",".join(map(str, row)) for row in rows[::-1]))
    with pytest.raises(ValueError, match="not of the class of their row: 6, 7"):
        again.few_shot_indices()
    assert [len(row.split(",")) for row in CIFAR100.split()] == [5] * 40


def make_bird_folder(root, classes=5, train=6, test=2):
    """CUB-200's layout: numbered folders under train/ and test/."""
    generator = np.random.default_rng(0)
    for side, count in (("train", train), ("test", test)):
        for c in range(1, classes + 1):
            folder = root / side / f"{c:03d}.Bird_{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                levels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(levels).save(folder / f"Bird_{c}_{i}.jpg")
    return root


def test_folders_with_session_lists(tmp_path):
    root, lists = make_bird_folder(tmp_path / "cub"), tmp_path / "lists"
    lists.mkdir()
    (lists / "session_1.txt").write_text("CUB_200_2011/images/001.Bird_1/Bird_1_0.jpg\n")  # a base class
    for session, c in ((2, 4), (3, 5)):
        names = [f"CUB_200_2011/images/{c:03d}.Bird_{c}/Bird_{c}_{i}.jpg" for i in (5, 2)]
        (lists / f"session_{session}.txt").write_text("\n".join(names) + "\n")
    arguments = dict(path=str(root), image_size=16, base_classes=3, way=1, shot=2)
    data = FewShotImages(**arguments, few_shot=str(lists))
    data.setup()
    assert data.sessions == 2 and data.sizes == {"in_chans": 3, "num_classes": 5, "img_size": 16}
    train = data._all[0]
    assert [train.files[i] for i in data.few_shot_indices().ravel()] == [
        f"{c:03d}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (4, 5) for i in (5, 2)
    ]
    assert torch.cat([y for _, y in data.images("few")]).tolist() == [3, 3, 4, 4]
    assert len(torch.cat([y for _, y in data.images("test")])) == 10
    (lists / "session_3.txt").write_text("x/005.Bird_5/Bird_5_1.jpg\n")
    with pytest.raises(ValueError, match="data.shot = 2, but the list has another number of images for: 005.Bird_5 1"):
        data.few_shot_indices()
    (lists / "session_3.txt").write_text("x/005.Bird_5/Bird_5_99.jpg\n")
    with pytest.raises(ValueError, match="1 files are not in .*: 005.Bird_5/Bird_5_99.jpg"):
        data.few_shot_indices()
    missing = FewShotImages(**arguments, few_shot=str(tmp_path / "nothing"))
    missing.setup()
    with pytest.raises(ValueError, match="no such file"):
        missing.few_shot_indices()
    seeded = FewShotImages(**arguments)
    seeded.setup()
    assert seeded.few_shot_indices().shape == (2, 2)


def test_cifar100_layout(monkeypatch):
    """The field's list on a stand-in for CIFAR-100 with the right labels at its positions."""
    labels = np.random.default_rng(0).integers(0, 60, 50_000)
    for c, row in enumerate(CIFAR100.split(), start=60):
        labels[[int(n) for n in row.split(",")]] = c
    labels[:60] = range(60)
    whole = from_arrays("CIFAR-100", np.zeros((50_000, 2, 2, 3), np.uint8), labels, [str(c) for c in range(100)])
    monkeypatch.setattr("ssmzoo.data.images.sources.torchvision_images", lambda name, root: (whole, whole))
    data = FewShotImages("torchvision/cifar100", base_classes=60, way=5, shot=5, few_shot="cec")
    data.setup()
    assert data.sessions == 8 and [data.seen(i) for i in (0, 8)] == [60, 100]
    assert data.few_shot_indices().shape == (40, 5)
    assert data.few_shot_indices()[0].tolist() == [29774, 33344, 4815, 6772, 48317]
    assert set(data._open()[0].labels) == set(range(60))


def test_numbers_of_sessions():
    assert [of_session([200, 210], s) for s in (1, 2, 3)] == [200, 210, 210]
    model = MambaFSCIL("vmamba", {"dims": 8}, in_chans=1, num_classes=5, img_size=16, d_state=2)
    assert FewShotIncremental(model, steps=[3, 4]).steps == [3, 4]
    with pytest.raises(ValueError, match="must be positive"):
        FewShotIncremental(model, steps=[3, 0])
    with pytest.raises(ValueError, match="needs model=mamba_fscil"):
        FewShotIncremental(model.backbone)


def test_simplex_of_directions():
    W = simplex_etf(12, 7)
    torch.testing.assert_close(W.T @ W, torch.eye(7) * 7 / 6 - 1 / 6, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least as many dimensions"):
        simplex_etf(5, 7)


def test_losses_of_known_cases():
    W = torch.eye(3)
    f, labels = torch.tensor([[2.0, 0, 0], [0, 3.0, 0]]), torch.tensor([0, 1])
    assert dot_regression(f, labels, W) == 0
    assert dot_regression(f, 1 - labels, W) == 5  # orthogonal: 10 / 2 * 1
    half = dot_regression(f, torch.tensor([[0.5, 0.5, 0], [0, 1.0, 0]]), W)  # mixed labels: the mean of their losses
    assert half == pytest.approx((2.5 + 0) / 2)
    counted = dot_regression(torch.eye(3), torch.tensor([0, 0, 1]), W, with_len=True)  # errors 0, 1, 1
    assert counted == pytest.approx(5 * (1.5 / 2 + 1.5 / 1) / 3)
    z = torch.ones(4, 2, 3)
    found = suppression(z, torch.tensor([0, 0, 5, 5]), base=3, weight_base=100, weight_novel=10)
    assert found["loss_supp_base"].item() == pytest.approx(100 * 12**0.5 / 12)
    assert found["loss_supp_novel"].item() == pytest.approx(-10 * 12**0.5 / 12)
    p = torch.zeros(2, 1, 2, 3)
    p[0, :, 0], p[1, :, 1] = 1, 1
    assert separation(p, torch.tensor([0, 5]), base=3) == 0
    assert separation(torch.ones_like(p), torch.tensor([0, 5]), base=3).item() == pytest.approx(0.5)
    assert separation(p, torch.tensor([0, 1]), base=3) == 0  # one kind only


@pytest.mark.parametrize("version", ["ssm", "ss2d", "mlp"])
def test_a_new_branch_changes_nothing_and_learns(version):
    model = MambaFSCIL("vmamba", {"dims": 8}, in_chans=1, num_classes=5, img_size=16, d_state=4, version=version).eval()
    x = torch.randn(2, 1, 16, 16)
    before = model(x)
    assert before.shape == (2, 5) and before.abs().max() <= 1
    model.add_branch()
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    assert model.neck.block_new.in_proj.weight.grad.abs().max() > 0
    assert model.neck.block.in_proj.weight.grad is None  # detached
    with pytest.raises(ValueError, match="square maps"):
        model.neck(torch.randn(1, 16, 3, 2))
    with pytest.raises(ValueError, match="use_residual_proj"):
        MambaNeck(8, 12)


def test_any_backbone():
    for name, extra in (("spatial_mamba", {"embed_dim": 8}), ("vim", {"img_size": 16, "embed_dim": 16})):
        model = MambaFSCIL(name, extra, in_chans=1, num_classes=5, img_size=16, d_state=2)
        assert model(torch.randn(2, 1, 16, 16)).shape == (2, 5)
    with pytest.raises(ValueError, match="unknown model"):
        MambaFSCIL("vmambo")


def test_protocol(monkeypatch, tmp_path):
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    levels = generator.integers(0, 60, (48, 16, 16), dtype=np.uint8)
    for image, label in zip(levels, labels):
        image[4 * label : 4 * label + 4] += 150
    whole = from_arrays("bars", levels, labels, list("abcd"))
    monkeypatch.setattr("ssmzoo.data.images.sources.digits", lambda fraction, seed: (whole, whole))
    data = FewShotImages(image_size=16, base_classes=2, way=1, shot=2, batch_size=8)
    data.setup()
    model = MambaFSCIL("vmamba", {"dims": 8}, in_chans=1, num_classes=4, img_size=16, d_state=2)
    task = FewShotIncremental(model, steps=[10, 8], lr=0.05, copy=2, base_copy=[2, 1])
    task._trainer = types.SimpleNamespace(datamodule=data)
    monkeypatch.setattr(FewShotIncremental, "trainer", property(lambda self: self._trainer))
    first = model.neck.mlp_proj[0].weight.clone()
    report = task.report(tmp_path, {"top1": 1.0})
    assert len(report.rows["top-1 per session"].split()) == 3 and (tmp_path / "sessions.safetensors").exists()
    assert torch.equal(model.neck.mlp_proj[0].weight, first)  # old_lr = 0
    assert (tmp_path / "sessions.csv").read_text().count("\n") == 4


def test_ablations_without_the_second_branch_and_without_a_scan():
    def model(version="ssm"):
        return MambaFSCIL("vmamba", {"dims": 8}, in_chans=1, num_classes=5, img_size=16, d_state=4, version=version)

    with pytest.raises(ValueError, match="task.weight_sep_new=0"):
        FewShotIncremental(model("mlp"))
    FewShotIncremental(model("mlp"), weight_sep_new=0.0)
    task = FewShotIncremental(model(), dual_branch=False, steps=6, batch_size=4)
    before = {n: p.detach().clone() for n, p in task.model.neck.named_parameters()}
    task.learn(torch.randn(6, 16, 2, 2), torch.tensor([0, 1, 2, 3, 4, 4]), base=3, steps=6)
    changed = {n for n, p in task.model.neck.named_parameters() if not torch.equal(p, before[n])}
    assert not task.model.neck.use_new_branch and {"block.in_proj.weight", "mlp_proj.0.weight"} <= changed


def test_mixing_in_the_base_session():
    model = MambaFSCIL("vmamba", {"dims": 8}, in_chans=1, num_classes=5, img_size=16, d_state=2)
    batch = {"image": torch.randn(4, 1, 16, 16), "label": torch.tensor([0, 1, 2, 2])}

    def loss(training=True, **options):
        torch.manual_seed(0)
        np.random.seed(0)
        task = FewShotIncremental(model, **options)
        task._trainer = types.SimpleNamespace(datamodule=types.SimpleNamespace(base_classes=3))
        copied = {k: v.clone() for k, v in batch.items()}
        return task.step(copied, training).loss.item()

    plain, mixed = loss(), loss(base_mixup=0.8, base_cutmix=1.0, base_mix_prob=1.0)
    assert plain == loss(base_mixup=0.8, base_mix_prob=0.0) != mixed
    assert loss(False, base_mixup=0.8, base_mix_prob=1.0) == loss(False)
    assert loss(base_mixup=0.8, base_cutmix=1.0, base_mix_prob=1.0, base_plain_again=True) > mixed
    with pytest.raises(ValueError, match="task.base_mix_prob = 2"):
        loss(base_mix_prob=2)


def test_rate_of_a_session():
    rates = [session_rate(s, 100) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[5] and rates[-1] == 0.001


@pytest.mark.parametrize(
    "arguments, whole, new",
    [
        (dict(), 6_590_720, 3_295_360),
        (dict(out_channels=512, feat_size=5, use_residual_proj=True), 5_799_424, 2_735_872),
        (
            dict(
                in_channels=512,
                out_channels=1024,
                feat_size=7,
                version="ss2d",
                num_layers_new=3,
                use_residual_proj=True,
            ),
            19_844_096,
            10_234_880,
        ),
    ],
)
def test_published_sizes_of_the_neck(arguments, whole, new):
    """CIFAR-100, miniImageNet and CUB-200: both branches, and the new one alone."""
    with torch.device("meta"):
        sizes = {n: p.numel() for n, p in MambaNeck(**arguments, use_new_branch=True).named_parameters()}
    assert sum(sizes.values()) == whole and sum(s for n, s in sizes.items() if "_new" in n) == new
