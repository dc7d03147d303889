"""Scenes for a detector: handwritten digits on a dark canvas, with a box and a label for each."""

from __future__ import annotations

import torch
from _data import digits
from torch import Tensor
from torch.nn import functional as F

SIDE = 64
Scene = tuple[Tensor, dict[str, Tensor]]  # an image (1, SIDE, SIDE), its boxes and labels


def scenes(count: int, seed: int, *, train: bool) -> list[Scene]:
    """``count`` scenes of up to four digits, which do not touch, of 16 to 24 pixels.

    Those to train with and those to test with show other digits. ``boxes`` are (digits, 4) as
    (x1, y1, x2, y2); ``labels`` are 1 to 10, as a detector's 0 is the background.
    """
    data = digits(size=8)
    images, labels = (data.train if train else data.test).tensors  # type: ignore[attr-defined]
    images = (images - images.min()) / (images.max() - images.min())
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most, (), generator=generator))

    def scene() -> Scene:
        canvas = 0.2 * torch.rand(1, SIDE, SIDE, generator=generator)
        boxes, found = [], []
        for quarter in torch.randperm(4, generator=generator)[: draw(1, 5)].tolist():
            which, side = draw(0, len(images)), draw(16, 25)
            corner = (quarter // 2 * SIDE // 2, quarter % 2 * SIDE // 2)
            top, left = (start + draw(0, SIDE // 2 - side + 1) for start in corner)
            digit = F.interpolate(images[which : which + 1], size=(side, side), mode="bilinear")[0]
            part = canvas[:, top : top + side, left : left + side]
            torch.maximum(part, digit, out=part)
            boxes.append([left, top, left + side, top + side])
            found.append(int(labels[which]) + 1)
        return canvas, {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(found)}

    return [scene() for _ in range(count)]
