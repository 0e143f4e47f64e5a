"""Student's 95 % intervals: of exponents, from one line or from those of several seeds, and by the jackknife."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from _experiment import t_interval
from _sweep import slope
from scipy.stats import t as student

Interval = tuple[float, float]
Line = tuple[Sequence[float], Sequence[float]]  # x, y


def slope_interval(x: Sequence[float], y: Sequence[float], reach: float = 0.0) -> tuple[float, Interval | None]:
    """Least-squares slope and its interval by Student's t; ``None`` for two points, which have no scatter.

    Args:
        x, y: the points.
        reach: how close a y can be known, on a grid half of its step. Points that lie on a line by the grid's grace
            leave no scatter, so that the interval is no narrower than what errors of this size can do.
    """
    found, error = slope(x, y)
    if len(x) < 3:
        return found, None
    half = max(float(student.ppf(0.975, len(x) - 2)) * error, _least(x, reach))
    return found, (found - half, found + half)


def seeds_slope(lines: Sequence[Line], reach: float = 0.0) -> tuple[float, Interval | None]:
    """Mean of the seeds' slopes and its interval over seeds; of one seed that of :func:`slope_interval`.

    Points of one seed share its network and its data, whatever their x: only seeds are independent. A line without two
    x has no slope and does not count; where none has one, the slope is NaN.
    """
    lines = [line for line in lines if len(set(line[0])) > 1]
    if not lines:
        return math.nan, None
    if len(lines) == 1:
        return slope_interval(*lines[0], reach)
    slopes = [slope(x, y)[0] for x, y in lines]
    found, (low, high) = float(np.mean(slopes)), t_interval(slopes) or (0.0, 0.0)
    half = max((high - low) / 2, max(_least(x, reach) for x, _ in lines))
    return found, (found - half, found + half)


def jackknife_half(without: Sequence[float]) -> float:
    """Half of Student's 95 % interval, from what is estimated without each of n points in turn: n − 1 degrees."""
    return float(student.ppf(0.975, len(without) - 1)) * math.sqrt((len(without) - 1) * np.var(without))


def pairs_interval(values: Sequence[float], seeds: int) -> Interval | None:
    """Of a mean over all pairs of seeds, by the jackknife over seeds; ``None`` for fewer than three seeds.

    Args:
        values: in the order of ``itertools.combinations(range(seeds), 2)``. Pairs that share a seed are not
            independent, so that their scatter alone is too small an error.
        seeds: how many there are.
    """
    if seeds < 3:
        return None
    pairs = list(itertools.combinations(range(seeds), 2))
    without = [
        float(np.mean([value for pair, value in zip(pairs, values, strict=True) if seed not in pair]))
        for seed in range(seeds)
    ]
    half, found = jackknife_half(without), float(np.mean(values))
    return found - half, found + half


def _least(x: Sequence[float], reach: float) -> float:
    """How much errors of ± ``reach`` in each y can change the slope."""
    apart = np.asarray(x) - np.mean(x)
    return reach * float(np.abs(apart).sum() / (apart**2).sum())
