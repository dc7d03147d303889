"""Detectors: sizes that the data gives, FrozenBatchNorm, RoIAlign and NMS, at reduced size."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_same_outputs, masked_copy, outputs, randomise
from torch import Tensor, nn

from compress import L1FilterPruner, ModelSpeedup

torchvision = pytest.importorskip("torchvision")

from torchvision.models import detection  # noqa: E402
from torchvision.models.detection import anchor_utils  # noqa: E402
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, misc  # noqa: E402

# Detections whatever the scores: with random weights there would be none to compare.
RCNN = {
    "min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 12,
    "rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30,
}  # fmt: skip
ONE_STAGE = {"score_thresh": 0.0, "detections_per_img": 12, "topk_candidates": 30}
HEADS = (r"cls_score|bbox_pred|bbox_reg|cls_logits|mask_fcn_logits|_head\.module_list\.\d").split(
    "|"
)


class Pyramid(nn.Module):
    """A small backbone with frozen norms and three levels of features, as an FPN gives them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        norm = FrozenBatchNorm2d
        self.stem = misc.Conv2dNormActivation(3, 8, 3, 2, norm_layer=norm)
        self.stages = nn.ModuleList(
            misc.Conv2dNormActivation(a, b, 3, 2, norm_layer=norm)
            for a, b in [(8, 12), (12, 16), (16, 20)]
        )
        self.fpn = torchvision.ops.FeaturePyramidNetwork([12, 16, 20], width)
        self.out_channels = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, levels = self.stem(x), {}
        for index, stage in enumerate(self.stages):
            x = levels[str(index)] = stage(x)
        return self.fpn(levels)  # type: ignore[no-any-return]


def anchors() -> Any:
    sizes = ((8,), (16,), (32,))
    return anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))


def faster_rcnn() -> nn.Module:
    pool = MultiScaleRoIAlign(["0", "1", "2"], output_size=3, sampling_ratio=2)
    head = detection.faster_rcnn.TwoMLPHead(16 * 9, 24)
    box = detection.faster_rcnn.FastRCNNPredictor(24, 3)
    return detection.FasterRCNN(
        Pyramid(), rpn_anchor_generator=anchors(), box_roi_pool=pool, box_head=head,
        box_predictor=box, **RCNN,
    )  # fmt: skip


def mask_rcnn() -> nn.Module:
    pools = [MultiScaleRoIAlign(["0", "1", "2"], size, 2) for size in (3, 4)]
    return detection.MaskRCNN(
        Pyramid(), rpn_anchor_generator=anchors(), box_roi_pool=pools[0], mask_roi_pool=pools[1],
        box_head=detection.faster_rcnn.TwoMLPHead(16 * 9, 24),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(24, 3),
        mask_head=detection.mask_rcnn.MaskRCNNHeads(16, (10, 10), 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(10, 10, 3), **RCNN,
    )  # fmt: skip


def retinanet() -> nn.Module:
    return detection.RetinaNet(
        Pyramid(), 3, anchor_generator=anchors(), min_size=64, max_size=96, **ONE_STAGE
    )


def ssd() -> nn.Module:
    boxes = anchor_utils.DefaultBoxGenerator([[2]] * 3, min_ratio=0.2, max_ratio=0.9)
    head = detection.ssd.SSDHead([16] * 3, boxes.num_anchors_per_location(), 3)
    return detection.ssd.SSD(Pyramid(), boxes, (64, 64), 3, head=head, **ONE_STAGE)


def pictures(count: int, side: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(side + count)
    return [torch.rand(3, side, side + 8 * i, generator=generator) for i in range(count)]


def pruned(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Masks on half of the filters of each layer but those that make the outputs."""
    heads = [n for n, _ in model.named_modules() if any(re.search(f"{h}$", n) for h in HEADS)]
    config = [
        {"sparsity_per_layer": 0.5, "op_types": ["default"]},
        {"exclude": True, "op_names": heads},
    ]
    masks = L1FilterPruner(copy.deepcopy(model), config).calc_masks()
    return {path: dict(each) for path, each in masks.items()}


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn, retinanet, ssd])
def test_a_detector_shrinks_and_finds_the_same_boxes(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    randomise(model)
    masks = pruned(model)
    reference = masked_copy(model, masks).eval()
    speedup = ModelSpeedup(model, (pictures(1),), masks)
    speedup.speedup_model()
    report = speedup.report
    # Nothing stays but what other levels add to, and one carrier of constants before a border.
    reasons = [reason for each in report.layers for reason in each.kept]
    assert all(reason.startswith(("is read by", "carries the constants")) for reason in reasons)
    assert report.parameters_after < 0.55 * report.parameters_before
    for batch in (pictures(2), pictures(3, 80)):
        with torch.no_grad():
            expected = outputs(reference, batch)
            assert min(len(t) for t in expected) > 0
            assert_same_outputs(expected, outputs(model, batch), 1e-5)


def test_a_picture_in_which_nothing_is_found_will_do() -> None:
    torch.manual_seed(0)
    model = mask_rcnn().eval()
    randomise(model)
    masks = pruned(model)
    reference = masked_copy(model, masks).eval()
    model.roi_heads.score_thresh = 1.1  # type: ignore[union-attr, assignment]
    ModelSpeedup(model, (pictures(1),), masks).speedup_model()
    model.roi_heads.score_thresh = 0.0  # type: ignore[union-attr, assignment]
    assert model.roi_heads.mask_head[0][0].out_channels == 5  # type: ignore[index, union-attr]
    with torch.no_grad():
        expected = outputs(reference, pictures(2))
        assert_same_outputs(expected, outputs(model, pictures(2)), 1e-5)
