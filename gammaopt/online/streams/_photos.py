r"""Random crops of colour photographs: natural images, offline, endless, and as hard as you like.

The ten colour photographs inside the scikit-image and scikit-learn packages are ten classes; a sample is a square of
one, at a random place and scale, mirrored or not, with its own colour balance, brightness and noise, on 32×32 pixels.

Along its longer side each photograph is cut into stripes, by turns for training and held out. A crop lies in one
stripe, the pixels that its interpolation touches included, so no pixel is seen in both splits.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gammaopt._errors import MissingExtraError, UsageError, at_least, rate, require
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split, with_knobs

# Photograph → the package that has it. Not the second view of the motorcycle, which shows what the first shows.
PHOTOGRAPHS: Mapping[str, str] = {
    "astronaut.png": "skimage/data",
    "chelsea.png": "skimage/data",
    "china.jpg": "sklearn/datasets/images",
    "coffee.png": "skimage/data",
    "flower.jpg": "sklearn/datasets/images",
    "hubble_deep_field.jpg": "skimage/data",
    "ihc.png": "skimage/data",
    "motorcycle_left.png": "skimage/data",
    "retina.jpg": "skimage/data",
    "rocket.jpg": "skimage/data",
}
# The files' digests: other pixels would be another stream. Those of scikit-image 0.26.0 and scikit-learn 1.9.1.
DIGESTS: dict[str, str] = {
    "astronaut.png": "a41fb9fc4430bc43",
    "chelsea.png": "b242d12cffeb47ef",
    "china.jpg": "5cce2582febef99e",
    "coffee.png": "0de6b6c7b31f06c0",
    "flower.jpg": "6d229986ed40f90e",
    "hubble_deep_field.jpg": "9bfbdb32763b88b6",
    "ihc.png": "eaa50e99aee50e1d",
    "motorcycle_left.png": "2744005b0fee9844",
    "retina.jpg": "430a7692f6bf99ad",
    "rocket.jpg": "88dc6609ac6e0fbd",
}
SIDE = 32
SHORTER = 250  # photographs are shrunk by a whole factor to a shorter side of at least this
PERIOD = 250  # about a stripe of training and one held out
HELD_OUT = 0.3  # of each period
LARGEST = 2.0  # scale: a crop of 64 pixels fits into every held-out stripe
SLICE = 64  # crops made together: as many as a processor's cache holds
# Of the knobs, as in the signature.
DEFAULTS: dict[str, object] = {
    "classes": 10, "scale": (1.0, LARGEST), "colour": 0.3, "brightness": 0.15, "noise": 0.1, "flip": True,
}  # fmt: skip
# Mean and standard deviation of each channel under the default augmentation, measured on 204,800 crops.
MEAN, STD = (0.498, 0.377, 0.330), (0.363, 0.289, 0.292)


class Stripe(NamedTuple):
    """A part of a photograph that crops may touch: columns and rows from the first to before the last."""

    left: int
    right: int
    top: int
    bottom: int


class Photos(Generated):
    """Endless stream of (3, 32, 32) float32 crops and int64 classes 0 … 9.

    At the default knobs each channel has about zero mean and unit variance; other knobs keep the same scale and shift.

    Args:
        classes: how many photographs, in alphabetical order, 2 … 10.
        scale: smallest and largest side of a crop in the photograph over 32 pixels, between 1 and 2; the logarithm is
            drawn evenly. A wide range is harder.
        colour: largest change of a channel's gain, as its logarithm.
        brightness: largest shift of all pixels, in units of the range from black to white.
        noise: standard deviation of the noise on each pixel, in the same units.
        flip: mirror half of the crops.

    Raises:
        MissingExtraError: if scikit-image, which has eight of them, is not installed.
        UsageError: for a knob out of its range, or a photograph that is not the file it was.

    Example:
        >>> x, y = Photos().batches(seed=0, start=0, stop=2, size=4)
        >>> x.shape, y.shape
        (torch.Size([2, 4, 3, 32, 32]), torch.Size([2, 4]))
    """

    shape: tuple[int, ...] = (3, SIDE, SIDE)

    def __init__(
        self,
        classes: int = 10,
        *,
        scale: Sequence[float] = (1.0, LARGEST),
        colour: float = 0.3,
        brightness: float = 0.15,
        noise: float = 0.1,
        flip: bool = True,
    ) -> None:
        if at_least("classes", classes, 2) > len(PHOTOGRAPHS):
            raise UsageError(f"classes={classes} is more than there are photographs; give at most {len(PHOTOGRAPHS)}")
        self.classes, self.scale, self.flip = classes, _range(scale), flip
        self.colour, self.brightness = rate("colour", colour), rate("brightness", brightness)
        self.noise = rate("noise", noise)
        knobs = {name: (getattr(self, name), default) for name, default in DEFAULTS.items()}
        self.name = with_knobs("photos", **knobs)
        photographs = [read(name) for name in list(PHOTOGRAPHS)[:classes]]
        self._stripes: dict[Split, list[list[Stripe]]] = {
            "train": [stripes(image.shape, held_out=False) for image in photographs],
            "held_out": [stripes(image.shape, held_out=True) for image in photographs],
        }
        # One tall image, so that crops of all photographs come out of one call.
        width = max(image.shape[2] for image in photographs)
        self._atlas = torch.cat([F.pad(image, (0, width - image.shape[2])) for image in photographs], 1)
        tops = np.cumsum([0, *(image.shape[1] for image in photographs)])
        self._tables = {split: _table(found, tops) for split, found in self._stripes.items()}

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples made on ``device``."""
        twin = super().to(device)
        twin._atlas = self._atlas.to(device)
        twin._tables = {split: (table.to(device), edges.to(device)) for split, (table, edges) in self._tables.items()}
        return twin

    def windows(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Where the crops of batches lie, without their pixels.

        Returns:
            Windows (steps, size, 4): left, top, side (negative if mirrored) in pixels of the tall image that holds all
            photographs, and the row at which the crop's own photograph begins; and classes (steps, size).
        """
        keys = _random.keys(seed, start, stop, split, self.device, "photos")
        draws = _random.uniforms(keys, size * 6).view(-1, size, 6)
        table, edges = self._tables[split]
        labels = (draws[..., 0] * self.classes).long()
        # A class's stripes side by side on [0, 1), each as wide as its share of the photograph.
        stripe = (draws[..., 1, None] >= edges[labels]).sum(-1).clamp_(max=table.shape[1] - 1)
        left, right, top, bottom, photograph = table[labels, stripe].unbind(-1)
        low, high = map(math.log, self.scale)
        side = SIDE * torch.exp(low + (high - low) * draws[..., 2])
        # The outermost samples stand half a sampling step inside the window; interpolation touches the pixels around.
        x = left + 0.5 + (right - left - 1 - side) * draws[..., 3]
        y = top + 0.5 + (bottom - top - 1 - side) * draws[..., 4]
        mirrored = torch.where(draws[..., 5] < 0.5, -1.0, 1.0) if self.flip else 1.0
        return torch.stack([x, y, side * mirrored, photograph], -1), labels

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        windows, labels = self.windows(seed, start, stop, size, split)
        keys = _random.keys(seed, start, stop, split, self.device, "colour")
        signed = 2 * _random.uniforms(keys, size * 4).view(-1, 4) - 1
        mean, std = torch.tensor(MEAN, device=self.device), torch.tensor(STD, device=self.device)
        gain = (torch.exp(self.colour * signed[:, :3]) / std)[..., None, None]
        shift = ((self.brightness * signed[:, 3:] - mean) / std)[..., None, None]
        grain = _random.words(_random.keys(seed, start, stop, split, self.device, "noise"), size).flatten()
        noise = (self.noise / std)[:, None, None]
        pixels = torch.empty(len(signed), *self.shape, device=self.device)
        for window, k, a, b, out in zip(
            *(t.split(SLICE) for t in (windows.flatten(0, 1), grain, gain, shift, pixels)), strict=True
        ):
            torch.mul(self._crop(window), a, out=out).add_(b)
            if self.noise:
                out.addcmul_(_random.triangular(k, math.prod(self.shape)).view_as(out), noise)
        return pixels.view(stop - start, size, *self.shape), labels

    def _crop(self, windows: Tensor) -> Tensor:
        """(n, 4) windows → (n, 3, 32, 32) pixels, black 0 to white 1, bilinear."""
        x, y, side, _ = windows.unbind(-1)
        steps = (torch.arange(SIDE, device=self.device) + 0.5) / SIDE - 0.5
        across = (x + side.abs() / 2)[:, None] + side[:, None] * steps
        down = (y + side.abs() / 2)[:, None] + side.abs()[:, None] * steps
        height, width = self._atlas.shape[1:]
        count = len(windows)
        grid = torch.empty(count, SIDE, SIDE, 2, device=self.device)
        grid[..., 0] = (across * (2 / width) - 1)[:, None, :]
        grid[..., 1] = (down * (2 / height) - 1)[:, :, None]
        tall = F.grid_sample(self._atlas[None], grid.view(1, count * SIDE, SIDE, 2), align_corners=False)
        return tall.view(3, count, SIDE, SIDE).transpose(0, 1)


def _range(scale: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest side of a crop over 32 pixels."""
    try:
        low, high = map(float, scale)
        if not 1 <= low <= high <= LARGEST:
            raise ValueError
    except (TypeError, ValueError):
        raise UsageError(f"scale={scale!r} must be two numbers, the lower first, between 1 and {LARGEST:g}") from None
    return low, high


def read(name: str) -> Tensor:
    """A photograph as (3, height, width) float32 from 0 to 1, shrunk by a whole factor; never downloaded.

    Raises:
        MissingExtraError: if its package, or the one that decodes it, is not installed.
        UsageError: if this version of its package has no such file, or another one.
    """
    package, _, folder = PHOTOGRAPHS[name].partition("/")
    image_file = require("PIL.Image", "vision")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        extra, distribution = ("vision", "scikit-image") if package == "skimage" else ("tune", "scikit-learn")
        raise MissingExtraError(
            f"{name} is part of {distribution}, which is not installed; run: pip install 'gammaopt[{extra}]'"
        )
    path = Path(found.submodule_search_locations[0]) / folder / name
    if not path.exists():
        raise UsageError(f"{path} is not there: this version of {package} does not carry it; install a newer one")
    if hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest() != DIGESTS[name]:
        raise UsageError(
            f"{path} is another file than it was, with other pixels; reinstall {package}, or another version"
        )
    with image_file.open(path) as image:
        shrunk = image.convert("RGB").reduce(max(1, min(image.size) // SHORTER))
    return torch.from_numpy(np.asarray(shrunk).copy()).permute(2, 0, 1).float() / 255


def stripes(shape: tuple[int, ...], *, held_out: bool) -> list[Stripe]:
    """The stripes of a photograph of ``shape`` (3, height, width) for one split."""
    _, height, width = shape
    longer = max(height, width)
    count = max(1, round(longer / PERIOD))
    found = []
    for i in range(count):
        begin, end = round(i * longer / count), round((i + 1) * longer / count)
        middle = end - max(math.ceil(SIDE * LARGEST) + 2, round(HELD_OUT * (end - begin)))
        a, b = (middle, end) if held_out else (begin, middle)
        found.append(Stripe(a, b, 0, height) if width >= height else Stripe(0, width, a, b))
    return found


def _table(found: list[list[Stripe]], tops: np.ndarray) -> tuple[Tensor, Tensor]:
    """Stripes of each class in the tall image, and where on [0, 1) each but the last ends."""
    most = max(map(len, found))
    table, edges = torch.zeros(len(found), most, 5), torch.full((len(found), most), 2.0)
    for label, own in enumerate(found):
        top = float(tops[label])
        areas = torch.tensor([(s.right - s.left) * (s.bottom - s.top) for s in own], dtype=torch.float64)
        edges[label, : len(own)] = (areas.cumsum(0) / areas.sum()).float()
        edges[label, len(own) - 1 :] = 2.0
        for i, s in enumerate(own):
            table[label, i] = torch.tensor([s.left, s.right, s.top + top, s.bottom + top, top])
    return table, edges
