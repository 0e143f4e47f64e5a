"""The record of one run: a small frozen dataclass, written everywhere as one JSON line."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curve:
    """Online loss and accuracy along a run, averaged between log-spaced steps.

    Entry i is the mean over the batches after ``steps[i-1]`` (or the start) up to and including ``steps[i]``,
    each scored before the step that trains on it. Steps count from 1. Numbers are rounded to six digits.
    """

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...]


@dataclass(frozen=True)
class RunRecord:
    """What one run earned.

    Attributes:
        gamma, lr, seed, steps: what was run; ``lr`` is what the optimizer was given, the rate at γ = 1.
        effective_lr: η = ``lr``·s(γ), the rate after the law.
        prequential_accuracy: mean over all ``steps`` batches, each scored before it is trained on. A batch at or
            after divergence scores 0: the number is finite and earned, never extrapolated.
        prequential_loss: mean over the batches before divergence.
        final_accuracy, final_loss: on held-out samples at the end; 0 and ``None`` for a diverged run.
        diverged_at: first step (from 1) whose loss is not finite or exceeds the limit; ``None`` if there is none,
            ``steps`` + 1 if only the held-out loss at the end is not finite.
        curve: the run in time.
    """

    gamma: float
    lr: float
    seed: int
    steps: int
    effective_lr: float
    prequential_accuracy: float
    prequential_loss: float | None
    final_accuracy: float
    final_loss: float | None
    diverged_at: int | None
    curve: Curve

    @property
    def reports(self) -> tuple[tuple[int, float], ...]:
        """(step, online accuracy) at the curve's steps: what a study reports of the run on its way."""
        return tuple(zip(self.curve.steps, self.curve.accuracy, strict=True))

    def to_json(self) -> str:
        """One line of strict JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunRecord:
        """The record that :meth:`to_json` wrote. Raises ``KeyError``/``TypeError`` for anything else."""
        curve = Curve(**{name: tuple(values) for name, values in data["curve"].items()})
        return cls(**{**data, "curve": curve})


def six_digits(value: float) -> float:
    """``value`` to six significant digits: what a curve needs, at a third of the bytes."""
    return float(f"{value:.6g}") if math.isfinite(value) else value


def log_spaced(steps: int, points: int = 40) -> list[int]:
    """At most ``points`` distinct steps from 1 to ``steps``, evenly spaced in log(step)."""
    if points < 2 or steps <= points:
        return list(range(1, steps + 1)) if points >= 2 else [steps]
    return sorted({round(math.exp(math.log(steps) * i / (points - 1))) for i in range(points)})
