"""Object detection: any image backbone of the zoo under torchvision's RetinaNet or Mask R-CNN.

    maps x_i  ->  feature pyramid  p_i = Conv3x3(Conv1x1(x_i) + up(...)), further levels by stride 2
    retinanet   every position of every level: k class scores and 4 offsets for each of 9 anchors        (one stage)
    mask_rcnn   a region proposal network, then classes, boxes and masks of the proposals               (two stages)

Anchors of a level have the side anchor_scale x its stride (times 2^(0, 1/3, 2/3) in RetinaNet) and three shapes. Where
torchvision's compiled operators cannot load, nms and roi_align are those of detector_layers/box_ops.py.
Against mmdetection's heads: boxes are regressed with smooth L1 (beta 1/9) rather than L1, anchors are rounded to whole
pixels, and RoIAlign takes 2 samples per side without the half-pixel shift.

b images, n objects, k classes (0 .. k-1; torchvision's background class is added and removed here), y x pixels.
Source: Lin et al. 2017 (FPN 1612.03144, RetinaNet 1708.02002), He et al. 2017 (Mask R-CNN 1703.06870).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ssmzoo.layers.image.dense_neck import DenseMaps
from ssmzoo.models.dense_network import DenseNetwork, build_backbone
from ssmzoo.models.detector_layers.box_ops import use_where_missing
from ssmzoo.suggest import check_slot, nearest

HEADS = ("retinanet", "mask_rcnn")
RESULTS = {"score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100}
EXTRA = ("no level", "a level by pooling", "two levels by convolutions")


def torchvision_detection():
    """torchvision.models.detection and .ops, ready to be used; ValueError in words without torchvision."""
    from ssmzoo._torchvision import make_importable

    try:
        make_importable()
        import torchvision.ops as ops
        from torchvision.models import detection
    except ImportError:
        raise ValueError("detection needs torchvision: pip install torchvision") from None
    use_where_missing()
    return detection, ops


class PyramidMaps(nn.Module):
    """Images (b c y x) -> {"0": (b channels y_0 x_0), ...}: torchvision's form of a backbone with its FPN."""

    def __init__(self, maps: DenseMaps, channels: int, extra_levels: int):
        super().__init__()
        ops = torchvision_detection()[1].feature_pyramid_network
        blocks = (None, ops.LastLevelMaxPool, lambda: ops.LastLevelP6P7(channels, channels))
        extra = blocks[extra_levels]() if extra_levels else None
        self.body, self.out_channels = maps, channels
        self.fpn = ops.FeaturePyramidNetwork(maps.dims, channels, extra_blocks=extra)
        self.strides = list(maps.strides)
        self.strides += [self.strides[-1] * 2 ** (i + 1) for i in range(extra_levels)]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), m) for i, m in enumerate(self.body(x))))


class Detector(DenseNetwork):
    """Training: (images, targets) -> {name of a loss: scalar}; evaluation: images -> list of {"boxes" (n 4), "labels"
    (n), "scores" (n), and of Mask R-CNN "masks" (n y x) probabilities}. Images are lists of (3 y x) in [0, 1].

    backbone      as in `Segmenter`
    num_classes   k, without background
    head          "retinanet" or "mask_rcnn"
    channels      width of the pyramid and of the heads
    min_stride    finer maps are left out; None: as published (RetinaNet 8, Mask R-CNN 0)
    extra_levels  0; 1, by pooling; 2, by convolutions;  None: as published (RetinaNet 2, Mask R-CNN 1)
    anchor_scale  side of the smallest anchors over the stride; None: as published (4, Mask R-CNN 8)
    min_size, max_size   pictures are resized to this short side (drawn from a list when training) and at most that long
    results       {"score_thresh": 0.05, "nms_thresh": 0.5, "detections_per_img": 100}: what counts as found
    out_indices, tap     see `DenseMaps`
    """

    maps_name = "detector.backbone.body"

    def __init__(
        self,
        backbone: Mapping | str | nn.Module,
        num_classes: int = 80,
        head: str = "retinanet",
        channels: int = 256,
        min_stride: int | None = None,
        extra_levels: int | None = None,
        anchor_scale: float | None = None,
        min_size: int | Sequence[int] = 800,
        max_size: int = 1333,
        results: dict | None = None,
        out_indices: Sequence[int] | None = None,
        tap: str = "stream",
    ):
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head = {head!r}{nearest(head, HEADS)}; choose one of {', '.join(HEADS)}")
        if extra_levels not in (None, 0, 1, 2):
            raise ValueError(f"extra_levels = {extra_levels}; choose 0, 1 or 2: {', '.join(EXTRA)}")
        one_stage = head == "retinanet"
        finest = (8 if one_stage else 0) if min_stride is None else min_stride
        maps = DenseMaps(build_backbone(backbone), out_indices, tap, finest)
        extra = (2 if one_stage else 1) if extra_levels is None else extra_levels
        pyramid = PyramidMaps(maps, channels, extra)
        scale = anchor_scale or (4 if one_stage else 8)
        sizes = [s * scale for s in pyramid.strides]
        common = dict(min_size=min_size, max_size=max_size, size_divisible=maps.multiple)
        check_slot("results", results, list(RESULTS), "the detector", TypeError)
        limits = (RESULTS | dict(results or {})).values()
        make = retinanet if one_stage else mask_rcnn
        self.num_classes, self.detector = num_classes, make(pyramid, num_classes + 1, sizes, *limits, **common)

    @property
    def maps(self) -> DenseMaps:
        return self.detector.backbone.body

    def forward(self, images: list[Tensor], targets: list[dict] | None = None):
        if targets is None:
            return [self.found(d) for d in self.detector(images)]
        return self.detector(images, [self.shifted(t) for t in targets])

    def losses(self, images: list[Tensor], targets: list[dict]) -> dict[str, Tensor]:
        """Those of training, for a model in evaluation mode: its norms keep their statistics, nothing drops out."""
        switched = [self.detector, self.detector.transform]
        switched += [m for m in (getattr(self.detector, n, None) for n in ("rpn", "roi_heads")) if m is not None]
        before = [m.training for m in switched]
        try:
            for m in switched:
                m.training = True
            return self.forward(images, targets)
        finally:
            for m, was in zip(switched, before):
                m.training = was

    @staticmethod
    def shifted(target: dict) -> dict:
        """Labels from 1, as torchvision has them."""
        kept = {k: target[k] for k in ("boxes", "masks") if k in target}
        return kept | {"labels": target["labels"] + 1}

    @staticmethod
    def found(result: dict) -> dict:
        """Labels from 0; RetinaNet's logit 0, the background's, is no object, however sure an untrained one is."""
        kept = result["labels"] > 0
        result = {k: v[kept] for k, v in result.items()}
        masks = {"masks": result["masks"][:, 0]} if "masks" in result else {}
        return {"boxes": result["boxes"], "labels": result["labels"] - 1, "scores": result["scores"]} | masks


def retinanet(
    pyramid: PyramidMaps, classes: int, sizes, score: float, overlap: float, most: int, **common
) -> nn.Module:
    detection, _ = torchvision_detection()
    sizes = tuple(tuple(s * 2 ** (i / 3) for i in range(3)) for s in sizes)
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    limits = dict(score_thresh=score, nms_thresh=overlap, detections_per_img=most)
    return detection.RetinaNet(pyramid, classes, anchor_generator=anchors, **limits, **common)


def mask_rcnn(
    pyramid: PyramidMaps, classes: int, sizes, score: float, overlap: float, most: int, **common
) -> nn.Module:
    """With the published heads for 256 channels; for fewer they are as much narrower."""
    detection, ops = torchvision_detection()
    names, width = [str(i) for i in range(len(pyramid.body.strides))], pyramid.out_channels
    anchors = detection.anchor_utils.AnchorGenerator(tuple((s,) for s in sizes), ((0.5, 1.0, 2.0),) * len(sizes))
    return detection.MaskRCNN(
        pyramid,
        rpn_anchor_generator=anchors,
        box_roi_pool=ops.MultiScaleRoIAlign(names, 7, 2),
        box_head=detection.faster_rcnn.TwoMLPHead(width * 49, 4 * width),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(4 * width, classes),
        mask_roi_pool=ops.MultiScaleRoIAlign(names, 14, 2),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(width, width, classes),
        box_score_thresh=score,
        box_nms_thresh=overlap,
        box_detections_per_img=most,
        **common,
    )
