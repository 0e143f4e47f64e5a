"""Losses and right answers of one run, and of a stack of runs alike.

Outputs are (…, size, outputs); targets are (size,), shared by all that is in front, or (…, size): classes (int64), or
one float for each sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gammaopt._errors import UsageError


def mean_loss(loss: str, output: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples of a batch, (…): ``"cross_entropy"``, or ``"mse"`` as the mean over outputs too.

    A run's number is the same to the last bit in a stack of any size: each is one sum over one stretch of memory.
    """
    if loss == "cross_entropy":
        wanted = targets.expand(output.shape[:-1])
        each = F.cross_entropy(output.flatten(0, -2), wanted.flatten(), reduction="none")
        return each.view(output.shape[:-1]).mean(-1)
    return F.mse_loss(output, squared_target(output, targets), reduction="none").flatten(-2).mean(-1)


def squared_target(output: Tensor, targets: Tensor) -> Tensor:
    """What ``output`` should be under a squared error, in its shape: one-hot vectors for classes."""
    if targets.numel() != output.numel():
        targets = targets.expand(output.shape[:-1])
    if targets.is_floating_point():
        return targets.to(output.dtype).view_as(output)
    return F.one_hot(targets, output.shape[-1]).to(output.dtype)


def hits(output: Tensor, targets: Tensor) -> Tensor:
    """Which samples were answered right, (…, size). f = 0 ties all classes and argmax takes the first: chance."""
    if targets.is_floating_point():
        return torch.zeros(output.shape[:-1], dtype=torch.bool, device=output.device)
    return output.argmax(-1) == targets


# Of one network on one batch, whose outputs may have more dimensions than those of a run: means over all of it.
CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda output, targets: F.mse_loss(output, squared_target(output, targets)),
    "cross_entropy": F.cross_entropy,
}


def check_output(loss: str, classes: int, output: Tensor) -> None:
    """Raise :class:`UsageError` unless the loss is defined between a network's output and a stream's targets.

    Args:
        loss: ``"mse"`` or ``"cross_entropy"``.
        classes: of the stream; 0 for one float target.
        output: of the network, on one batch of one run.
    """
    if loss == "cross_entropy" and not classes:
        raise UsageError("loss='cross_entropy' needs classes, and the stream's targets are numbers; give loss='mse'")
    wanted = classes or 1
    if output.dim() != 2 or output.shape[-1] != wanted:
        what = f"{classes} classes" if classes else "one number for each sample"
        raise UsageError(
            f"the network's output for a batch has shape {tuple(output.shape)}, "
            f"and the stream's targets are {what}; build the network with {wanted} output{'s' * (wanted > 1)}"
        )
