"""What a stream is, its name with its knobs, and its batches kept in memory."""

from __future__ import annotations

import copy
import math
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least

Split = Literal["train", "held_out"]


class Stream(Protocol):
    """An endless source of samples.

    Attributes:
        name: short name with its knobs, by which checkpoints know the stream.
        shape: shape of one input.
        classes: number of classes, or 0 for a regression stream with one float target.
    """

    name: str
    shape: tuple[int, ...]
    classes: int

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """Batches ``start`` … ``stop`` − 1 of a seed: inputs (steps, size, *shape), targets (steps, size).

        Each batch depends on (seed, step, size, split) only. Targets are int64 classes, or floats.
        """
        ...


def with_knobs(name: str, **knobs: tuple[object, object]) -> str:
    """A stream's name with each knob that is not at its default: checkpoints and records know a stream by its name.

    Args:
        name: with all knobs at their defaults.
        knobs: name → (value, default).

    Example:
        >>> with_knobs("photos", noise=(0.2, 0.1), scale=((1.0, 1.5), (1.0, 2.0)), flip=(True, True))
        'photos-noise=0.2-scale=1:1.5'
    """

    def told(value: object) -> str:
        return (
            ":".join(map(told, value))
            if isinstance(value, tuple)
            else f"{value:g}"
            if isinstance(value, float)
            else str(value)
        )

    return "-".join([name, *(f"{knob}={told(value)}" for knob, (value, default) in knobs.items() if value != default)])


class Generated:
    """A stream that makes its samples on a device: the base class of those that do."""

    device = torch.device("cpu")

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples made on ``device``."""
        twin = copy.copy(self)
        twin.device = torch.device(device)
        return twin


class Finite:
    """A stream with so many training samples and no more: the base class of those whose pass ends.

    Attributes:
        name: of the stream.
        train_samples: how many there are.
    """

    name: str
    train_samples: int

    def check(self, steps: int, size: int) -> None:
        """Raise :class:`UsageError` unless one pass has ``steps`` batches of ``size``."""
        if steps * size > self.train_samples:
            raise UsageError(
                f"{self.name} has {self.train_samples:,} training samples, {self.train_samples // size:,} batches of "
                f"{size}; steps={steps:,} is more than one pass: give fewer steps or smaller batches"
            )


def check_span(start: int, stop: int) -> None:
    """Raise :class:`UsageError` unless ``start`` … ``stop`` − 1 are batches: at least one of them."""
    if at_least("start", start, 0) >= stop:
        raise UsageError(f"start={start}, stop={stop} asks for no batch; give stop > start")


def on_device(stream: Stream, device: torch.device | str) -> Stream:
    """The stream made on ``device``, where it can be, else as it is."""
    return stream.to(device) if isinstance(stream, Generated) else stream


class Batches:
    """The training batches of one seed of a stream on a device, made in chunks when first asked for.

    Runs that share a seed share their batches, so a whole pass is kept if it fits in ``keep_bytes``: making it once
    serves every (γ, η) of that seed. A longer pass keeps one chunk at a time.
    """

    CHUNK = 64  # steps made together: one call of the vectorised stream

    def __init__(
        self,
        stream: Stream,
        seed: int,
        steps: int,
        size: int,
        device: torch.device | str = "cpu",
        keep_bytes: int = 256 * 2**20,
    ) -> None:
        self.stream = on_device(stream, device)
        self.seed, self.steps, self.size, self.device = seed, steps, size, device
        self.keeps_all = 4 * steps * size * math.prod(stream.shape) <= keep_bytes
        check = getattr(stream, "check", None)  # of a pass that ends, and of a share of one
        if check is not None:
            check(steps, size)
        self._chunks: dict[int, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs (size, *shape) and targets (size,) of step 0 ≤ ``step`` < ``steps``."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside 0 … {self.steps - 1}")
        chunk, offset = divmod(step, self.CHUNK)
        if chunk not in self._chunks:
            if not self.keeps_all:
                self._chunks.clear()
            start = chunk * self.CHUNK
            inputs, targets = self.stream.batches(self.seed, start, min(start + self.CHUNK, self.steps), self.size)
            self._chunks[chunk] = inputs.to(self.device), targets.to(self.device)
        inputs, targets = self._chunks[chunk]
        return inputs[offset], targets[offset]
