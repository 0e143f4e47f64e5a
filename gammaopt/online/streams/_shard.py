"""A process's share of a stream: no two processes ever see the same sample of a pass.

Batch t of process r of R is batch t·R + r of the whole stream, so R processes at batches of n see in t steps what one
process at batches of n sees in t·R. Held-out samples are the same for all.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from gammaopt._errors import UsageError, at_least
from gammaopt.online.streams._base import Finite, Generated, Split, Stream, check_span, on_device
from gammaopt.online.streams._stored import Stored


class Shard(Generated):
    """The share of process ``rank`` of ``world`` in ``stream``; see :class:`Stream`.

    Args:
        stream: the whole; the same in every process.
        rank: which process, from 0.
        world: how many there are.

    Raises:
        UsageError: unless 0 ≤ ``rank`` < ``world``.

    Example:
        >>> from gammaopt.online import Parity
        >>> mine = Shard(Parity(), rank=1, world=4)
        >>> torch.equal(mine.batches(0, 2, 3, 8)[0], Parity().batches(0, 9, 10, 8)[0])
        True
    """

    def __init__(self, stream: Stream, rank: int, world: int) -> None:
        at_least("rank", rank, 0)
        if rank >= at_least("world", world, 1):
            raise UsageError(f"rank={rank} is outside 0 … {world - 1}; give the number of this process, from 0")
        self.name, self.shape, self.classes = stream.name, stream.shape, stream.classes
        self.stream, self.rank, self.world = stream, rank, world

    def to(self, device: torch.device | str) -> Self:
        """The same share, with its samples made on ``device``."""
        twin = super().to(device)
        twin.stream = on_device(self.stream, device)
        return twin

    def check(self, steps: int, size: int) -> None:
        """Raise :class:`UsageError` unless one pass has ``steps`` batches of ``size`` for every process.

        Where one had a batch more than another, it would wait for ever in the next collective.
        """
        if not isinstance(self.stream, Finite):
            return
        own = self.stream.train_samples // (size * self.world)
        if steps > own:
            raise UsageError(
                f"{self.name} has {self.stream.train_samples:,} training samples, {own:,} batches of {size} for each "
                f"of {self.world} processes; steps={steps:,} is more than one pass: give fewer steps or smaller batches"
            )

    def batches(self, seed: int, start: int, stop: int, size: int, split: Split = "train") -> tuple[Tensor, Tensor]:
        """See :class:`Stream`.

        Raises:
            UsageError: for a step that not every process has in one pass.
        """
        if split == "held_out":
            return self.stream.batches(seed, start, stop, size, split)
        check_span(start, stop)
        self.check(stop, size)
        mine = range(start * self.world + self.rank, stop * self.world, self.world)
        if isinstance(self.stream, Stored):  # which has the next of these read ahead
            return self.stream.batches(seed, mine.start, mine.stop, size, split, every=self.world)
        parts = [self.stream.batches(seed, step, step + 1, size, split) for step in mine]
        inputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        return inputs, targets
