"""A training function with a known optimum, and how a study of it is made. Its fixtures are in known_studies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gammaopt import EtaLaw
from gammaopt.tuning import ObjectiveTrial, TuneResult, study

LAW = EtaLaw(depth=3, loss="cross_entropy")
BEST_GAMMA, BEST_LR = 0.25, 0.7  # of the fake objective
SMALL: dict[str, Any] = {"law": LAW, "base_lr": 0.5, "steps": 100, "trials": 4, "seeds": 1, "confirm_seeds": 2}


def hill(trial: ObjectiveTrial) -> float:
    """A known optimum, and luck that both arms share at a seed but for a little of their own."""
    luck = math.sin(trial.seed) + 0.1 * math.sin(trial.seed + 100 * trial.lr)
    return 0.9 + height(trial.gamma, trial.lr) + 0.01 * luck


def height(gamma: float, lr: float) -> float:
    return -0.01 * math.log2(gamma / BEST_GAMMA) ** 2 - 0.01 * math.log2(lr / BEST_LR) ** 2


class Study(NamedTuple):
    out: Path
    result: TuneResult


def whole_study(objective: Callable[[ObjectiveTrial], object], out: Path, **options: Any) -> TuneResult:
    return study(
        objective, out, law=LAW, base_lr=0.5, steps=100, trials=16, seeds=2, confirm_seeds=10, metric="accuracy",
        percent=True, diverged_score=-9.0, batch_size=8, **options,
    )  # fmt: skip


def runs_of(out: Path) -> list[tuple[float, float, int]]:
    lines = (out / "runs.jsonl").read_text().splitlines()
    return [(run["gamma"], run["lr"], run["seed"]) for run in map(json.loads, lines)]
