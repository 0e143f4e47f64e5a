"""A network that is descended and watched: gradient descent on one batch with a monitor along it.

Shared by the experiments on curvature and kernels. An MLP in mean-field form learns a staircase of parities, float64,
MSE. Rates are η = c·s(γ); sharpness is λ_max in the coordinates in which all rates are equal, those of the law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from gammaopt import SGD
from gammaopt.diagnostics import Measurement, Monitor
from gammaopt.online import MLP, Recipe, RunRecord, Staircase
from gammaopt.online._device import seeded
from gammaopt.online._losses import CRITERIA
from gammaopt.online.record import six_digits
from gammaopt.online.train import fresh_model

STREAM = Staircase(bits=16, terms=3)
DIVERGED = 1e3  # of the start


class Descent(NamedTuple):
    """One run: width and samples, γ, c, seed, depth, when to stop, ``measures`` of the monitor along it, and where."""

    width: int
    samples: int
    gamma: float
    rate: float
    seed: int = 0
    depth: int = 3
    steps: int = 1000
    until: float = 0.0
    measures: tuple[Any, ...] = ()
    per_decade: int = 12
    device: str = "cpu"


class Descended(NamedTuple):
    """What a run was: its record, its measurements, and λ_max at its end if it did not diverge."""

    record: RunRecord
    measured: list[Measurement]
    end_sharpness: float | None

    @property
    def loss(self) -> list[float]:
        """Of the first one."""
        curve = self.record.curve.loss
        return [value / curve[0] for value in curve]


def descend(run: Descent) -> Monitor:
    """Gradient descent on one batch, watched; the monitor has the model."""
    build = partial(MLP, STREAM.shape[0], 1, width=run.width, depth=run.depth)
    recipe = Recipe(build, STREAM, "mse", steps=max(1, run.steps), depth=run.depth, dtype=torch.float64)
    x, y = (part[0].to(run.device, torch.float64) for part in STREAM.batches(run.seed, 0, 1, run.samples))
    with seeded("cpu", run.seed):
        model = fresh_model(recipe, run.gamma, x.cpu()).to(run.device)
    optimizer, criterion = SGD(model.parameters(), lr=run.rate), CRITERIA["mse"]
    monitor = Monitor(
        model, optimizer, "mse", (x, y),
        share=None, measures=run.measures, per_decade=run.per_decade, kernel_samples=run.samples, seed=run.seed,
    )  # fmt: skip
    first = math.nan
    for step in range(run.steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        monitor(loss)
        value = float(loss.detach())
        first = value if step == 0 else first
        if not value < DIVERGED * first or value < run.until * first:
            break
    return monitor


def descended(run: Descent) -> Descended:
    """:func:`descend`, in numbers."""
    monitor = descend(run)
    record = monitor.finish()
    last = None
    if record.diverged_at is None:
        at_end = monitor.measure().sharpness_lr
        last = None if at_end is None else at_end / record.effective_lr
    return Descended(record, monitor.measurements, last)


def plain(end: Descended) -> list[dict[str, float]]:
    """Its measurements for JSON."""
    return [
        {"step": one.step, **{k: six_digits(v) for k, v in one.numbers().items() if k != "seconds"}}
        for one in end.measured
    ]


def measured(every: Sequence[dict[str, Any]]) -> list[Measurement]:
    """What :func:`plain` was made from, without the seconds."""
    return [Measurement(seconds=0.0, **one) for one in every]
