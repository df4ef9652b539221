"""Heads for dense prediction on every image backbone: shapes, gradients, published sizes, torchvision's operators."""

import pytest
import torch

from ssmzoo.models.detector import Detector
from ssmzoo.models.detector_layers.box_ops import nms, roi_align
from ssmzoo.models.segmenter import ConvHead, Segmenter, UPerHead
from ssmzoo.presets import read_model_config
from ssmzoo.tasks.dense_network import backbones

PYRAMIDS = ["mamba_vision", "mambaout", "res_vmamba", "spatial_mamba", "vmamba"]
PLAIN = ["adventurer", "mamba_reg_small", "shuffle_mamba", "vim"]
SMALL = {"mamba_reg_small": {"embed_dim": 48, "depth": 4}, "vim": {"embed_dim": 32}}


def node(name: str) -> dict:
    found = {k: v for k, v in read_model_config(name)["model"].items() if not str(v).startswith("${")}
    found |= SMALL.get(name, {}) | {"num_classes": 0}
    return found | ({"img_size": 64} if name in PLAIN else {})


def test_the_list_for_messages_names_the_backbones():
    assert set(PYRAMIDS) <= set(backbones()) and {"vim", "adventurer"} <= set(backbones())


@pytest.mark.parametrize("head", ["upernet", "linear"])
@pytest.mark.parametrize("name", [*PYRAMIDS, *PLAIN])
def test_a_segmenter_reads_any_backbone(name, head):
    model = Segmenter(node(name), 5, head, channels=8, auxiliary=4, drop_rate=0.0)
    x = torch.randn(2, 3, 44, 72)  # no multiple of any stride
    out = model(x)
    finest = [-(-side // model.maps.strides[0]) for side in (44, 72)]
    assert list(out.logits.shape) == [2, 5, *finest] and model.segment(x).shape == (2, 5, 44, 72)
    weight = torch.randn_like(out.logits)
    loss = (out.logits * weight).mean() + (0 if out.auxiliary is None else out.auxiliary.square().mean())
    loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert not idle and all(p.grad.isfinite().all() for p in model.parameters())
    assert (out.auxiliary is not None) == (head == "upernet")
    assert model.eval()(x).auxiliary is None


@pytest.mark.parametrize("name", [*PYRAMIDS, "vim"])
def test_a_detector_reads_any_backbone(name):
    model = Detector(node(name), 3, channels=8, extra_levels=1, anchor_scale=4, min_size=64)
    images = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 30.0, 40.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},  # nothing to be found
    ]
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert set(losses) == {"classification", "bbox_regression"}
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    model.eval()
    found = model(images)
    assert [set(f) for f in found] == [{"boxes", "labels", "scores"}] * 2
    assert all(((0 <= f["labels"]) & (f["labels"] < 3)).all() for f in found)
    again = model.losses(images, targets)
    assert set(again) == set(losses) and not model.training and not model.detector.training


def test_mask_rcnn_learns_boxes_and_masks():
    model = Detector(node("vmamba"), 2, "mask_rcnn", channels=8, anchor_scale=4, min_size=64)
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[:, 10:40, 12:36] = 1
    target = {"boxes": torch.tensor([[12.0, 10.0, 36.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask}
    losses = model([torch.rand(3, 64, 64)], [target])
    sum(losses.values()).backward()
    assert {"loss_mask", "loss_classifier", "loss_objectness"} <= set(losses)
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    found = model.eval()([torch.rand(3, 64, 64)])[0]
    assert found["masks"].shape == (len(found["boxes"]), 64, 64)


def test_published_sizes_of_upernet():
    """Of mmsegmentation's classes, as the papers use them: widths 96 to 768, 150 classes."""
    with torch.device("meta"):
        assert sum(p.numel() for p in UPerHead([96, 192, 384, 768], 150, 512).parameters()) == 31_497_366
        assert sum(p.numel() for p in ConvHead(384, 150, 256).parameters()) == 923_798


def test_upernet_by_its_equations():
    """Against the sum of the equations in double precision, with plain torch and in another order of work."""
    from torch.nn import functional as F

    head = UPerHead([4, 6, 8], 5, channels=3, drop_rate=0.1).double().eval()
    for p in head.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = [torch.randn(2, d, s, s, dtype=torch.float64) for d, s in ((4, 12), (6, 6), (8, 3))]
    w = head.state_dict()

    def conv(name, value):
        kernel, n = w[f"{name}.conv.weight"], f"{name}.bn"
        value = F.conv2d(value, kernel, padding=kernel.shape[-1] // 2)
        scale = w[f"{n}.weight"] / (w[f"{n}.running_var"] + 1e-5).sqrt()
        value = (value - w[f"{n}.running_mean"][:, None, None]) * scale[:, None, None] + w[f"{n}.bias"][:, None, None]
        return value.clamp(min=0)

    def up(value, like):
        return F.interpolate(value, like.shape[2:], mode="bilinear", align_corners=False)

    pools = [conv(f"psp_modules.{i}.1", F.adaptive_avg_pool2d(x[2], s)) for i, s in enumerate((1, 2, 3, 6))]
    l2 = conv("bottleneck", torch.cat([x[2], *(up(p, x[2]) for p in pools)], 1))
    l1 = conv("lateral_convs.1", x[1])
    l1 = l1 + up(l2, l1)
    l0 = conv("lateral_convs.0", x[0])
    l0 = l0 + up(l1, l0)
    o = [conv("fpn_convs.0", l0), up(conv("fpn_convs.1", l1), l0), up(l2, l0)]
    expected = F.conv2d(conv("fpn_bottleneck", torch.cat(o, 1)), w["conv_seg.weight"], w["conv_seg.bias"])
    assert torch.allclose(head(x), expected, atol=1e-12)


def test_a_batch_of_one_trains():
    """Pyramid pooling to one pixel leaves a single value per channel, which has no variance."""
    Segmenter(node("vmamba"), 3, channels=4, auxiliary=0)(torch.randn(1, 3, 32, 32)).logits.sum().backward()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Segmenter("mamba", 3), "takes no argument 'num_classes'"),
        (lambda: Segmenter(torch.nn.Linear(3, 3), 3), "Linear has no feature maps"),
        (lambda: Segmenter(node("vmamba"), 3, "upernett"), "nearest: upernet"),
        (lambda: Segmenter(node("vmamba"), 1), "two classes or more"),
        (lambda: Segmenter(node("vim") | {"patch_size": 12, "img_size": 48}, 3), "power of two"),
        (lambda: Segmenter(node("vim"), 3, out_indices=[0, 1]), "name four blocks"),
        (lambda: Detector(node("vmamba"), 3, "yolo"), "choose one of retinanet, mask_rcnn"),
        (lambda: Detector(node("vmamba"), 3, extra_levels=3), "choose 0, 1 or 2"),
        (lambda: Detector(node("vmamba"), 3, results={"nms_treshold": 1}), "nearest: nms_thresh"),
    ],
)
def test_what_cannot_be_built_is_said_in_words(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_weights_of_a_classifier_fill_the_backbone():
    from ssmzoo.presets import build_model
    from ssmzoo.train.init_from import take

    classifier = build_model(node("vmamba") | {"num_classes": 10})
    model = Segmenter(node("vmamba"), 3, channels=4)
    said = take(model.backbone, classifier.state_dict(), "init_from=x", "x")
    assert "starting from x" in said
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[name]), name


def test_layer_decay_knows_the_backbone_inside():
    from ssmzoo.train.optim import _depths

    pytest.importorskip("timm")
    for name, network in (("vmamba", Segmenter), ("vim", Segmenter), ("spatial_mamba", Detector)):
        model = network(node(name), 3, channels=8)
        depths = _depths(model)
        stem = {d for n, d in depths.items() if "patch_embed" in n}
        heads = {
            d for n, d in depths.items() if "layers" not in n and "backbone.patch_embed" not in n and "pos" not in n
        }
        assert stem == {0} and min(heads - {0}) == max(depths.values())


def greedy(boxes, scores, threshold):
    """The definition: take the best, drop what overlaps with it, and so on."""
    from torchvision.ops.boxes import box_iou

    left, kept = scores.argsort(descending=True, stable=True).tolist(), []
    while left:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if box_iou(boxes[best][None], boxes[i][None]) <= threshold]
    return kept


@pytest.mark.parametrize("n", [0, 1, 2, 40, 150])
def test_nms_is_the_greedy_one(n):
    corners = torch.rand(n, 2) * 60
    boxes = torch.cat([corners, corners + 5 + torch.rand(n, 2) * 40], 1)
    scores = torch.rand(n)
    assert nms(boxes, scores, 0.4).tolist() == greedy(boxes, scores, 0.4)


@pytest.mark.parametrize("ratio, aligned", [(2, False), (-1, False), (3, True)])
def test_roi_align_by_its_definition(ratio, aligned):
    maps = torch.randn(2, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[0, 1.0, 2, 9, 12], [1, 0, 0, 20, 17], [1, 4, 3, 5, 15], [0, 18, 14, 30, 25]]).double()
    found = roi_align(maps, boxes, (3, 2), 0.5, ratio, aligned)

    def pixel(image, y, x):
        if y < -1 or y > 9 or x < -1 or x > 11:
            return image.new_zeros(3)
        y, x = min(max(y, 0), 8), min(max(x, 0), 10)
        y0, x0 = min(int(y), 7), min(int(x), 9)
        dy, dx = y - y0, x - x0
        top = image[:, y0, x0] * (1 - dx) + image[:, y0, x0 + 1] * dx
        return top * (1 - dy) + (image[:, y0 + 1, x0] * (1 - dx) + image[:, y0 + 1, x0 + 1] * dx) * dy

    for k, (index, x0, y0, x1, y1) in enumerate(boxes.tolist()):
        shift = 0.5 if aligned else 0.0
        left, top = x0 * 0.5 - shift, y0 * 0.5 - shift
        width, height = (max(v, 0.0 if aligned else 1.0) for v in ((x1 - x0) * 0.5, (y1 - y0) * 0.5))
        ry, rx = (ratio, ratio) if ratio > 0 else (-(-height // 3), -(-width // 2))
        for i in range(3):
            for j in range(2):
                values = [
                    pixel(
                        maps[int(index)],
                        top + (i + (a + 0.5) / ry) * height / 3,
                        left + (j + (b + 0.5) / rx) * width / 2,
                    )
                    for a in range(int(ry))
                    for b in range(int(rx))
                ]
                assert torch.allclose(found[k, :, i, j], torch.stack(values).mean(0), atol=1e-12)
    found.sum().backward()
    assert maps.grad.isfinite().all() and maps.grad.abs().sum() > 0
