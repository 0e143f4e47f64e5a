"""What a user's training function is handed for one run, and the record that comes of it."""

from __future__ import annotations

import bisect
import copy
import math
from typing import Any, SupportsFloat

from gammaopt._errors import UsageError, at_least
from gammaopt.online.record import log_spaced, six_digits
from gammaopt.tuning._folder import Cell
from gammaopt.tuning._objective import ObjectivePlan, ObjectiveRecord, number


class DivergedError(Exception):
    """This run diverged. ``trial.report`` raises it; a training function may raise it too."""


class ObjectiveTrial:
    """One run: a cell of the search, or of the confirmation, at one seed.

    Attributes:
        gamma: feature-learning strength: ``gammaopt.wrap(net, gamma=trial.gamma, …)``.
        lr: what a gammaopt optimizer on that model is given. It is the rate at γ = 1; the optimizer multiplies it by
            the law, s(γ), so don't do it again.
        effective_lr: η = ``lr``·s(γ) by the law that the study was given: for training that knows no law of its own.
        seed: of everything random in the run. Both arms of a pair get the same.
        steps: how many optimizer steps to train.
        settings: the user's own, as the study was given them.
    """

    def __init__(self, plan: ObjectivePlan, cell: Cell) -> None:
        self.gamma, self.lr, self.seed = cell.gamma, cell.lr, cell.seed
        self.effective_lr = plan.law.lr(cell.lr, cell.gamma)
        self.steps = plan.steps
        self.settings: dict[str, Any] = copy.deepcopy(plan.settings)
        self._plan, self._cell = plan, cell
        self._marks = log_spaced(plan.steps)
        self._kept: dict[int, tuple[int, float, int]] = {}  # mark → last step, sum and count of what it averages
        self._last: int | None = None
        self._sum, self._count = 0.0, 0
        self._diverged_at: int | None = None

    def report(self, step: int, value: SupportsFloat) -> None:
        """Tell how the run does on its way: for its curve, and as its score if the function returns none.

        May be called as often as every step; means between log-spaced steps are kept, at most 40 of them.

        Args:
            step: optimizer steps so far, from 0 or 1 to ``steps``; higher each time.
            value: a number or a tensor of one, e.g. the accuracy on this batch before the step that trains on it.

        Raises:
            DivergedError: if the value is NaN or infinite. Let it through: the run ends there.
            UsageError: for a step out of order or beyond ``steps``, or a value that is no number.
        """
        step = int(at_least("step", step, 0))
        if self._last is not None and step <= self._last:
            raise UsageError(f"step={step} was reported after step={self._last}; report each step once, in order")
        if step > self.steps:
            raise UsageError(f"step={step} is beyond the steps={self.steps} of a run; give study() the steps you train")
        found = number(value)
        if found is None:
            raise UsageError(f"value={value!r} was reported at step={step} and is no number; report one")
        self._last = step
        if self._diverged_at is not None or not math.isfinite(found):
            self._diverged_at = self._diverged_at or max(1, step)
            raise DivergedError(f"{found} was reported at step {step}")
        self._sum, self._count = self._sum + found, self._count + 1
        mark = bisect.bisect_left(self._marks, step)
        _, total, count = self._kept.get(mark, (0, 0.0, 0))
        self._kept[mark] = step, total + found, count + 1

    def _diverged(self) -> None:
        """The function said so itself."""
        self._diverged_at = self._diverged_at or max(1, self._last or 0)

    def _record(self, returned: object) -> ObjectiveRecord:
        """The run's record, once its function returned.

        Raises:
            UsageError: if that is no number, or there is neither a score nor a report.
        """
        plan, diverged_at = self._plan, self._diverged_at
        score = plan.worst
        if diverged_at is None:
            score = self._score(returned)
            # NaN fails every comparison: a score is good only if it is known to be no worse than a diverged run's.
            if not (math.isfinite(score) and plan.merit(score) >= plan.merit(plan.worst)):
                if math.isfinite(score) and plan.diverged_score is None:
                    raise UsageError(
                        f"the score {score:g} is below 0, which is what a diverged run would get; "
                        "give study() a diverged_score below the score of any run that trains, and another folder"
                    )
                score, diverged_at = plan.worst, self.steps + 1
        return ObjectiveRecord(
            gamma=self._cell.gamma,
            lr=self._cell.lr,
            seed=self._cell.seed,
            steps=plan.steps,
            effective_lr=plan.law.lr(self._cell.lr, self._cell.gamma),
            score=score,
            diverged_at=diverged_at,
            reports=tuple((step, six_digits(total / count)) for step, total, count in self._kept.values()),
        )

    def _score(self, returned: object) -> float:
        name = self._plan.objective
        if returned is None:
            if not self._count:
                raise UsageError(f"{name} returned nothing and reported nothing; return a score, or report on the way")
            return self._sum / self._count
        score = number(returned)
        if score is None:
            shown = f"{returned!r:.60}"
            raise UsageError(f"{name} returned {shown}, which is no number; return its score, or nothing")
        return score
