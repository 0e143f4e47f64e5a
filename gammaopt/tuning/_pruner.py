r"""An Optuna pruner that compares runs at equal rescaled time t/τ(γ), where τ is the plateau that the law predicts.

A large γ waits: τ(γ) = T₁·γ^(1−2/L) steps under SGD (see :class:`gammaopt.EtaLaw`), after which runs of different γ
follow one curve in t/τ(γ) (Atanasov et al., ICLR 2025). A loss that has not moved yet is therefore no sign of a bad γ,
and a pruner that compares at equal t stops the runs that win later. This one asks of a run at step t, with s = t/τ(γ):

    s ≤ margin        nothing: it may still be on its plateau
    s > margin        is it worse than the quantile of what the other runs i had at their steps s·τ(γᵢ)?

A run that was stopped before counts as worse than any that went on: a sampler that has found the good region asks for
good runs only, and the quantile of those that were left would rise until it stops every second one of them.

Where τ is not sure it is taken too long, which costs steps and never a good run: ``margin`` for T₁ and for the spread
between seeds, and for 2 < L the larger of the power γ^(1−2/L) and of the logarithm, its limit at L = 2, because the
power alone is too slow just above 2. A study that does not know T₁ has it measured on its own finished runs.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from gammaopt._errors import UsageError, at_least, positive, require
from gammaopt._laws import EtaLaw
from gammaopt.tuning._space import GAMMA

require("optuna", "tune")
from optuna.pruners import BasePruner  # noqa: E402
from optuna.study import StudyDirection  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

if TYPE_CHECKING:
    import optuna

MOVED = 0.1  # share of the way from a run's first report to the best of the study that ends its plateau


def gamma_of(trial: FrozenTrial) -> float:
    """γ of a trial: its user attribute or parameter ``gamma``, or its parameter ``log2_gamma``.

    Raises:
        UsageError: if it has none of them.
    """
    for found in (trial.user_attrs, trial.params):
        if "gamma" in found:
            return positive("gamma", found["gamma"])
    if GAMMA in trial.params:
        return float(2.0 ** trial.params[GAMMA])
    raise UsageError(
        f"trial {trial.number} does not tell its γ: it has no parameter or user attribute 'gamma'; "
        "give RescaledTimePruner(gamma=…), a function of the trial"
    )


class RescaledTimePruner(BasePruner):
    """Stops a run that is worse than others were at the same t/τ(γ), never one still on its predicted plateau.

    For studies that train one trial after another: ``optuna.create_study(pruner=RescaledTimePruner(law))`` and an
    objective that calls ``trial.report(value, step)`` and ``trial.should_prune()``. ``gammaopt tune`` has no use for
    it: the trials of a batch train together in one stack, and all of them have ended when the first is told.

    Steps count from 1. A report that is not a number stops its run at once: a diverged run is on no plateau.

    Args:
        law: of the network and optimizer.
        plateau_steps: T₁, the plateau at γ = 1 and the law's best rate, in steps; measured on the finished trials if
            ``None``: a trial of the better half has left its plateau where its reports stay a tenth of the way from the
            first one to the best of the study, and the longest T₁ that any of them tells counts.
        margin: predicted plateaus that a run is left alone for; ≥ 1.
        quantile: of the other trials at equal t/τ, counted from the worst, that a run has to reach; 0 < quantile < 1,
            and 0.5 is the median. No more than this share of the trials is stopped at any one t/τ.
        n_startup_trials: finished trials that must have a value at that t/τ before any run is judged; ≥ 1.
        gamma: trial → γ; by default its user attribute or parameter ``gamma``, or its parameter ``log2_gamma``.

    Raises:
        UsageError: for a value outside these ranges, or from a trial that does not tell its γ.

    Example:
        >>> import optuna
        >>> from gammaopt import EtaLaw
        >>> pruner = RescaledTimePruner(EtaLaw(depth=3), plateau_steps=20)
        >>> round(pruner.plateau(1.0, 20)), round(pruner.plateau(1000.0, 20))
        (20, 200)
        >>> study = optuna.create_study(direction="maximize", pruner=pruner)
    """

    def __init__(
        self,
        law: EtaLaw,
        plateau_steps: float | None = None,
        *,
        margin: float = 2.0,
        quantile: float = 1 / 3,
        n_startup_trials: int = 5,
        gamma: Callable[[FrozenTrial], float] = gamma_of,
    ) -> None:
        self._law = law
        self._plateau_steps = None if plateau_steps is None else positive("plateau_steps", plateau_steps)
        if not positive("margin", margin) >= 1:
            raise UsageError(f"margin={margin:g} ends before the plateau does; give at least 1")
        if not 0 < positive("quantile", quantile) < 1:
            raise UsageError(f"quantile={quantile:g} is no share of the trials; give 0 < quantile < 1")
        self._margin, self._quantile = float(margin), float(quantile)
        self._n_startup_trials = at_least("n_startup_trials", n_startup_trials, 1)
        self._gamma = gamma

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether to stop ``trial`` at its last reported step."""
        step = trial.last_step
        if step is None:
            return False
        value = trial.intermediate_values[step]
        if math.isnan(value):
            return True
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        gamma = self._gamma(trial)
        finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if len(finished) < self._n_startup_trials:
            return False
        at_one = self._plateau_steps or self._measured(finished, sign)
        if at_one is None or (own := self.plateau(gamma, at_one)) * self._margin >= step:
            return False
        s = step / own
        there = [self._at(other, s, at_one) for other in finished]
        others = [_merit(value, sign) for value in there if value is not None]
        if len(others) < self._n_startup_trials:
            return False
        for stopped in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,)):
            reached = self._at(stopped, s, at_one)
            others.append(-math.inf if reached is None else _merit(reached, sign))
        return sign * value < sorted(others)[int(self._quantile * (len(others) - 1))]

    def _at(self, trial: FrozenTrial, s: float, at_one: float) -> float | None:
        """What a trial had at t/τ = s, or ``None`` if it has no report there."""
        return value_at(trial.intermediate_values, s * self.plateau(self._gamma(trial), at_one))

    def plateau(self, gamma: float, at_one: float) -> float:
        """τ(γ) in steps, from T₁ = ``at_one``; where two formulas are possible, the longer."""
        known = self._law.plateau_steps(gamma, at_one)
        if self._law.optimizer != "sgd" or self._law.depth <= 2:
            return known
        at_two = EtaLaw(2.0, self._law.optimizer, self._law.loss, self._law.knee)
        return max(known, at_two.plateau_steps(gamma, at_one))

    def _measured(self, finished: Sequence[FrozenTrial], sign: float) -> float | None:
        """The longest T₁ that the better half of the finished trials tells, or ``None`` if none of them moved."""
        ranked = sorted(finished, key=lambda trial: sign * float(trial.value or 0.0), reverse=True)
        better = [trial.intermediate_values for trial in ranked[: (len(ranked) + 1) // 2]]
        best = max((sign * value for values in better for value in values.values() if value == value), default=None)
        found = []
        for trial, values in zip(ranked, better, strict=False):
            left = None if best is None else _left(values, best, sign)
            if left is not None:
                found.append(left / self.plateau(self._gamma(trial), 1.0))
        return max(found, default=None)


def _merit(value: float, sign: float) -> float:
    """Higher is better, and what is no number is worse than anything."""
    return -math.inf if math.isnan(value) else sign * value


def _left(values: Mapping[int, float], best: float, sign: float) -> float | None:
    """The step from which on a value is :data:`MOVED` of the way from the first one to ``best``, or ``None``.

    For good, not for the first time: the accuracy of single batches jumps before it rises.
    """
    steps = sorted(values)
    if not steps:
        return None
    first = sign * values[steps[0]]
    still = [i for i, step in enumerate(steps) if not sign * values[step] - first >= MOVED * (best - first) > 0]
    return None if still[-1] == len(steps) - 1 else float(steps[still[-1] + 1])


def value_at(values: Mapping[int, float], step: float) -> float | None:
    """The reported value at any step between the first and the last, linear in log step; else ``None``."""
    steps = sorted(values)
    after = bisect.bisect_left(steps, step)
    if after == len(steps) or step < steps[0]:
        return None
    if steps[after] == step:
        return values[steps[after]]
    low, high = steps[after - 1], steps[after]
    share = math.log(step / low) / math.log(high / low) if low > 0 else (step - low) / (high - low)
    return values[low] * (1 - share) + values[high] * share
