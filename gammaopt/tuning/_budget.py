"""What every study's plan says: its budget, its seeds, its space, and how its scores are called.

Tuning seeds and fresh seeds come from blocks of their own, one pair of blocks for each base seed, so no confirmation
ever sees a seed that anything was tuned on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gammaopt._errors import UsageError, at_least, one_of, positive
from gammaopt._laws import EtaLaw
from gammaopt.tuning._record import Record
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
        metric: name of the score that is tuned and confirmed.
        direction: ``"maximize"`` or ``"minimize"``.
        metric_at_end: another one, told beside it; ``None`` if there is none.
        scale: what a score is multiplied by to be shown: 100 for a fraction in percent.
        curve: what a run's curve shows.
        base_lr: the centre of the searched rates, at γ = 1.
        source: a file or folder of the code that is studied; its git commit is kept.
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
    direction: str
    metric_at_end: str | None
    scale: float
    curve: str
    base_lr: float
    source: Path

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

    def command(self, *, out: str | None = None, storage: str | None = None, study: str | None = None) -> str:
        """The command line, or the call, that makes this study; with a folder and a storage, there."""
        raise NotImplementedError

    def option(self, name: str) -> str:
        """How somebody writes the option called ``name``, e.g. ``--gamma-range``."""
        return f"--{name.replace('_', '-')}"

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        raise NotImplementedError

    def read_record(self, data: dict[str, Any]) -> Any:
        """A record of one of its runs, from its JSON values."""
        raise NotImplementedError

    def record_fields(self) -> list[str]:
        """Names of what a record says of a run, its curve aside."""
        raise NotImplementedError

    def score(self, record: Record) -> float:
        """The score of a run that is tuned and confirmed."""
        return float(getattr(record, self.metric))

    def merit(self, score: float) -> float:
        """The score, or its negative if it is minimised: larger is better."""
        return score if self.direction == "maximize" else -score

    def shown(self, score: float, decimals: int = 2) -> str:
        """A score as a reader wants it: a fraction in percent with that many decimals, anything else as it is."""
        return f"{100 * score:.{decimals}f} %" if self.scale == 100 else f"{score:.4g}"

    def shown_difference(self, difference: float) -> str:
        """A difference of two scores in the unit of :meth:`shown`, with its sign."""
        return f"{100 * difference:+.2f}" if self.scale == 100 else f"{difference:+.3g}"

    def with_fresh_seeds(self, count: int) -> Self:
        """The same plan with that many fresh seeds; those of this one come first."""
        return dataclasses.replace(self, confirm_seeds=count)  # type: ignore[type-var]  # plans are dataclasses

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
