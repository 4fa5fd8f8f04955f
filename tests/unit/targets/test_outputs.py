"""Targets of other outputs: pixels of a segmentation, boxes of a detector, embeddings."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

import camkit
from camkit import targets
from camkit._tools.nested import split
from camkit.targets import bind, key
from helpers import reference
from helpers.families import tiny
from helpers.outputs import (
    FAR,
    HALF,
    MASK,
    SEGMENTED,
    A,
    Wrapped,
    detections,
    refused,
    scores,
)


@pytest.mark.parametrize("kind", [lambda mask: mask, lambda mask: mask.numpy()], ids=["tensor", "array"])
def test_pixels(kind: Callable[[Tensor], Any]) -> None:
    values, _ = scores(targets.pixels(kind(MASK), 1), SEGMENTED, 2)
    assert values.tolist() == [6 + 10 + 11, 24 + 28 + 29]
    values, _ = scores(targets.pixels(kind(torch.stack([MASK, ~MASK])), 2), SEGMENTED, 2)
    assert values.tolist() == [12 + 16 + 17, 31 + 32 + 33]


@pytest.mark.parametrize(
    ("found", "expected", "gradient"),
    [
        ([(A, 1, 0.25)], 0.25, [1]),
        ([(HALF, 1, 0.75)], 0.25, [1 / 3]),  # overlap 2 x 2, union 8 + 8 - 4
        ([(HALF, 1, 0.9), (A, 1, 0.25)], 0.3, [1 / 3, 0]),
        ([(A, 2, 1.0), (HALF, 1, 0.75), (FAR, 1, 1.0)], 0.25, [0, 1 / 3, 0]),
        ([([0.0, 0.0, 4.0, 1.0], 1, 0.5), ([-4.0, -2.0, 8.0, 4.0], 1, 0.5)], 0.25, [0.5, 0]),
        ([(FAR, 1, 1.0)], 0, [0]),
        ([(A, 2, 1.0)], 0, [0]),
        ([], 0, []),
    ],
)
def test_box(found: Any, expected: float, gradient: list[float]) -> None:
    """The highest product of detection score and overlap, among the detections with the label.

    The gradient reaches the detection score of that product.
    """
    output = [detections(*found), detections((A, 1, 0.5))]
    for corners in (A, torch.tensor([A, A])):
        values, _ = scores(targets.box(corners, 1), output, 2)
        assert values.tolist() == pytest.approx([expected, 0.5])
    (gradients,) = torch.autograd.grad(values[0], [output[0]["scores"]])
    assert gradients.tolist() == pytest.approx(gradient)


def test_box_of_each_image() -> None:
    output = [detections((A, 1, 0.5)), detections((A, 1, 0.5))]
    assert scores(targets.box(torch.tensor([A, HALF]), 1), output, 2)[0].tolist() == pytest.approx(
        [0.5, 0.5 / 3]
    )


def test_similarity() -> None:
    output = torch.tensor([[3.0, 4.0, 0.0], [0.0, -2.0, 0.0]])
    one = torch.tensor([0.0, 5.0, 0.0])
    assert scores(targets.similarity(one), output, 2)[0].tolist() == pytest.approx([0.8, -1])
    each = torch.tensor([[6, 8, 0], [1, 1, 0]])
    values = scores(targets.similarity(each), output, 2)[0]
    assert values.tolist() == pytest.approx([1, -(0.5**0.5)])


def test_pixels_of_another_number_of_images() -> None:
    with pytest.raises(ValueError, match="^mask: expected .*, got 3 x 2 x 3$"):
        refused(lambda: targets.pixels(MASK.expand(3, 2, 3), 1), SEGMENTED)


class Segmenter(nn.Module):
    """Outputs the logits of three classes at each position, at the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU())
        self.head = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.trunk(x))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear")


def test_pixels_of_a_segmentation() -> None:
    model, x = tiny(Segmenter), torch.randn(2, 3, 8, 12).double()
    in_dict = Wrapped(model, lambda f, y: {"aux": f, "out": y})
    masks = torch.rand(2, 8, 12) > 0.5
    for mask, each in [(masks, masks), (masks[0], masks[[0, 0]])]:
        target = targets.pixels(mask, 1)
        explained = camkit.GradCAM(model, layer="trunk")(x, target)
        for n in range(2):
            spots = each[n].nonzero().tolist()
            pair = reference.activation_and_gradient(
                model,
                "trunk",
                x[n],
                lambda y, spots=spots: torch.stack([y[1, i, j] for i, j in spots]).sum(),  # type: ignore[misc]
            )
            assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-12)
        assert explained.maps.amax() > 0
        of_entry = camkit.GradCAM(in_dict, layer="inner.trunk")(x, key("out", target))
        assert_close(of_entry.maps, explained.maps, rtol=1e-12, atol=0)


def detector(most: int = 20) -> nn.Module:
    """torchvision's SSD with a backbone of two convolutions."""
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU())
    backbone.out_channels = [6]  # type: ignore[assignment]
    anchors = DefaultBoxGenerator([[2]], scales=[0.3, 0.6])
    model: nn.Module = SSD(backbone, anchors, (32, 32), 3, nms_thresh=1, detections_per_img=most)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
        model.get_parameter("backbone.2.bias").fill_(1)  # so that the ReLU has positive outputs
    return model.double().eval()


CORNERS_OF_EACH = torch.tensor([[4.0, 5.0, 21.0, 24.0], [10.0, 2.0, 30.0, 18.0]]).double()


def test_box_of_a_detector_of_torchvision() -> None:
    model, x = detector(), torch.rand(2, 3, 32, 32).double()
    explained = camkit.GradCAM(model, layer="backbone.3")(x, targets.box(CORNERS_OF_EACH, 2))
    for n in range(2):

        def score(found: Any, corners: Tensor = CORNERS_OF_EACH[n]) -> Tensor:
            overlaps = box_iou(found["boxes"], corners[None])[:, 0]
            return torch.stack(
                [
                    s * o
                    for s, o, label in zip(found["scores"], overlaps, found["labels"], strict=True)
                    if label == 2
                ]
            ).max()

        pair = reference.activation_and_gradient(model, "backbone.3", x[n], score)
        assert_close(explained.maps[n], reference.grad_cam(*pair), rtol=1e-9, atol=1e-15)
    assert explained.maps.amax() > 0


@pytest.mark.parametrize("most", [20, 12])  # one pass has 12 copies of images, too
def test_box_while_the_input_is_masked(most: int) -> None:
    model, x = detector(most), torch.rand(2, 3, 32, 32).double()
    found = model(x)
    assert [len(one["scores"]) for one in found] == [most, most]
    target = targets.box(CORNERS_OF_EACH, found[0]["labels"][0].item())
    one_by_one = camkit.ScoreCAM(model, "backbone.3", chunk_size=1)(x, target).maps
    assert one_by_one.amax() > 0
    assert_close(camkit.ScoreCAM(model, "backbone.3", chunk_size=32)(x, target).maps, one_by_one)


def test_box_while_a_channel_is_left_out() -> None:
    model, x, found = detector(), torch.rand(2, 3, 32, 32).double(), 0.0
    label = model(x)[1]["labels"][0].item()
    for offset, sign in [(0, 1), (2, -1)]:

        def score(output: Any, corners: Tensor = CORNERS_OF_EACH, a: int = offset, b: int = sign) -> Tensor:
            return a + b * targets.box(corners, label)(output)

        explained = camkit.AblationCAM(model, "backbone.3")(x, score)
        found += explained.maps.amax().item()
        for n, corners in enumerate(CORNERS_OF_EACH):

            def one(output: Any, corners: Tensor = corners, score: Any = score) -> Tensor:
                return score([output], corners)[0]  # type: ignore[no-any-return]

            activation, _ = reference.activation_and_gradient(model, "backbone.3", x[n], one)
            edits = [functools.partial(reference.without_channel, kind="NCHW", k=k) for k in range(6)]
            outputs = [reference.output_with(model, "backbone.3", x[n], edit) for edit in edits]
            whole, without = one(model(x[n : n + 1])[0]).item(), [one(output).item() for output in outputs]
            expected = reference.ablation_cam(activation, whole, without)
            assert_close(explained.maps[n], expected, rtol=1e-9, atol=1e-12)
    assert found > 0


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (lambda found: {"found": found}, key("found", targets.box(A, 1))),
        (lambda found: (torch.zeros(3), found), key(1, targets.box(A, 1))),
        (tuple, targets.box(A, 1)),
    ],
)
def test_detections_wherever_they_lie_in_the_output(kind: Any, target: Any) -> None:
    """A list with one dict per image is split by images at every depth of the output."""
    found = [detections((A, 1, float(n))) for n in range(6)]
    parts = split(kind(found), 2, 6)
    assert [bind(target, part, 2).score(part).tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


def test_what_is_no_number_outside_the_mask_does_not_matter() -> None:
    output = torch.full((1, 2, 2, 3), torch.nan)
    output[0, 1, 0, 0] = 3
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[0, 0] = True
    assert targets.pixels(mask, 1)(output).tolist() == [3]
