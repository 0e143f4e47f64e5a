"""A random network as the target: what a student of its own kind can learn exactly.

    y = (t(x) − E t)/√Var t,    x ~ N(0, 1),    t a ReLU network with weights N(0, 2/fan_in)

or the class of the largest of several such outputs, each with an offset that makes the classes about equally frequent.
Mean, variance and offsets are those of a fixed draw of inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from gammaopt._errors import UsageError, at_least, one_of
from gammaopt.online.models import CNN, MLP
from gammaopt.online.streams import _random
from gammaopt.online.streams._base import Generated, Split, with_knobs

Network = Literal["mlp", "cnn"]
CALIBRATION = 8192  # inputs from which the outputs' mean, deviation and offset are taken
BALANCING, BALANCING_RATE = 200, 0.1  # steps towards even classes, and how far one goes
SLICE = 1024  # samples passed through the teacher together


class Teacher(Generated):
    """Infinite stream of normal inputs (float32) and what a random network says to them.

    Training and held-out samples come from the same distribution with independent draws; the teacher is the same for
    every seed.

    Args:
        shape: of one input; (channels, height, width) for a CNN.
        classes: 0 for one float target with about zero mean and unit variance, else the number of int64 classes.
        network: ``"mlp"`` or ``"cnn"``.
        width, depth: of the teacher; see :class:`gammaopt.online.MLP` and ``CNN``.
        draw: which random weights.

    Raises:
        UsageError: for an unknown network or sizes out of range.

    Example:
        >>> x, y = Teacher((16,), classes=3).batches(seed=0, start=0, stop=2, size=4)
        >>> x.shape, y.dtype
        (torch.Size([2, 4, 16]), torch.int64)
    """

    def __init__(
        self,
        shape: Sequence[int] = (32,),
        classes: int = 0,
        *,
        network: Network = "mlp",
        width: int = 32,
        depth: int = 3,
        draw: int = 0,
    ) -> None:
        one_of("network", network, get_args(Network))
        if at_least("classes", classes, 0) == 1:
            raise UsageError("classes=1 leaves nothing to tell apart; give 0 for a float target, or at least 2")
        if not isinstance(shape, Sequence):
            raise UsageError(f"shape={shape!r} is no shape; give a tuple, such as (32,)")
        for side in shape:
            at_least("side of shape", side, 1)
        if network == "cnn" and len(shape) != 3:
            raise UsageError(f"shape={shape} is no image; give (channels, height, width), or network='mlp'")
        plain = f"teacher-{network}-{'x'.join(map(str, shape))}-{classes}"
        self.name = with_knobs(plain, width=(width, 32), depth=(depth, 3), draw=(draw, 0))
        self.shape: tuple[int, ...] = tuple(shape)
        self.classes = classes
        outputs = classes or 1
        with torch.device("meta"):
            made: nn.Module = (
                MLP(math.prod(shape), outputs, width=width, depth=depth)
                if network == "mlp"
                else CNN((shape[0], shape[1], shape[2]), outputs, width=width, depth=depth)
            )
        # In float64: then rounding, which differs between machines, hardly ever decides a class.
        self._net = made.double().to_empty(device="cpu").requires_grad_(False)
        for name, weight in self._net.named_parameters():
            numbers = _random.normals(torch.tensor([_random.key("teacher", draw, name)]), weight.numel())
            weight.copy_(numbers.view_as(weight) * (2 / weight[0].numel()) ** 0.5)
        said = self._say(self._inputs(torch.tensor([_random.key("calibration", draw)]), CALIBRATION))
        self._std = said.std(0)
        if not bool((self._std > 0).all()):
            raise UsageError(
                f"this teacher says the same to every input (width={width}, depth={depth}, draw={draw}: its units are "
                "dead); give another draw or a larger width"
            )
        self._mean = said.mean(0) - self._std * _offsets((said - said.mean(0)) / self._std)

    def to(self, device: torch.device | str) -> Self:
        """The same stream, with its samples made on ``device``."""
        twin = super().to(device)
        twin._net = copy.deepcopy(self._net).to(device)
        twin._mean, twin._std = self._mean.to(device), self._std.to(device)
        return twin

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`."""
        inputs = self._inputs(_random.keys(seed, start, stop, split, self.device), size)
        said = (self._say(inputs) - self._mean) / self._std
        targets = said.argmax(-1) if self.classes else said[:, 0].float()
        return inputs.view(stop - start, size, *self.shape), targets.view(stop - start, size)

    def _inputs(self, keys: Tensor, size: int) -> Tensor:
        return _random.normals(keys, size * math.prod(self.shape)).view(-1, *self.shape)

    def _say(self, inputs: Tensor) -> Tensor:
        return torch.cat([self._net(part.double()) for part in inputs.split(SLICE)])


def _offsets(said: Tensor) -> Tensor:
    """What to add to outputs (n, outputs) so that each is the largest about equally often."""
    outputs = said.shape[-1]
    offsets = torch.zeros(outputs, dtype=said.dtype)
    for _ in range(BALANCING if outputs > 1 else 0):
        shares = torch.bincount((said + offsets).argmax(-1), minlength=outputs) / len(said)
        offsets -= BALANCING_RATE * (outputs * shares - 1)
    return offsets
