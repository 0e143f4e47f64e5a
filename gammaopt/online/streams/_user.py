"""A user's own data as a stream: a torch ``Dataset``, an iterable, and CIFAR-10 and MNIST through torchvision.

A map-style data set is read in a random order that no pass repeats, like :class:`Stored`; an iterable only in its own
order, whatever the seed, its first samples held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least, require
from gammaopt.online.streams._base import Finite, Split, check_span, with_knobs
from gammaopt.online.streams._order import Order
from gammaopt.online.streams._stored import HELD_OUT, Stored


class MapDataset(Protocol):
    """What a map-style ``torch.utils.data.Dataset`` is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FromDataset(Finite):
    """Stream of the items of a map-style data set, each once in a pass, in a random order for each seed.

    Args:
        dataset: its items are pairs of an input (tensor, array or number; the same shape for all) and a target.
        classes: number of classes, or 0 where targets are floats.
        held: another data set, held out; without, ``held_out`` items of ``dataset`` are never in a pass.
        held_out: how many to hold out; 10,000, or a tenth of them if that is fewer.
        name: short name, by which records and checkpoints know the data: another one for other data.

    Items with random augmentation are drawn anew each time: then a batch is not the same twice. Let the transform
    depend on the index, or make the augmentation part of the model.

    Raises:
        UsageError: if a data set is empty or has no length, or its items are no pairs.

    Example:
        >>> data = [(torch.tensor([float(i)]), i % 3) for i in range(100)]
        >>> x, y = FromDataset(data, classes=3).batches(seed=0, start=0, stop=2, size=4)
        >>> x.shape, y.dtype
        (torch.Size([2, 4, 1]), torch.int64)
    """

    def __init__(
        self,
        dataset: MapDataset,
        classes: int,
        *,
        held: MapDataset | None = None,
        held_out: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = with_knobs(name or type(dataset).__name__.lower(), held_out=(held_out, None))
        self.classes = at_least("classes", classes, 0)
        for told, given in {"dataset": dataset, "held": held}.items():
            # torch gives an IterableDataset the __getitem__ of any, which only raises.
            by_number = hasattr(given, "__len__") and hasattr(given, "__getitem__")
            if given is not None and (isinstance(given, torch.utils.data.IterableDataset) or not by_number):
                raise UsageError(
                    f"{told} is {type(given).__name__}, which has no length or no items by number; give a map-style "
                    "data set, or FromIterable(…) one that is read in its own order"
                )
        self._dataset, self._held = dataset, held
        count = len(dataset)
        wanted = 0
        if held is not None and not len(held):
            raise UsageError(f"{self.name}: held has no items; give some, or leave it out to hold out some of dataset")
        if held is None:
            wanted = at_least("held_out", max(1, min(HELD_OUT, count // 10)) if held_out is None else held_out, 1)
        self._order = Order(count, wanted)
        if self._order.train < 1:
            raise UsageError(f"{self.name} has {count:,} items; held_out={wanted:,} of them leaves none to train on")
        self.train_samples = self._order.train
        self.shape: tuple[int, ...] = tuple(_pair(dataset[0], self.name, classes)[0].shape)

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`. Held-out items begin anew after their last.

        Raises:
            UsageError: for a step after the last whole batch of the pass, or items that differ in shape.
        """
        check_span(start, stop)
        places = np.arange(start * size, stop * size)
        dataset = self._dataset
        if split == "train":
            self.check(stop, size)
            index = self._order.at(places, seed)
        elif self._held is None:
            index = self._order.held(places)
        else:
            dataset, index = self._held, places % len(self._held)
        pairs = [_pair(dataset[int(i)], self.name, self.classes) for i in index]
        return _stacked(pairs, self.name, stop - start, size)


class FromIterable:
    """Stream of the pairs of an iterable, in its own order for every seed, the first of them held out.

    An earlier step than the last one asked for begins the iterable anew and reads up to there: a run that goes on
    where it stopped reads what it has seen once more. An iterator, which can't begin anew, serves one run only.

    Args:
        samples: pairs of an input and a target, as for :class:`FromDataset`; the same ones each time it is begun.
        classes: number of classes, or 0 where targets are floats.
        held_out: how many to hold out.
        name: short name, by which records and checkpoints know the data: another one for other data.

    Raises:
        UsageError: if there are not more than ``held_out`` pairs.
        UsageError: from ``batches``, if the first pairs are others when it is begun anew: what was held out would be
            trained on.

    Example:
        >>> stream = FromIterable([(torch.tensor([float(i)]), i % 2) for i in range(50)], classes=2, held_out=10)
        >>> stream.batches(seed=0, start=1, stop=2, size=4)[0].flatten().tolist()
        [14.0, 15.0, 16.0, 17.0]
    """

    def __init__(self, samples: Iterable[Any], classes: int, *, held_out: int = 1000, name: str | None = None) -> None:
        self.name = with_knobs(name or type(samples).__name__.lower(), held_out=(held_out, 1000))
        self.classes, self._samples = at_least("classes", classes, 0), samples
        self._wanted = at_least("held_out", held_out, 1)
        self._read = -1
        self._held: list[tuple[Tensor, Tensor]] = []
        self._begin()
        self.shape: tuple[int, ...] = tuple(self._held[0][0].shape)

    def _begin(self) -> None:
        if self._read >= 0 and iter(self._samples) is self._samples:
            raise UsageError(
                f"{self.name} is an iterator and {self._read:,} of its samples are gone; give an iterable that can "
                "begin anew, such as a list, or a class with __iter__"
            )
        rest = iter(self._samples)
        self._read = 0
        held = [_pair(sample, self.name, self.classes) for sample in itertools.islice(rest, self._wanted)]
        first = list(itertools.islice(rest, 1))
        if not first:
            raise UsageError(
                f"{self.name} has {len(held):,} samples; held_out={self._wanted:,} leaves none to train on"
            )
        if self._held and not all(itertools.starmap(_same, zip(held, self._held, strict=True))):
            raise UsageError(
                f"{self.name} began anew with other samples than before, so that it would train on what is held out; "
                "give an iterable without shuffling or random augmentation"
            )
        self._held, self._rest = held, itertools.chain(first, rest)

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`. Held-out samples begin anew after their last.

        Raises:
            UsageError: if the iterable ends before.
        """
        check_span(start, stop)
        if split == "held_out":
            pairs = [self._held[i % len(self._held)] for i in range(start * size, stop * size)]
            return _stacked(pairs, self.name, stop - start, size)
        if start * size < self._read:
            self._begin()
        pairs = []
        for sample in self._rest:
            self._read += 1
            if self._read > start * size:
                pairs.append(_pair(sample, self.name, self.classes))
            if self._read == stop * size:
                break
        if self._read < stop * size:
            raise UsageError(
                f"{self.name} ended after {self._read:,} training samples, {self._read // size:,} batches of {size}; "
                f"steps={stop:,} is more: give fewer steps"
            )
        return _stacked(pairs, self.name, stop - start, size)


def from_torchvision(name: Literal["cifar10", "mnist"], root: str | Path, *, resident: int = 0) -> Stored:
    """CIFAR-10 or MNIST as torchvision keeps them under ``root``; nothing is downloaded. Their test sets are held out.

    Args:
        name: which.
        root: what torchvision was given as root.
        resident: bytes of images to keep on the device.

    Raises:
        UsageError: if they are not there.
    """
    datasets = require("torchvision.datasets", "vision")
    known = {"cifar10": (datasets.CIFAR10, 10), "mnist": (datasets.MNIST, 10)}
    made, classes = known[name]
    try:
        train, test = (made(str(root), train=part, download=False) for part in (True, False))
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError, LookupError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{root} does not hold {made.__name__} as torchvision keeps it ({reason}); "
            f"torchvision.datasets.{made.__name__}({str(root)!r}, download=True) fetches it"
        ) from None
    images, test_images = np.asarray(train.data), np.asarray(test.data)
    labels, test_labels = (np.asarray(part.targets, np.int64) for part in (train, test))
    return Stored(name, [images], [labels], classes, held=(test_images, test_labels), resident=resident)


def cifar10(root: str | Path, *, resident: int = 0) -> Stored:
    """See :func:`from_torchvision`."""
    return from_torchvision("cifar10", root, resident=resident)


def mnist(root: str | Path, *, resident: int = 0) -> Stored:
    """See :func:`from_torchvision`."""
    return from_torchvision("mnist", root, resident=resident)


def _pair(sample: Any, name: str, classes: int) -> tuple[Tensor, Tensor]:
    """An item as a float32 input and an int64 class or float32 target."""
    try:
        x, y = sample
        inputs = torch.as_tensor(np.asarray(x) if not isinstance(x, Tensor) else x)
        target = torch.as_tensor(np.asarray(y) if not isinstance(y, Tensor) else y)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{name}: an item is {type(sample).__name__}, not a pair of an input and a target of numbers ({error}); "
            "give a transform such as torchvision's ToTensor"
        ) from None
    if classes and (target.numel() != 1 or target.is_floating_point() or not 0 <= int(target) < classes):
        raise UsageError(f"{name}: target {y!r} is no class 0 … {classes - 1}")
    if target.numel() != 1:
        raise UsageError(
            f"{name}: a target has shape {tuple(target.shape)}; give one number, or classes= how many for whole numbers"
        )
    return inputs.float(), target.reshape(()).long() if classes else target.reshape(()).float()


def _same(pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(np.array_equal(a.numpy(), b.numpy(), equal_nan=True) for a, b in zip(pair, other, strict=True))


def _stacked(pairs: list[tuple[Tensor, Tensor]], name: str, steps: int, size: int) -> tuple[Tensor, Tensor]:
    shapes = sorted({tuple(x.shape) for x, _ in pairs})
    if len(shapes) > 1:
        raise UsageError(f"{name}: inputs have shapes {shapes[0]} and {shapes[1]}; make them one size")
    inputs, targets = (torch.stack(part) for part in zip(*pairs, strict=True))
    return inputs.unflatten(0, (steps, size)), targets.unflatten(0, (steps, size))
