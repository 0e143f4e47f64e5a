"""Phase portraits of an MLP on augmented digits: stable edges, best rates and the budget's lower edge against the laws.

    python experiments/phase_portrait.py --preset cpu

Width 64 in mean-field form, float64, one pass. Upper edges: γ² below 1 for SGD and MSE, γ for SGD and cross-entropy and
for Adam; above 1 γ^(2/L) for SGD, γ^(1/L) for Adam. Lower edge, where a budget of T steps just trains:
∝ η*(γ)·plateau(γ)/T, which is γ/T for γ ≥ 1 under SGD. The cells are kept in --work, so a killed run goes on and a
second one computes nothing.

Every number has a 95 % interval: of the edges' exponents from resampling their points (a γ and a seed each), of the
distance between best rates and the law from resampling the seeds, of the lower edge from Student's t of its fit. A rate
is known to half of the grid's step, which is in all of them: resampled rates are moved by a uniform error of that
size, and the lower edge's points scatter by no less about its line.
Writes results/phase_portrait/PRESET.json and .png and prints predicted | measured | 95 % interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _experiment import Claim, Found, Place, below, near, number, run
from _sweep import local_slopes, slope, steps_done
from numpy.typing import NDArray
from scipy.stats import t

from gammaopt._errors import UsageError
from gammaopt._fit import critical_rates, fit_slopes
from gammaopt.diagnostics import Grid, Portrait, portrait
from gammaopt.online import MLP, Recipe
from gammaopt.report import draw_portrait


@dataclass(frozen=True)
class Case:
    """One portrait; γ and c in η = c·s(γ) as (lowest, highest, how many)."""

    optimizer: str
    loss: str
    depth: int
    gammas: tuple[float, float, int]
    rates: tuple[float, float, int]
    budgets: tuple[int, ...] = (300,)
    seeds: int = 2
    width: int = 64

    @property
    def seed_numbers(self) -> range:
        """As :meth:`Grid.log` numbers them."""
        return range(self.seeds)

    @property
    def name(self) -> str:
        """Short, a folder's name too."""
        return f"{self.optimizer}-{self.loss}-L{self.depth}-{max(self.budgets)}"


SGD = Case("sgd", "mse", 2, (0.01, 1000.0, 11), (1.5, 300.0, 24), seeds=4)
ADAM = Case("adam", "mse", 3, (0.01, 1000.0, 11), (0.03, 30.0, 19))
LOWER = Case("sgd", "mse", 3, (1.0, 100.0, 5), (0.02, 60.0, 22), (100, 300, 1000))
CPU = (
    SGD,
    replace(SGD, depth=3),
    replace(SGD, depth=5),
    Case("sgd", "cross_entropy", 3, (10**-1.5, 1000.0, 19), (0.1, 1000.0, 25)),
    ADAM,
    replace(ADAM, depth=2, gammas=(1.0, 1000.0, 7)),
    replace(ADAM, depth=5, gammas=(1.0, 1000.0, 7)),
    LOWER,
)
PRESETS = {
    "smoke": (replace(SGD, gammas=(1.0, 100.0, 5), rates=(2.0, 1000.0, 9), budgets=(60,), seeds=2),),
    "cpu": CPU,
    "gpu": tuple(
        replace(case, seeds=8, budgets=tuple(3 * budget for budget in case.budgets), rates=(*case.rates[:2], 41))
        for case in CPU
    ),
    "paper": tuple(
        replace(case, seeds=4, budgets=tuple(10 * budget for budget in case.budgets), width=1024) for case in CPU
    ),
}


def measure(preset: Sequence[Case], place: Place) -> Found:
    """All portraits, and what each can decide."""
    portraits = {case: draw(case, place) for case in preset}
    claims = {case: examine(case, made) for case, made in portraits.items()}
    plain = [case for case in preset if (case.optimizer, case.loss) == ("sgd", "mse") and len(case.budgets) == 1]
    shown = next((case for case in plain if case.depth == 3), plain[0])
    edges = [
        f"γ^{number(claim.measured, '.2f')} at L = {case.depth}"
        for case in plain
        for claim in claims[case]
        if claim.what.startswith("edge exponent, γ ≥ 1")
    ]
    meaning = (
        f"Every γ has its own learning rate: the largest that trains follows {', '.join(edges)} under SGD and MSE for "
        f"γ ≥ 1, predicted γ^(2/L); the picture is L = {shown.depth}."
    )
    figure = draw_portrait(portraits[shown])
    figure.suptitle(f"L = {shown.depth}, {shown.optimizer.upper()}, {shown.loss.upper()}", fontsize=11)
    data = {case.name: rates(case, made) for case, made in portraits.items()}
    return Found([one for of in claims.values() for one in of], meaning, figure, {"portraits": data})


def rates(case: Case, made: Portrait) -> dict[str, Any]:
    """What the claims are made from: [γ, seed, log₁₀ η] of best rates and edges, and [γ, log₁₀ η] of lower edges."""
    longest = made.at(max(case.budgets))
    of_seeds = {
        of: [[p.gamma, p.seed, round(math.log10(p.lr), 4)] for p in critical_rates(longest, of)]
        for of in ("best", "edge")
    }
    lower = {
        str(budget): [[gamma, round(math.log10(eta), 4)] for gamma, eta in made.trained_edge(budget).items()]
        for budget in case.budgets
    }
    return {**of_seeds, "lower": lower}


def main(argv: Sequence[str] | None = None) -> Path:
    return run("phase_portrait", __doc__, PRESETS, measure, argv)


def draw(case: Case, place: Place) -> Portrait:
    """Train the case's cells."""
    stream = place.stream
    recipe = Recipe(
        partial(MLP, math.prod(stream.shape), stream.classes, width=case.width, depth=case.depth),
        stream,
        case.loss,  # type: ignore[arg-type]
        case.optimizer,  # type: ignore[arg-type]
        max(case.budgets),
        depth=float(case.depth),
        device=place.device,
        dtype=torch.float64,
    )
    return portrait(
        recipe, Grid.log(case.gammas, case.rates, case.seeds), place.work / case.name,
        budgets=case.budgets, on_progress=steps_done(case.name),
    )  # fmt: skip


def examine(case: Case, made: Portrait) -> list[Claim]:
    """The claims that this portrait can decide."""
    if len(case.budgets) > 1:
        return lower_edge(case, made)
    claims = []
    if (case.optimizer, case.loss) == ("sgd", "mse"):
        claims.append(spread_of_best_rate(case, made, 0.01 if case.depth <= 3 else 1.0))
    lowest, highest, _ = case.gammas
    if lowest < 1:
        claims.append(edge_exponent(case, made, f"edge exponent, {lowest:.1g} ≤ γ ≤ 1", made.law.lazy, 0.2))
    if highest > 1:
        claims.append(edge_exponent(case, made, "edge exponent, γ ≥ 1", made.law.rich, 0.1))
    return claims


def spread_of_best_rate(case: Case, made: Portrait, lowest: float) -> Claim:
    """How far, in decades, the best c strays from its middle over γ ≥ ``lowest``: 0 if the law is exact."""
    points = [point for point in critical_rates(made.records, "best") if point.gamma >= lowest * (1 - 1e-6)]
    if not points:
        raise UsageError(f"{case.name}: no best rate lies inside the rates; widen the grid")
    gammas, seeds = sorted({p.gamma for p in points}), list(case.seed_numbers)
    logs = np.full((len(gammas), len(seeds)), math.nan)  # NaN: the best rate is not inside the grid
    for p in points:
        logs[gammas.index(p.gamma), seeds.index(p.seed)] = math.log10(p.lr / made.law.factor(p.gamma))
    reach = max(p.reach for p in points) / math.log(10)
    stray, low, high = off_the_law(logs, reach)
    what = f"best rate off the law, decades, γ ≥ {lowest:g} ({len(gammas)} γ)"
    why = f"a best rate is known within {reach:.2f} decades, which widens its interval"
    return below(f"{what}; {case.name}", 0.25, stray, (low, high), why if stray < 0.25 else "")


def off_the_law(logs: NDArray[np.float64], reach: float) -> tuple[float, float, float]:
    """Half the range over γ of the means over seeds, and its 95 % interval from resampled seeds and moved cells.

    A range grows by errors of its ends, so those of resamples lie above it. The interval reaches as far down as up.

    Args:
        logs: (γ, seeds), in decades; NaN where there is none.
        reach: half of the step between rates, in decades.
    """
    stray = half_range(logs, np.ones((1, logs.shape[1])))[0]
    weights = resampled(logs.shape[1])
    moves = np.random.default_rng(1).uniform(-reach, reach, size=(len(weights), len(logs)))
    off = float(np.percentile(np.abs(half_range(logs, weights, moves) - stray), 95))
    return float(stray), max(0.0, float(stray) - off), float(stray) + off


def resampled(count: int, times: int = 2000) -> NDArray[np.float64]:
    """How often each of ``count`` things is drawn in each bootstrap resample, (times, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=times).astype(float)


def half_range(
    logs: NDArray[np.float64], weights: NDArray[np.float64], moves: NDArray[np.float64] | float = 0.0
) -> NDArray[np.float64]:
    """Half the range over γ of the weighted means over seeds, for each row of weights; NaNs don't count.

    Args:
        logs: (γ, seeds), in decades.
        weights: (resamples, seeds). A γ that has no point in a resample doesn't count in it.
        moves: (resamples, γ), added to the means, in decades.
    """
    known = np.isfinite(logs)
    total = weights @ known.T
    with np.errstate(invalid="ignore"):
        means = (weights @ np.where(known, logs, 0.0).T) / np.where(total > 0, total, math.nan) + moves
    halves: NDArray[np.float64] = (np.nanmax(means, axis=1) - np.nanmin(means, axis=1)) / 2
    return halves


def edge_exponent(case: Case, made: Portrait, what: str, predicted: float, tolerance: float) -> Claim:
    """Slope of the stable edge on one side of γ = 1."""
    rich = "γ ≥ 1" in what
    points = [p for p in critical_rates(made.records, "edge") if (p.gamma >= 0.999 if rich else p.gamma <= 1.001)]
    slopes = fit_slopes(points, bend=1.0)
    measured, interval = (slopes.rich, slopes.rich_interval) if rich else (slopes.lazy, slopes.lazy_interval)
    if measured is None or interval is None:
        raise UsageError(f"{case.name}: too few γ have their stable edge inside the rates; widen the grid")
    gammas = sorted({p.gamma for p in points})
    middles = [fmean(math.log10(p.lr) for p in points if p.gamma == gamma) for gamma in gammas]
    local = local_slopes(gammas, middles)
    return near(f"{what}; {case.name}", predicted, tolerance, measured, interval, why=local)


def lower_edge(case: Case, made: Portrait) -> list[Claim]:
    """How the smallest rate that trains moves with γ (γ ≥ 1, at the longest budget) and with the budget."""
    edges = {budget: made.trained_edge(budget) for budget in case.budgets}
    longest = edges[max(case.budgets)]
    rates = sorted(made.grid.rates)
    reach = math.log(rates[1] / rates[0]) / 2
    in_gamma = common_slope([[(math.log(gamma), math.log(eta)) for gamma, eta in longest.items()]], reach)
    lines = [
        [(math.log(budget), math.log(edges[budget][gamma])) for budget in case.budgets if gamma in edges[budget]]
        for gamma in longest
    ]
    in_budget = common_slope([line for line in lines if len(line) > 1], reach)
    single = [slope([x for x, _ in line], [y for _, y in line])[0] for line in lines if len(line) > 1]
    slopes = ", ".join(f"{one:.2f}" for one in single) + f", from {min(single):.2f} to {max(single):.2f}"
    trained = [budget for budget in case.budgets if edges[budget]]
    return [
        near(
            f"lower edge in γ ({len(longest)} γ); {case.name}",
            1.0,
            0.2,
            in_gamma[0],
            in_gamma[1:],
            local_slopes(list(longest), [math.log10(eta) for eta in longest.values()]),
        ),
        near(
            f"lower edge in the budget ({' and '.join(map(str, trained))} steps); {case.name}",
            -1.0,
            0.2,
            in_budget[0],
            in_budget[1:],
            f"at single γ {slopes}",
        ),
    ]


def common_slope(lines: Sequence[Sequence[tuple[float, float]]], reach: float = 0.0) -> tuple[float, float, float]:
    """Least-squares slope that lines of (x, y) with heights of their own have in common, and its 95 % t interval.

    ``y`` is known within ± ``reach``, so the points' variance is taken to be that of a uniform error, reach²/3, where
    they scatter less.

    Raises:
        UsageError: if there are too few points to tell the slope's error.
    """
    count = sum(map(len, lines))
    free = count - len(lines) - 1
    if free < 1:
        raise UsageError(f"{count} points of the lower edge are too few for its slope; widen the grid")
    x, y = (np.concatenate([[p[i] - np.mean([q[i] for q in line]) for p in line] for line in lines]) for i in (0, 1))
    found = float(x @ y / (x @ x))
    variance = max(float(((y - found * x) ** 2).sum()) / free, reach**2 / 3)
    half = float(t.ppf(0.975, free)) * math.sqrt(variance / float(x @ x))
    return found, found - half, found + half


if __name__ == "__main__":
    main()
