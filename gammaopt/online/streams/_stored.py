r"""Streams of images that are there already: one pass in a random order, and a part that no pass ever shows.

    x = (pixel/255 − mean)/std    for each channel, on the device; on disk the pixels are uint8

Sample i of step t of a seed is image π_seed(t·size + i) of the training part, π_seed a permutation that is evaluated
and not kept (:mod:`gammaopt.online.streams._order`), so a batch depends on (seed, step, size) alone and none comes
twice. Files are mapped; the operating system is told ahead which bytes a chunk of batches needs, and the next one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least
from gammaopt.online.streams._base import Finite, Generated, Split, check_span, with_knobs
from gammaopt.online.streams._convert import Cache, OnConvert
from gammaopt.online.streams._layouts import SIDE, Found, classes_of, open_layout, recognise
from gammaopt.online.streams._mapped import Array
from gammaopt.online.streams._order import Indices, Order, permute

HELD_OUT = 10_000  # images, or a tenth of them if that is fewer
SCATTERED = 2**30  # bytes: up to here any image may follow any; beyond, blocks of neighbours do
BLOCK = 128  # neighbours on disk that are read together
STATISTICS = 4096  # images from which mean and standard deviation are taken
READ_AHEAD = 2**20  # bytes between two pieces that are asked for as one
SLICE = 128  # images copied or normalised together: as many as a processor's cache holds


class Stored(Generated, Finite):
    """Stream of float32 images with about zero mean and unit variance, and int64 classes; a pass shows each once.

    Args:
        name: short name, by which records and checkpoints know the data.
        images: arrays (n, height, width) or (n, height, width, channels), uint8; mapped ones are read as needed.
        labels: their classes, one array for each of images.
        classes: how many there are.
        held: images and labels of a test set; without, ``held_out`` of the images are never in a pass.
        held_out: how many to hold out, where there is no test set.
        resident: bytes to spend on keeping the first images on the device, as uint8; the rest comes from the disk.

    Raises:
        UsageError: for shapes that do not fit together, images that are not uint8, labels that are no classes, or too
            few images.
    """

    def __init__(
        self,
        name: str,
        images: Sequence[Array],
        labels: Sequence[Array],
        classes: int,
        *,
        held: tuple[Array, Array] | None = None,
        held_out: int | None = None,
        resident: int = 0,
    ) -> None:
        if len(images) != len(labels):
            raise UsageError(f"{name}: {len(images)} arrays of images with {len(labels)} of labels; give one for each")
        sizes = {part.shape[1:] for part in images}
        for odd in sizes:
            if len(odd) not in (2, 3):
                raise UsageError(f"{name}: images have shape {odd}; give (height, width) or (height, width, channels)")
        if len(sizes) != 1 or any(len(x) != len(y) for x, y in zip(images, labels, strict=True)):
            raise UsageError(f"{name}: images of shapes {sorted(sizes)} and their labels do not fit together")
        if held is not None and (not len(held[0]) or len(held[0]) != len(held[1]) or held[0].shape[1:] not in sizes):
            raise UsageError(
                f"{name}: {len(held[0]):,} held-out images of shape {held[0].shape[1:]} with {len(held[1]):,} labels; "
                f"give at least one, of shape {next(iter(sizes))}, and a label for each"
            )
        for part in [*images, *([held[0]] if held else [])]:
            if part.dtype != np.uint8:
                raise UsageError(
                    f"{name}: images are {part.dtype}; give uint8, 0 … 255: (255*x).round().astype('uint8')"
                )
        labels = [classes_of(y, len(x), name, classes) for x, y in zip(images, labels, strict=True)]
        held = (held[0], classes_of(held[1], len(held[0]), f"{name}, held out,", classes)) if held else None
        self.classes, self.resident = classes, at_least("resident", resident, 0)
        height, width, *channels = sizes.pop()
        self.shape: tuple[int, ...] = (*(channels or [1]), height, width)
        self._images, self._begin = list(images), np.cumsum([0, *map(len, images)])
        self._labels = torch.from_numpy(np.concatenate(list(labels)))
        self._held = held
        count = int(self._begin[-1])
        if held is not None and held_out is not None:
            raise UsageError(
                f"{name}: held_out={held_out} is given, and the data has a test set of {len(held[0]):,} images of its "
                "own, which is held out whole; drop held_out"
            )
        self.name = with_knobs(name, held_out=(held_out, None))
        self._order = (
            Order(count, 0, _block(count, self._bytes)) if held else order_of(name, count, self._bytes, held_out)
        )
        self.train_samples = self._order.train
        self._mean, self._std = self._statistics()
        self._kept: Tensor | None = None  # the first images, from the first batch on

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process or on another device maps the files itself: images are not sent."""
        state = {**vars(self), "_images": [_place(images) for images in self._images], "_kept": None}
        if self._held is not None:
            state["_held"] = (_place(self._held[0]), self._held[1])
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._images = [_found_again(images) for images in state["_images"]]
        if self._held is not None:
            self._held = (_found_again(self._held[0]), self._held[1])

    @property
    def labels(self) -> Tensor:
        """Classes of all images, (n,) int64, in the order in which they are stored."""
        return self._labels

    @property
    def held_samples(self) -> int:
        """How many images are held out."""
        return len(self._held[0]) if self._held else len(self._labels) - self.train_samples

    @property
    def _bytes(self) -> int:
        """Of one image."""
        return int(np.prod(self.shape))

    @property
    def _resident(self) -> int:
        """How many images, the first ones, are kept on the device."""
        return min(int(self._begin[-1]), self.resident // self._bytes)

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples normalised on ``device``, and its resident part there."""
        twin = super().to(device)
        twin._kept = self._kept if twin.device == self.device else None
        return twin

    def batches(
        self, seed: int, start: int, stop: int, size: int, split: Split = "train", *, every: int = 1
    ) -> tuple[Tensor, Tensor]:
        """See :class:`Stream`. Held-out images begin anew after their last; ``every`` is that of :meth:`pixels`.

        Raises:
            UsageError: for a step after the last whole batch of the pass.
        """
        pixels, labels = self.pixels(seed, start, stop, size, split, every=every)
        return self._normalised(pixels.flatten(0, 1)).view(-1, size, *self.shape), labels

    def pixels(
        self, seed: int, start: int, stop: int, size: int, split: Split = "train", *, every: int = 1
    ) -> tuple[Tensor, Tensor]:
        """The same batches as they are stored: images (steps, size, height, width[, channels]) uint8, on the device.

        Args:
            seed, start, stop, size, split: as for :meth:`batches`.
            every: only each ``every``-th of these batches, the first among them: what one of several processes shows.

        Raises:
            UsageError: for a step after the last whole batch of the pass.
        """
        check_span(start, stop)
        steps = np.arange(start, stop, every)
        places = (steps[:, None] * size + np.arange(size)).ravel()
        if split == "train":
            self.check(int(steps[-1]) + 1, size)
            index = self._order.at(places, seed)
            # First the next ones are asked for, so that the disk reads them while these are copied.
            self._announce(places + len(steps) * every * size, seed)
            images, labels = self._pixels(index), self._labels[torch.from_numpy(index)]
        elif self._held is None:
            index = self._order.held(places)
            images, labels = self._pixels(index), self._labels[torch.from_numpy(index)]
        else:
            held_images, held_labels = self._held
            index = permute(places % len(held_images), len(held_images), 0)
            images = self._upload(_gather([held_images], np.zeros_like(index), index))
            labels = torch.from_numpy(held_labels[index])
        return images.unflatten(0, (len(steps), size)), labels.to(self.device).view(len(steps), size)

    def _announce(self, places: Indices, seed: int) -> None:
        """Have the next images of a pass read while the caller works on these."""
        places = places[places < self.train_samples]
        if len(places) and any(isinstance(part, np.memmap) for part in self._images):
            index = self._order.at(places, seed)
            part, index = self._split(np.sort(index[index >= self._resident]))
            for i in np.unique(part):
                _read_ahead(self._images[i], index[part == i])

    def _normalised(self, pixels: Tensor) -> Tensor:
        """(n, height, width[, channels]) uint8 → (n, channels, height, width) float32."""
        pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
        scale, shift = 1 / (255 * self._std), -self._mean / self._std
        scale, shift = scale.to(self.device)[:, None, None], shift.to(self.device)[:, None, None]
        if self.device.type != "cpu":
            return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(scale).add_(shift)
        # Fresh memory costs more than the arithmetic; numpy asks the system for it in large pages.
        made = torch.from_numpy(np.empty((len(pixels), *self.shape), np.float32))
        for some, out in zip(pixels.split(SLICE), made.split(SLICE), strict=True):
            out.copy_(some).mul_(scale).add_(shift)
        return made

    def _pixels(self, index: Indices) -> Tensor:
        """The images of those indices, on the device, uint8."""
        if not self._resident:
            return self._upload(self._read(index))
        if self._kept is None:
            self._kept = self._keep()
        here = index < len(self._kept)
        made = torch.empty(len(index), *self._images[0].shape[1:], dtype=torch.uint8, device=self.device)
        where = torch.from_numpy(here).to(self.device)
        made[where] = self._kept[torch.from_numpy(index[here]).to(self.device)]
        made[~where] = self._upload(self._read(index[~here]))
        return made

    def _upload(self, pixels: Array) -> Tensor:
        return torch.from_numpy(pixels).to(self.device)

    def _read(self, index: Indices) -> Array:
        """The images of those indices, from the arrays."""
        return _gather(self._images, *self._split(index))

    def _split(self, index: Indices) -> tuple[Indices, Indices]:
        """Which array each image is in, and its index there."""
        part = np.searchsorted(self._begin, index, side="right") - 1
        return part, index - self._begin[part]

    def _keep(self) -> Tensor:
        """The first images that ``resident`` bytes hold, on the device."""
        count = self._resident
        kept = torch.empty(count, *self._images[0].shape[1:], dtype=torch.uint8, device=self.device)
        for start in range(0, count, STATISTICS):
            index = np.arange(start, min(start + STATISTICS, count))
            kept[start : start + len(index)] = self._upload(self._read(index))
        return kept

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, of 0 … 1, over the first batch of a pass of no seed."""
        count = min(STATISTICS, self.train_samples)
        pixels = torch.from_numpy(self._read(self._order.at(np.arange(count), -1))).double() / 255
        axes = (0, 1, 2)
        std, mean = torch.std_mean(pixels, axes, correction=0)
        return mean.float().view(-1), std.float().view(-1).clamp(min=1e-3)


def order_of(name: str, count: int, one: int, held_out: int | None = None) -> Order:
    """Which of ``count`` images of ``one`` bytes each are held out, where there is no test set; the others' order.

    Raises:
        UsageError: if they are too few.
    """
    if held_out is None and count < 10:
        raise UsageError(
            f"{name} has {count:,} images, too few to hold a tenth of them out; give more, or held_out= how many"
        )
    wanted = at_least("held_out", min(HELD_OUT, count // 10) if held_out is None else held_out, 1)
    order = Order(count, wanted, _block(count, one))
    if order.train < 1:
        raise UsageError(f"{name} has {count:,} images; held_out={wanted:,} of them leaves none to train on")
    return order


def _block(count: int, one: int) -> int:
    """Neighbours that are read together, of images of so many bytes."""
    return BLOCK if count * one > SCATTERED else 1


class _Place(NamedTuple):
    """Where a mapped array lies."""

    path: str
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]


def _offset(images: Array) -> int | None:
    """Place of a mapped array's first byte in its file; ``None`` for one that is not mapped, or not in one piece.

    By its address: a slice of a map has the map's own ``offset``, wherever it begins.
    """
    mapped = getattr(images, "_mmap", None)
    if not isinstance(images, np.memmap) or mapped is None or images.filename is None or not images.flags.c_contiguous:
        return None
    inside = images.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
    if not 0 <= inside <= len(mapped) - images.nbytes:
        return None
    return int(images.offset - images.offset % mmap.ALLOCATIONGRANULARITY + inside)


def _place(images: Array) -> Array | _Place:
    offset = _offset(images)
    return images if offset is None else _Place(str(images.filename), images.dtype, offset, images.shape)  # type: ignore[attr-defined]


def _found_again(images: Array | _Place) -> Array:
    if isinstance(images, _Place):
        return np.memmap(images.path, images.dtype, "r", images.offset, images.shape)
    return images


def _gather(images: Sequence[Array], part: Indices, index: Indices) -> Array:
    """Images ``index`` of arrays ``part``, copied in the order in which they lie there."""
    made = np.empty((len(index), *images[0].shape[1:]), np.uint8)
    for i in np.unique(part):
        here = np.flatnonzero(part == i)
        here = here[np.argsort(index[here], kind="stable")]
        _read_ahead(images[i], index[here])
        plain = np.asarray(images[i])  # indexing a memmap makes another one each time
        for start in range(0, len(here), SLICE):
            some = here[start : start + SLICE]
            made[some] = plain[index[some]]
    return made


def _read_ahead(images: Array, index: Indices) -> None:
    """Ask for the bytes of these images, in order, before they are touched: one by one each would wait for the disk."""
    offset = _offset(images)
    if offset is None or not hasattr(os, "posix_fadvise") or not len(index):
        return
    one = int(np.prod(images.shape[1:]))
    gap = max(1, READ_AHEAD // one)
    cuts = np.flatnonzero(np.diff(index) > gap) + 1
    file = os.open(images.filename, os.O_RDONLY)  # type: ignore[attr-defined]
    try:
        for run in np.split(index, cuts):
            begin, end = int(run[0]) * one, (int(run[-1]) + 1) * one
            for place in range(begin, end, READ_AHEAD):  # a request is cut short where it is longer than the device's
                os.posix_fadvise(file, offset + place, min(READ_AHEAD, end - place), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(file)


def cifar5m(
    path: str | Path,
    *,
    held_out: int | None = None,
    resident: int = 0,
    cache: str | Path | None = None,
    on_progress: OnConvert | None = None,
) -> Stored:
    """CIFAR-5M: six million 32×32 images of CIFAR-10's classes, made by a diffusion model, as one pass.

    Args:
        path: folder with ``part0.npz`` … or ``cifar5m_part0.npz`` ….
        held_out: images never in a pass; 10,000 unless told.
        resident: bytes of images to keep on the device.
        cache: folder for what must be converted; ``.gammaopt`` in ``path`` unless told.
        on_progress: told how far a conversion is.

    Raises:
        DamagedFileError: for a file that is cut off or damaged.
        UsageError: for files that do not fit together.

    Source: Nakkiran, Neyshabur, Sedghi, "The deep bootstrap framework", ICLR 2021 (github.com/preetum/cifar5m).
    """
    return _stream(path, "cifar5m", held_out, resident, cache, on_progress, SIDE)


def mnist1m(
    path: str | Path,
    *,
    held_out: int | None = None,
    resident: int = 0,
    cache: str | Path | None = None,
    on_progress: OnConvert | None = None,
) -> Stored:
    """MNIST-1M: a million 28×28 digits made by a diffusion model; the arguments are those of :func:`cifar5m`."""
    return _stream(path, "mnist1m", held_out, resident, cache, on_progress, SIDE)


def imagefolder(
    path: str | Path,
    *,
    side: int = SIDE,
    held_out: int | None = None,
    resident: int = 0,
    cache: str | Path | None = None,
    on_progress: OnConvert | None = None,
) -> Stored:
    """A folder of image files for each class, or TinyImageNet's layout, decoded once to ``side`` × ``side`` pixels.

    A ``val`` or ``test`` folder beside ``train`` is held out whole. The other arguments are those of :func:`cifar5m`.
    """
    layout = recognise(Path(path))
    if layout not in ("imagefolder", "tinyimagenet"):
        raise UsageError(f"{path} holds {layout}, not image files; name the stream {layout!r}")
    return _stream(path, layout, held_out, resident, cache, on_progress, at_least("side", side, 1))


def _stream(
    path: str | Path,
    layout: str,
    held_out: int | None,
    resident: int,
    cache: str | Path | None,
    on_progress: OnConvert | None,
    side: int,
) -> Stored:
    folder = Path(path)
    if not folder.is_dir():
        recognise(folder)  # says what it is instead
    kept = Cache(folder / ".gammaopt" if cache is None else Path(cache), on_progress)
    return from_found(open_layout(folder, layout, kept, side), held_out=held_out, resident=resident)


def from_found(found: Found, **options: Any) -> Stored:
    """The stream of a folder's images; its name tells them from those of another folder."""
    held = None if found.held_images is None or found.held_labels is None else (found.held_images, found.held_labels)
    name = with_knobs(f"{found.layout}-{found.identity}", side=(found.side, None))
    return Stored(name, found.images, found.labels, len(found.classes), held=held, **options)
