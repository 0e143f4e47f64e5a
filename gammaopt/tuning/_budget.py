"""What every study's plan says: its budget, its seeds, its space, and how its scores are called.

Tuning seeds and fresh seeds come from blocks of their own, one pair of blocks for each base seed, so no confirmation
ever sees a seed that anything was tuned on.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gammaopt._errors import UsageError, at_least, one_of, positive
from gammaopt._laws import EtaLaw
from gammaopt.tuning._samplers import SAMPLERS
from gammaopt.tuning._space import Space

LAW_VERSION = 1  # of the formulas behind η*(γ): a study made under other formulas is another study
CONFIRM_OFFSET = 500_000  # distance between tuning and confirmation seeds


@dataclass(frozen=True)
class RunBudget:
    """What one full run costs: steps, samples, and floating-point operations; ``None`` where it is not known."""

    steps: int
    samples: int | None
    flops: float | None


class Plan:
    """What the search, the confirmation and the report ask of a plan.

    Attributes:
        metric: the attribute of a run's record that is maximised and confirmed.
        metric_at_end: another one, told beside it; ``None`` if there is none.
        scale: what a score is multiplied by to be shown: 100 for a fraction in percent.
        curve: what a run's curve shows.
    """

    steps: int | None  # never None once the plan is made
    trials: int
    seeds: int
    confirm_seeds: int
    gamma_range: tuple[float, float]
    octaves: float
    sampler: str
    seed: int
    law_version: int

    metric: str
    metric_at_end: str | None
    scale: float
    curve: str

    @property
    def rates(self) -> int:
        """M: how many of the rates at γ = 1 somebody tries who doesn't tune γ: about √(K·M), at least 4."""
        return max(4, round(math.sqrt(self.trials)))

    @property
    def tuning_seeds(self) -> range:
        """Seeds that every trial is averaged over."""
        start = self.seed * 2 * CONFIRM_OFFSET
        return range(start, start + self.seeds)

    @property
    def fresh_seeds(self) -> range:
        """Seeds that no trial has seen, for the confirmation."""
        start = self.seed * 2 * CONFIRM_OFFSET + CONFIRM_OFFSET
        return range(start, start + self.confirm_seeds)

    @property
    def base_lr(self) -> float:
        """The centre of the searched rates, at γ = 1."""
        raise NotImplementedError

    @property
    def law(self) -> EtaLaw:
        """The law that turns a rate at γ = 1 into the rate at γ."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What the study is about, in a few words."""
        raise NotImplementedError

    def names(self) -> dict[str, Any]:
        """What is studied, for a result: task, loss and optimizer."""
        raise NotImplementedError

    @property
    def folder(self) -> str:
        """Name of the study's folder and of its studies in a storage."""
        raise NotImplementedError

    @property
    def source(self) -> Path:
        """A file or folder of the code that is studied; its git commit is kept."""
        raise NotImplementedError

    def command(self) -> str:
        """The command line, or the words, that make this study."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        raise NotImplementedError

    def read_record(self, data: dict[str, Any]) -> Any:
        """A record of one of its runs, from its JSON values."""
        raise NotImplementedError

    def run_budget(self) -> RunBudget:
        """What one full run costs."""
        raise NotImplementedError

    def space(self, arm: str) -> Space:
        """What an arm searches: the plane of γ and rate, or the rates at γ = 1."""
        return Space(self.gamma_range if arm == "tuned" else None, self.base_lr, self.octaves)

    @property
    def digest(self) -> str:
        """Eight hex digits that name the plan; the device is not part of it."""
        values = {name: value for name, value in self.to_dict().items() if name != "device"}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=4).hexdigest()

    def _check_budget(self) -> None:
        for name, minimum in {"steps": 1, "trials": 4, "seeds": 1, "confirm_seeds": 2, "seed": 0}.items():
            at_least(name, getattr(self, name), minimum)
        for name in ("seeds", "confirm_seeds"):
            if getattr(self, name) > CONFIRM_OFFSET:
                raise UsageError(f"{name}={getattr(self, name)} is too many; give at most {CONFIRM_OFFSET}")
        one_of("sampler", self.sampler, SAMPLERS)
        object.__setattr__(self, "octaves", positive("octaves", self.octaves))
        if not (isinstance(self.gamma_range, Sequence) and len(self.gamma_range) == 2):
            raise UsageError(f"gamma_range={self.gamma_range} is no pair; give the lowest and the highest γ")
        low, high = (positive("gamma", value) for value in self.gamma_range)
        if not low < high:
            raise UsageError(f"gamma_range={low:g} {high:g} is empty; give the lower γ first")
        object.__setattr__(self, "gamma_range", (low, high))
