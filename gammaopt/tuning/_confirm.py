"""The confirmation: paired differences on fresh seeds, a t interval first, two rank-free tests beside it, a verdict.

The paired t interval says how large the difference is and is the one that decides. Wilcoxon's signed-rank test and
the permutation of signs assume less and stand beside it; with n seeds their p can't be below 2^(1−n).

Several tasks at once are held to one level by Holm's method: the smallest p counts m times, the next m − 1 times …
(S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gammaopt._errors import UsageError

Verdict = Literal["confirmed", "not confirmed", "worse", "range too small"]

RESAMPLES = 20_000  # of the signs; all 2^n of them where there are no more


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
        wilcoxon_p: two-sided p of Wilcoxon's signed-rank test of the differences.
        permutation_p: two-sided p of the mean difference under random signs.
    """

    metric: str
    seeds: tuple[int, ...]
    mean_difference: float
    ci95: tuple[float, float]
    p_value: float
    differences: tuple[float, ...]
    wilcoxon_p: float
    permutation_p: float

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
    interval = mean - half, mean + half
    return Confirmation(metric, tuple(seeds), mean, interval, p, tuple(differences), *_without_normality(differences))


def _without_normality(differences: list[float]) -> tuple[float, float]:
    """p of Wilcoxon's signed-rank test and of the permutation of signs. Equal arms have p = 1 in both."""
    import numpy as np
    from scipy.stats import permutation_test, wilcoxon

    moved = [d for d in differences if d != 0]
    if len(moved) < 2:  # one sign of two: p is 1 whatever it says
        return 1.0, 1.0
    signs = permutation_test(
        (np.array(moved),), np.mean, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES, rng=0
    )
    return float(wilcoxon(moved).pvalue), float(signs.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: those below 0.05 hold together at the 5 % level.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise UsageError(f"p={p} is no probability; give values from 0 to 1")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
