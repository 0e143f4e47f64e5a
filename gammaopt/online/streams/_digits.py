"""Augmented handwritten digits: real, small, offline, and never the same image twice.

scikit-learn's 1,797 digits (8×8, 16 grey levels) are drawn on a 12×12 canvas, each under its own random affine map
and with its own noise. The base images, not the augmented ones, are split by index into training and held-out parts.
Every draw is a function of (seed, step, split, place in the batch): no generator, so no period and no torch release.
"""

from __future__ import annotations

import math
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gammaopt._errors import require
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split

CANVAS = 12
HELD_OUT_EVERY = 5  # every fifth base image is held out
ROTATION = math.radians(15.0)
SHEAR = 0.1
LOG_SCALE = 0.1
SHIFT = 1.0  # canvas pixels
NOISE = 0.1  # of the grey range
SLICE = 256  # images made together: as many as a processor's cache holds
# Mean and standard deviation of a canvas pixel under the augmentation above, measured on 200,000 images.
MEAN, STD = 0.1364, 0.2766


class Digits(Generated):
    """Stream of (1, 12, 12) float32 images with about zero mean and unit variance, and int64 classes 0 … 9.

    Raises:
        MissingExtraError: if scikit-learn, which carries the images, is not installed.

    Example:
        >>> x, y = Digits().batches(seed=0, start=0, stop=2, size=4)
        >>> x.shape, y.shape
        (torch.Size([2, 4, 1, 12, 12]), torch.Size([2, 4]))
    """

    name = "digits"
    shape: tuple[int, ...] = (1, CANVAS, CANVAS)
    classes = 10

    def __init__(self) -> None:
        bunch = require("sklearn.datasets", "tune").load_digits()
        images = torch.as_tensor(bunch.images, dtype=torch.float32)[:, None] / 16.0
        labels = torch.as_tensor(bunch.target, dtype=torch.int64)
        held_out = torch.arange(len(labels)) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self._base: dict[Split, tuple[Tensor, Tensor]] = {
            "train": (images[~held_out], labels[~held_out]),
            "held_out": (images[held_out], labels[held_out]),
        }

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples made on ``device``."""
        twin = super().to(device)
        twin._base = {split: (images.to(device), labels.to(device)) for split, (images, labels) in self._base.items()}
        return twin

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        images, labels = self._base[split]
        drawn = {
            purpose: _random.keys(seed, start, stop, split, self.device, purpose)
            for purpose in ("digit", "map", "noise")
        }
        pick = _random.integers(drawn["digit"], size, len(labels)).flatten()
        maps = _affine(_random.uniforms(drawn["map"], size * 6).view(-1, 6))
        grain = _random.words(drawn["noise"], size).flatten()  # a key for each image
        pixels = torch.empty(len(pick), *self.shape, device=self.device)
        for picked, theta, key, out in zip(*(t.split(SLICE) for t in (pick, maps, grain, pixels)), strict=True):
            grid = F.affine_grid(theta, [len(picked), *self.shape], align_corners=False)
            noise = _random.normals(key, math.prod(self.shape)).view_as(out)
            torch.add(F.grid_sample(images[picked], grid, align_corners=False), noise, alpha=NOISE, out=out)
            out.sub_(MEAN).div_(STD)
        return pixels.view(stop - start, size, *self.shape), labels[pick].view(stop - start, size)


def _affine(uniform: Tensor) -> Tensor:
    """(n, 6) uniform numbers in [0, 1) → (n, 2, 3) maps from canvas to image coordinates, both in [−1, 1].

    In pixels, image = R(rotation)·shear·(canvas − shift)/scale; the canvas spans 12 pixels and the image 8.
    """
    signed = 2 * uniform - 1
    angle, scale = ROTATION * signed[:, 0], torch.exp(LOG_SCALE * signed[:, 1:3])
    shear, shift = SHEAR * signed[:, 3], SHIFT * signed[:, 4:6] / (CANVAS / 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    shearing = torch.stack(
        [
            torch.stack([torch.ones_like(shear), shear], -1),
            torch.stack([torch.zeros_like(shear), torch.ones_like(shear)], -1),
        ],
        -2,
    )
    linear = (CANVAS / 8) * rotation @ shearing / scale[:, None, :]
    return torch.cat([linear, -(linear @ shift[..., None])], dim=-1)
