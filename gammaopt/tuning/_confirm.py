"""The confirmation: paired differences on fresh seeds, a t interval, and the verdict in one word."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gammaopt._errors import UsageError

Verdict = Literal["confirmed", "not confirmed", "worse"]


@dataclass(frozen=True)
class Confirmation:
    """Tuned γ minus γ = 1 on the same fresh seeds.

    Attributes:
        metric: what was compared, e.g. ``"prequential_accuracy"``.
        seeds: the fresh seeds.
        mean_difference: mean of ``differences``, as a fraction (0.01 is one point of accuracy).
        ci95: two-sided 95 % paired t interval of the mean difference.
        p_value: two-sided p of the paired t test.
        differences: tuned minus baseline, seed by seed.
    """

    metric: str
    seeds: tuple[int, ...]
    mean_difference: float
    ci95: tuple[float, float]
    p_value: float
    differences: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """``confirmed`` if the whole interval is above 0, ``worse`` if it is below, else ``not confirmed``."""
        low, high = self.ci95
        return "confirmed" if low > 0 else "worse" if high < 0 else "not confirmed"


def paired_t(metric: str, seeds: Sequence[int], tuned: Sequence[float], baseline: Sequence[float]) -> Confirmation:
    """Compare two arms seed by seed with a paired t interval.

    Args:
        metric: name of the scores.
        seeds: n ≥ 2 seeds; ``tuned[i]`` and ``baseline[i]`` are the scores of ``seeds[i]``.
        tuned, baseline: n finite scores each, larger is better.

    Raises:
        UsageError: for fewer than two seeds or lists of different length.

    Example:
        >>> result = paired_t("accuracy", [1, 2, 3], [0.8, 0.9, 0.85], [0.7, 0.85, 0.8])
        >>> round(result.mean_difference, 4), result.verdict
        (0.0667, 'not confirmed')
    """
    from scipy.stats import t as student

    if not len(seeds) == len(tuned) == len(baseline):
        raise UsageError(f"{len(seeds)} seeds, {len(tuned)} and {len(baseline)} scores; give one of each per seed")
    if len(seeds) < 2:
        raise UsageError(f"{len(seeds)} seed can't give an interval; give at least 2")
    differences = [a - b for a, b in zip(tuned, baseline, strict=True)]
    n, mean = len(differences), math.fsum(differences) / len(differences)
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = float(student.ppf(0.975, n - 1)) * error
    p = 2 * float(student.sf(abs(mean) / error, n - 1)) if error > 0 else float(mean == 0)
    return Confirmation(metric, tuple(seeds), mean, (mean - half, mean + half), p, tuple(differences))
