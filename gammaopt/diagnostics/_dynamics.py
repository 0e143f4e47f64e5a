r"""Reading a loss curve: catapult, plateau, the drops of a staircase, divergence; and curves that collapse in time.

Relative loss ℓ(t)/ℓ(0), ℓ(0) being the loss of f = 0. A small γ at a large rate catapults: ℓ rises above its start
while the sharpness falls, and then converges (Lewkowycz et al., arXiv 2003.02218). A large γ waits on a plateau,
t_plateau ∝ γ^(1−2/L), and then learns a staircase of features one by one (Abbe et al., COLT 2023), each a peak of

    g(t) = −d(ℓ/ℓ(0)) / d ln t

Curves of different large γ are one curve in rescaled time t/t_plateau; how well is told by the spread between them,
relative to how far they move (Atanasov et al., ICLR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gammaopt._errors import UsageError, at_least, positive
from gammaopt.online.train import DIVERGED_RATIO

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Catapult:
    """A rise above the start that came back: ``height`` is the peak over ℓ(0), ``step`` that of the peak."""

    height: float
    step: float


@dataclass(frozen=True)
class Drop:
    """One stair: centred at ``step``, from ``before`` to ``after`` in relative loss."""

    step: float
    before: float
    after: float

    @property
    def size(self) -> float:
        """How far the relative loss falls."""
        return self.before - self.after


@dataclass(frozen=True)
class Dynamics:
    """What a loss curve did.

    Attributes:
        catapult: the rise that came back, or ``None``.
        plateau: steps until the loss stayed below (1 − ``moved``)·ℓ(0); ``None`` if it never did.
        drops: the stairs, in time.
        diverged_at: the step of divergence, or ``None``.
        final: the last relative loss; ``inf`` for a diverged run.
    """

    catapult: Catapult | None
    plateau: float | None
    drops: tuple[Drop, ...]
    diverged_at: float | None
    final: float

    def __str__(self) -> str:
        if self.diverged_at is not None:
            return f"diverged at step {self.diverged_at:g}"
        parts = []
        if self.catapult:
            parts.append(f"catapult to {self.catapult.height:.3g} × the start at step {self.catapult.step:.4g}")
        parts.append("still on its plateau" if self.plateau is None else f"left its plateau at step {self.plateau:.4g}")
        parts += [f"fell by {drop.size:.0%} at step {drop.step:.4g}" for drop in self.drops]
        return "; ".join([*parts, f"ends at {self.final:.3g} of the start"])


def dynamics(
    curve: Any, *, start: float | None = None, moved: float = 0.1, rise: float = 1.3, smallest: float = 0.05
) -> Dynamics:
    """Read a loss curve.

    Args:
        curve: a :class:`gammaopt.online.RunRecord` or ``Curve``, or (steps, losses), steps > 0 and ascending.
        start: ℓ(0), the loss of f = 0; the first of the curve by default.
        moved: share of ℓ(0) by which the loss must fall, and stay fallen, to have left the plateau; 0 < moved < 1.
        rise: peak over ℓ(0) that counts as a catapult, if the loss comes back below ℓ(0); above the noise of a batch.
        smallest: drop, in shares of ℓ(0), that counts as a stair.

    Raises:
        UsageError: for a curve that is unequal in length, not ascending in steps, or empty; that of a record may be
            empty if it tells where the run diverged.

    Example:
        >>> print(dynamics(([1, 10, 100, 1000], [1.0, 1.0, 0.1, 0.1])))
        left its plateau at step 12.92; fell by 90% at step 31.62; ends at 0.1 of the start
    """
    if not 0 < moved < 1:
        raise UsageError(f"moved={moved:g} is no share; give 0 < moved < 1")
    positive("rise", rise), positive("smallest", smallest)
    told = getattr(curve, "diverged_at", None)
    steps, relative = relative_curve(curve, start=start)
    if not len(steps):
        return Dynamics(None, None, (), float(_arrays(curve)[0][0] if told is None else told), math.inf)
    bad = ~np.isfinite(relative) | (relative > DIVERGED_RATIO)
    if bad.any() or told is not None:
        at = float(steps[np.argmax(bad)]) if bad.any() else float(told or 0)
        good = relative[: int(np.argmax(bad))] if bad.any() else relative
        return Dynamics(None, _left(steps, good, moved), (), at, math.inf)
    peak = int(np.argmax(relative))
    catapult = None
    if relative[peak] >= rise and relative[-1] < 1:
        catapult = Catapult(float(relative[peak]), float(steps[peak]))
    return Dynamics(
        catapult, _left(steps, relative, moved), _drops(steps, relative, smallest), None, float(relative[-1])
    )


def relative_curve(curve: Any, *, start: float | None = None) -> tuple[Array, Array]:
    """Steps and ℓ(t)/ℓ(0) of a curve, see :func:`dynamics`; none of a run that diverged before it had a finite loss."""
    whole, none = getattr(curve, "curve", curve), (np.empty(0), np.empty(0))
    if getattr(curve, "diverged_at", None) is not None and not len(getattr(whole, "steps", [None])):
        return none
    steps, losses = _arrays(curve)
    if not np.isfinite(losses[0]):  # which is no start to divide by
        return none
    return steps, losses / positive("start", float(losses[0]) if start is None else start)


def _arrays(curve: Any) -> tuple[Array, Array]:
    curve = getattr(curve, "curve", curve)
    try:
        steps, losses = (curve.steps, curve.loss) if hasattr(curve, "steps") else curve
    except (TypeError, ValueError):
        raise UsageError(
            f"a curve is a {type(curve).__name__} that is no pair; give a run's record, or (steps, losses)"
        ) from None
    t, y = np.asarray(steps, dtype=float), np.asarray(losses, dtype=float)
    if t.shape != y.shape or t.ndim != 1 or len(t) == 0:
        raise UsageError(f"a curve of {t.size} steps and {y.size} losses; give as many losses as steps, at least one")
    if not (t[0] > 0 and np.all(np.diff(t) > 0)):
        raise UsageError("the steps of a curve must ascend from above 0; count steps from 1")
    return t, y


def _left(steps: Array, relative: Array, moved: float) -> float | None:
    """Where the curve falls below 1 − moved for good, interpolated in log t."""
    above = np.flatnonzero(relative >= 1 - moved)
    last = int(above[-1]) if len(above) else -1
    if len(relative) == 0 or last == len(relative) - 1:
        return None
    if last < 0:
        return float(steps[0])
    low, high = relative[last + 1], relative[last]
    share = (high - (1 - moved)) / (high - low)
    return float(steps[last] ** (1 - share) * steps[last + 1] ** share)


def _drops(steps: Array, relative: Array, smallest: float) -> tuple[Drop, ...]:
    """Peaks of g, cut where g falls below half of the smaller neighbour; each from its valley to the next."""
    if len(steps) < 3:
        return ()
    logs, lowest = np.log(steps), np.minimum.accumulate(relative)  # what was gained for good: noise rises again
    rates = -np.diff(lowest) / np.diff(logs)
    cuts = [0]
    peak = valley = 0
    for i in range(1, len(rates)):
        if rates[i] > rates[peak] and valley == peak:
            peak = valley = i
        elif rates[i] < rates[valley]:
            valley = i
        elif rates[valley] < 0.5 * min(rates[peak], rates[i]) and rates[i] > 0:
            cuts.append(valley)
            peak = valley = i
        elif rates[i] > rates[peak]:
            peak = valley = i
    cuts.append(len(rates))
    found: list[Drop] = []
    for a, b in pairwise(cuts):
        fall = -np.diff(lowest[a : b + 1])
        size = float(fall.sum())
        if size < smallest:
            continue
        middle = (logs[a:b] + logs[a + 1 : b + 1]) / 2
        found.append(Drop(float(np.exp((fall * middle).sum() / size)), float(lowest[a]), float(lowest[b])))
    return tuple(found)


@dataclass(frozen=True)
class Collapse:
    """How well curves fall on one: ``spread`` in rescaled time, and ``before`` in the steps themselves.

    A spread is the rms over time of the standard deviation between the curves, over the standard deviation of all
    values: 0 if they are one curve, 1 if knowing the time tells nothing. ``times`` is the grid, ``curves`` the relative
    losses on it, a row each.
    """

    spread: float
    before: float
    times: Array
    curves: Array


def collapse(curves: Sequence[Any], times: Sequence[float] | None = None, *, points: int = 60) -> Collapse:
    """Put several curves on one rescaled time axis and tell how well they collapse.

    Args:
        curves: at least two, as for :func:`dynamics`.
        times: each curve's unit of time, for example ``law.plateau_steps(gamma, at_one)``; the measured plateaus by
            default.
        points: of the common grid, log-spaced over the times that all curves have.

    Raises:
        UsageError: for fewer than two curves, a diverged one, one still on its plateau without ``times``, or curves
            that have no time in common.

    Example:
        >>> one = [1, 10, 100, 1000], [1.0, 1.0, 0.5, 0.1]
        >>> slower = [10, 100, 1000, 10000], [1.0, 1.0, 0.5, 0.1]
        >>> collapse([one, slower]).spread < 1e-12, collapse([one, slower]).before > 0.5
        (True, True)
    """
    if len(curves) < 2:
        raise UsageError(f"{len(curves)} curves can't collapse; give at least two")
    at_least("points", points, 2)
    data = [_arrays(curve) for curve in curves]
    if not all(np.isfinite(losses).all() for _, losses in data):
        raise UsageError("a curve has losses that are not finite; leave diverged runs out")
    if times is None:
        found = [dynamics(curve).plateau for curve in curves]
        if None in found:
            raise UsageError(f"curve {found.index(None)} is still on its plateau; give times=, or longer curves")
        times = [float(value) for value in found if value is not None]
    if len(times) != len(curves):
        raise UsageError(f"{len(times)} times for {len(curves)} curves; give one for each")
    units = [positive("times", value) for value in times]
    grid, rows = _common(data, units, points)
    _, plain = _common(data, [1.0] * len(data), points)
    return Collapse(_spread(rows), _spread(plain), grid, rows)


def _common(data: Sequence[tuple[Array, Array]], units: Sequence[float], points: int) -> tuple[Array, Array]:
    low = max(steps[0] / unit for (steps, _), unit in zip(data, units, strict=True))
    high = min(steps[-1] / unit for (steps, _), unit in zip(data, units, strict=True))
    if not high > low:
        raise UsageError("the curves have no time in common after rescaling; give longer ones")
    grid = np.linspace(math.log(low), math.log(high), points)
    rows = [
        np.interp(grid, np.log(steps / unit), losses / losses[0])
        for (steps, losses), unit in zip(data, units, strict=True)
    ]
    return np.exp(grid), np.array(rows)


def _spread(rows: Array) -> float:
    total = float(rows.std())
    return float(np.sqrt((rows.std(0) ** 2).mean())) / total if total else 0.0
