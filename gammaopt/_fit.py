r"""Fit the learning-rate law to runs: exponents below and above the bend, the bend, and the rate at γ = 1.

For each γ and seed the runs at several rates give one point, the best rate or the stable edge. Through the points

    log η(γ) = log η_c + lazy·min(0, log γ/γ_c) + rich·max(0, log γ/γ_c)

is fitted by least squares. Intervals come from resampling the points, each moved at random within its cell: from rates
that stand a factor apart a best rate or an edge is known to half of that factor, however many runs agree on it.
"""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
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
    """The best rate, or the stable edge, at one γ for one seed.

    Attributes:
        gamma, seed: of the runs.
        lr: η.
        reach: half of the distance, in log η, between the rates that were tried there. η is not known closer.
    """

    gamma: float
    seed: int
    lr: float
    reach: float = 0.0


@dataclass(frozen=True)
class Slopes:
    """A piecewise power law and its 95 % intervals; what the points could not tell is ``None``.

    Attributes:
        lr_at_one: η at γ = 1, by the fitted law.
        lazy, rich: exponents below and above the bend.
        bend: γ_c. Its interval ends at the last γ where it reaches the candidates' end, three γ from there.
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
    points: tuple[Point, ...] = field(repr=False)


def critical_rates(records: Iterable[Record], of: Of) -> tuple[Point, ...]:
    """For each γ and seed, the best rate (``"best"``) or the largest stable one (``"edge"``).

    The best rate is the vertex of a parabola through the lowest log held-out loss and its neighbours in log η. The
    edge lies half-way, in log η, between the largest rate that ends 5 % below the loss of f = 0, or lower, and the
    next one: a run that blew up and died without a number overflowing is not stable. A γ whose best rate is the first
    or last tried, or whose edge was not reached, gives no point: its range is too small.
    """
    one_of("of", of, ("best", "edge"))
    cells: dict[tuple[float, int], list[Record]] = defaultdict(list)
    for record in _checked(records):
        cells[record.gamma, record.seed].append(record)
    points = []
    for (gamma, seed), runs in sorted(cells.items()):
        runs.sort(key=lambda run: run.effective_lr)
        twice = next((a.effective_lr for a, b in pairwise(runs) if a.effective_lr == b.effective_lr), None)
        if twice is not None:
            raise UsageError(
                f"records holds γ={gamma:g}, η={twice:g}, seed={seed} twice; give those of one budget, "
                "[record for record in records if record.steps == …]"
            )
        found = _best(runs) if of == "best" else _edge(runs)
        if found is not None:
            log, reach = found
            points.append(Point(gamma, seed, math.exp(log), reach))
    return tuple(points)


READ = ("gamma", "effective_lr", "seed", "final_loss", "curve")  # what :class:`Record` has


def _checked(records: Iterable[Record]) -> Iterator[Record]:
    fix = "give run records, as train and train_many return them"
    if not isinstance(records, Iterable):
        raise UsageError(f"records is one {type(records).__name__} and no list; {fix}")
    for record in records:
        missing = next((name for name in READ if not hasattr(record, name)), None)
        if missing:
            raise UsageError(f"records holds {reprlib.repr(record)}, which has no {missing}; {fix}")
        yield record


def _score(run: Record) -> float:
    return math.inf if run.final_loss is None else math.log(max(run.final_loss, 1e-300))


def _best(runs: Sequence[Record]) -> tuple[float, float] | None:
    """Log of the best rate, and half of the distance between the rates around it."""
    rates, scores = [math.log(run.effective_lr) for run in runs], [_score(run) for run in runs]
    i = int(np.argmin(scores))
    if i in (0, len(runs) - 1):
        return None
    (a, b, c), (u, v, w) = rates[i - 1 : i + 2], scores[i - 1 : i + 2]
    reach = (c - a) / 4
    if not (math.isfinite(u) and math.isfinite(w)):  # a neighbour diverged, which far below the edge only chaos does
        return b, reach
    # Newton's form of the parabola through three points that need not be evenly spaced.
    first, second = (v - u) / (b - a), (w - v) / (c - b)
    bend = (second - first) / (c - a)
    return b if bend <= 0 else (a + b) / 2 - first / (2 * bend), reach


def _edge(runs: Sequence[Record]) -> tuple[float, float] | None:
    """Log of the stable edge, and half of the distance between the last stable rate and the next."""
    stable = [run.final_loss is not None and run.final_loss < ALIVE * run.curve.loss[0] for run in runs]
    if not any(stable) or stable[-1]:
        return None
    last = max(i for i, good in enumerate(stable) if good)
    below, above = math.log(runs[last].effective_lr), math.log(runs[last + 1].effective_lr)
    return (below + above) / 2, (above - below) / 2


def fit_slopes(points: Sequence[Point], *, bend: float | None = None, seed: int = 0) -> Slopes:
    """Fit the piecewise power law.

    Where the slopes below and above the fitted bend are the same within their interval, there is none to be seen, and
    the law is taken to bend at γ = 1.

    Args:
        points: from :func:`critical_rates`.
        bend: where the law bends, if that is known; fitted if ``None`` and there are six γ or more, three on each side.
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
    weights, moved = _resamples(points, logs, y, seed)
    fitted = bend is None and len(logs) >= 2 * FEWEST
    if fitted:
        bends = np.linspace(logs[FEWEST - 1], logs[-FEWEST], BENDS)
        best, drawn = _fit(x, y[None], bends, np.ones((1, len(x))))[0], _fit(x, moved, bends, weights)
        low, high = np.nanpercentile(drawn[:, 1] - drawn[:, 2], [2.5, 97.5])
        fitted = not low <= 0 <= high
    if not fitted:
        bends = np.array([float(np.clip(0.0, logs[0], logs[-1])) if bend is None else math.log(bend)])
        best, drawn = _fit(x, y[None], bends, np.ones((1, len(x))))[0], _fit(x, moved, bends, weights)
    lazy_known = int((logs <= best[3] + 1e-9).sum()) >= FEWEST
    rich_known = int((logs >= best[3] - 1e-9).sum()) >= FEWEST

    def interval(i: int) -> Interval:
        low, high = np.nanpercentile(drawn[:, i], [2.5, 97.5])
        return float(low), float(high)

    def exp_interval(i: int) -> Interval:
        low, high = interval(i)
        return math.exp(low), math.exp(high)

    def bend_interval() -> Interval:
        # At the candidates' end the bend is only known to lie beyond it: fewer than three γ are left there to tell.
        low, high = interval(3)
        low, high = logs[0] if low <= bends[0] + 1e-9 else low, logs[-1] if high >= bends[-1] - 1e-9 else high
        return math.exp(low), math.exp(high)

    at_one, lazy, rich, corner = (float(value) for value in best)
    return Slopes(
        lr_at_one=math.exp(at_one),
        lazy=lazy if lazy_known else None,
        rich=rich if rich_known else None,
        bend=math.exp(corner) if fitted else bend,
        lr_interval=exp_interval(0),
        lazy_interval=interval(1) if lazy_known else None,
        rich_interval=interval(2) if rich_known else None,
        bend_interval=bend_interval() if fitted else None,
        points=tuple(points),
    )


def _resamples(
    points: Sequence[Point], logs: NDArray[np.float64], y: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each point is drawn, and the points' log η moved within their cells; (resamples, points) each."""
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(y), np.full(len(y), 1 / len(y)), size=RESAMPLES).astype(float)
    where = np.searchsorted(logs, np.log([point.gamma for point in points]))
    present = np.array([(weights[:, where == i] > 0).any(1) for i in range(len(logs))]).sum(0)
    weights = weights[present >= FEWEST]
    # One move for all seeds of a γ: where they agree on a cell, more of them don't tell where in it the rate is.
    moves = random.uniform(-1, 1, size=(len(weights), len(logs)))[:, where]
    return weights, y + moves * np.array([point.reach for point in points])


def _fit(
    x: NDArray[np.float64], y: NDArray[np.float64], bends: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(log η at γ = 1, lazy, rich, log γ_c) of weighted least squares over the candidate bends, a row for each of y.

    Normal equations, all resamples and bends at once: three unknowns, and x within a few decades.
    """
    below = np.minimum(x - bends[:, None], 0)
    above = np.maximum(x - bends[:, None], 0)
    design = np.stack([np.ones_like(below), below, above], axis=-1)  # (bends, points, 3)
    centre = y.mean()
    gram = np.einsum("rn,bni,bnj->rbij", weights, design, design, optimize=True)
    moment = np.einsum("rn,bni->rbi", weights * (y - centre), design, optimize=True)
    # An unused column, all points on one side of the bend, gets 0 from the ridge.
    solution = np.linalg.solve(gram + 1e-10 * np.eye(3), moment[..., None])[..., 0]
    error = np.einsum("rbi,rbij,rbj->rb", solution, gram, solution) - 2 * (solution * moment).sum(-1)
    rows, best = np.arange(len(weights)), error.argmin(1)
    level, lazy, rich = solution[rows, best].T
    corner = bends[best]
    at_one = centre + level + lazy * np.minimum(-corner, 0) + rich * np.maximum(-corner, 0)
    spread = gram[rows, best]
    lazy = np.where(spread[:, 1, 1] > 0, lazy, math.nan)
    rich = np.where(spread[:, 2, 2] > 0, rich, math.nan)
    return np.stack([at_one, lazy, rich, corner], axis=1)
