r"""Fit the learning-rate law to runs: exponents below and above the bend, the bend, and the rate at γ = 1.

For each γ and seed the runs at several rates give one point, the best rate or the stable edge. Through the points

    log η(γ) = log η_c + lazy·min(0, log γ/γ_c) + rich·max(0, log γ/γ_c)

is fitted by least squares; intervals come from resampling the points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from gammaopt._errors import UsageError, one_of

Interval = tuple[float, float]
Of = Literal["best", "edge"]
RESAMPLES = 1000
ALIVE = 0.95  # of the loss of f = 0; a run whose ReLUs died ends at about that loss, or at that of a constant
FEWEST = 3  # distinct γ on a side of the bend that give its slope
BENDS = 81  # candidates for the bend, log-spaced over the middle of the range of γ


class Record(Protocol):
    """What a fit reads of a run's record; :class:`gammaopt.online.RunRecord` is one."""

    @property
    def gamma(self) -> float: ...
    @property
    def effective_lr(self) -> float: ...
    @property
    def seed(self) -> int: ...
    @property
    def final_loss(self) -> float | None: ...
    @property
    def curve(self) -> Any: ...


@dataclass(frozen=True)
class Point:
    """The best rate, or the stable edge, at one γ for one seed."""

    gamma: float
    seed: int
    lr: float


@dataclass(frozen=True)
class Slopes:
    """A piecewise power law and its 95 % intervals; what the points could not tell is ``None``.

    Attributes:
        lr_at_one: η at γ = 1, by the fitted law.
        lazy, rich: exponents below and above the bend.
        bend: γ_c.
        points: what was fitted.
    """

    lr_at_one: float
    lazy: float | None
    rich: float | None
    bend: float | None
    lr_interval: Interval
    lazy_interval: Interval | None
    rich_interval: Interval | None
    bend_interval: Interval | None
    points: tuple[Point, ...]


def critical_rates(records: Iterable[Record], of: Of) -> tuple[Point, ...]:
    """For each γ and seed, the best rate (``"best"``) or the largest stable one (``"edge"``).

    The best rate is the vertex of a parabola through the lowest log held-out loss and its neighbours in log η. The
    edge lies half-way, in log η, between the largest rate that ends 5 % below the loss of f = 0, or lower, and the
    next one: a run that blew up and died without a number overflowing is not stable. A γ whose best rate is the first
    or last tried, or whose edge was not reached, gives no point: its range is too small.
    """
    one_of("of", of, ("best", "edge"))
    cells: dict[tuple[float, int], list[Record]] = defaultdict(list)
    for record in records:
        cells[record.gamma, record.seed].append(record)
    points = []
    for (gamma, seed), runs in sorted(cells.items()):
        runs.sort(key=lambda run: run.effective_lr)
        found = _best(runs) if of == "best" else _edge(runs)
        if found is not None:
            points.append(Point(gamma, seed, math.exp(found)))
    return tuple(points)


def _score(run: Record) -> float:
    return math.inf if run.final_loss is None else math.log(max(run.final_loss, 1e-300))


def _best(runs: Sequence[Record]) -> float | None:
    rates, scores = [math.log(run.effective_lr) for run in runs], [_score(run) for run in runs]
    i = int(np.argmin(scores))
    if i in (0, len(runs) - 1):
        return None
    (a, b, c), (u, v, w) = rates[i - 1 : i + 2], scores[i - 1 : i + 2]
    if not math.isfinite(w):
        return b
    # Newton's form of the parabola through three points that need not be evenly spaced.
    first, second = (v - u) / (b - a), (w - v) / (c - b)
    bend = (second - first) / (c - a)
    return b if bend <= 0 else (a + b) / 2 - first / (2 * bend)


def _edge(runs: Sequence[Record]) -> float | None:
    stable = [run.final_loss is not None and run.final_loss < ALIVE * run.curve.loss[0] for run in runs]
    if not any(stable) or stable[-1]:
        return None
    last = max(i for i, good in enumerate(stable) if good)
    return (math.log(runs[last].effective_lr) + math.log(runs[last + 1].effective_lr)) / 2


def fit_slopes(points: Sequence[Point], *, bend: float | None = None, seed: int = 0) -> Slopes:
    """Fit the piecewise power law.

    Args:
        points: from :func:`critical_rates`.
        bend: where the law bends, if that is known; fitted if ``None`` and there are at least three γ on each side.
        seed: of the resampling.

    Raises:
        UsageError: for fewer than three distinct γ.
    """
    gammas = sorted({point.gamma for point in points})
    if len(gammas) < FEWEST:
        raise UsageError(
            f"{len(gammas)} γ have a rate inside their range, which is too few to fit; give at least {FEWEST}, "
            "or rates further apart"
        )
    x = np.log([point.gamma for point in points])
    y = np.log([point.lr for point in points])
    logs = np.log(gammas)
    bends = [math.log(bend)] if bend is not None else list(_candidates(logs))
    best = _fit(x, y, bends, np.ones((1, len(x))))[0]
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(x), np.full(len(x), 1 / len(x)), size=RESAMPLES).astype(float)
    present = np.array([(weights[:, x == value] > 0).any(1) for value in logs]).sum(0)
    drawn = _fit(x, y, bends, weights[present >= FEWEST])
    lazy_known = int((logs <= best[3] + 1e-9).sum()) >= FEWEST
    rich_known = int((logs >= best[3] - 1e-9).sum()) >= FEWEST
    bend_known = bend is None and len(bends) > 1

    def interval(i: int) -> Interval:
        low, high = np.nanpercentile(drawn[:, i], [2.5, 97.5])
        return float(low), float(high)

    def exp_interval(i: int) -> Interval:
        low, high = interval(i)
        return math.exp(low), math.exp(high)

    at_one, lazy, rich, corner = (float(value) for value in best)
    return Slopes(
        lr_at_one=math.exp(at_one),
        lazy=lazy if lazy_known else None,
        rich=rich if rich_known else None,
        bend=math.exp(corner) if bend_known else bend,
        lr_interval=exp_interval(0),
        lazy_interval=interval(1) if lazy_known else None,
        rich_interval=interval(2) if rich_known else None,
        bend_interval=exp_interval(3) if bend_known else None,
        points=tuple(points),
    )


def _candidates(logs: NDArray[np.float64]) -> Iterable[float]:
    """Where the bend may be: with at least three γ on each side; else at γ = 1, held to the range."""
    if len(logs) < 2 * FEWEST - 1:
        return [float(np.clip(0.0, logs[0], logs[-1]))]
    return [float(value) for value in np.linspace(logs[FEWEST - 1], logs[-FEWEST], BENDS)]


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], bends: Sequence[float], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(log η at γ = 1, lazy, rich, log γ_c) of weighted least squares over the candidate bends, a row for each weights.

    Normal equations, all resamples and bends at once: three unknowns, and x within a few decades.
    """
    corners = np.asarray(bends)
    below = np.minimum(x - corners[:, None], 0)
    above = np.maximum(x - corners[:, None], 0)
    design = np.stack([np.ones_like(below), below, above], axis=-1)  # (bends, points, 3)
    centre = y.mean()
    gram = np.einsum("rn,bni,bnj->rbij", weights, design, design, optimize=True)
    moment = np.einsum("rn,bni,n->rbi", weights, design, y - centre, optimize=True)
    # An unused column, all points on one side of the bend, gets 0 from the ridge.
    solution = np.linalg.solve(gram + 1e-10 * np.eye(3), moment[..., None])[..., 0]
    error = np.einsum("rbi,rbij,rbj->rb", solution, gram, solution) - 2 * (solution * moment).sum(-1)
    rows, best = np.arange(len(weights)), error.argmin(1)
    level, lazy, rich = solution[rows, best].T
    corner = corners[best]
    at_one = centre + level + lazy * np.minimum(-corner, 0) + rich * np.maximum(-corner, 0)
    spread = gram[rows, best]
    lazy = np.where(spread[:, 1, 1] > 0, lazy, math.nan)
    rich = np.where(spread[:, 2, 2] > 0, rich, math.nan)
    return np.stack([at_one, lazy, rich, corner], axis=1)
