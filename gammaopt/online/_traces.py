"""What the runs of a stack did, step by step: one array on the host, filled a window of steps at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gammaopt.online.train import Run, bad_losses


class Traces:
    """Loss and share of right answers of each run at each step, moved off the device at each look.

    Attributes:
        runs: the row of each run.
        losses, shares: (runs, steps), float64, on the host; NaN where a run has not been or is no more.
        step: how many steps there are.
    """

    def __init__(self, runs: list[Run], steps: int) -> None:
        self.runs = {run: row for row, run in enumerate(runs)}
        self.losses = torch.full((len(runs), steps), math.nan, dtype=torch.float64)
        self.shares = self.losses.clone()
        self.step = 0
        self._window: list[tuple[Tensor, Tensor]] = []

    def add(self, losses: Tensor, shares: Tensor) -> None:
        self._window.append((losses, shares))

    def look(self, runs: list[Run]) -> list[int]:
        """Move what the runs did since the last look to the host: the only synchronisation in training.

        Returns:
            The positions of those that have not diverged.
        """
        losses, shares = (torch.stack(part, 1).double().cpu() for part in zip(*self._window, strict=True))
        self._window = []
        rows = torch.tensor([self.runs[run] for run in runs])
        now = slice(self.step, self.step + losses.shape[1])
        self.losses[rows, now], self.shares[rows, now] = losses, shares
        self.step = now.stop
        return (~bad_losses(losses, self.losses[rows, :1]).any(1)).nonzero().flatten().tolist()

    def load(self, losses: Tensor, shares: Tensor) -> None:
        """Take the first steps of the same runs, (runs, steps so far)."""
        self.step = losses.shape[1]
        self.losses[:, : self.step], self.shares[:, : self.step] = losses, shares
