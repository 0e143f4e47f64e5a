"""The exponent of the best rate against depth and optimizer: predicted 2/L for SGD and 1/L for Adam, γ ≥ 1.

    python experiments/depth.py --preset cpu

Augmented digits, MSE, MLP of width 64 in mean-field form, one pass, float64. For each γ and seed the best rate is the
vertex of a parabola through log held-out loss on a grid of rates around the law's; the exponent is the slope of log η*
in log γ, the mean over seeds with Student's 95 % interval. An exponent within its bar may be within that of the next
depth too, so two claims are about all depths together: the exponents fall in order, and the one number a of a/L that
fits them best is 2 or 1, within a tenth. Cells are kept in --work, so a killed run goes on.
Writes results/depth/PRESET.json and .png beside this file and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _experiment import Claim, Found, Place, above, near, number, run, t_interval
from _intervals import seeds_slope
from _sweep import local_slopes, slope
from matplotlib.figure import Figure

from gammaopt import EtaLaw
from gammaopt._errors import UsageError
from gammaopt._fit import FEWEST, Point, critical_rates
from gammaopt.diagnostics import Grid, portrait
from gammaopt.online import MLP, Recipe

TOLERANCE = 0.1
POWERS = {"sgd": 2.0, "adam": 1.0}  # a in the exponent a/L
COMMON_TOLERANCE = 0.1  # of a, over a
LATE = 30.0  # γ from which on the slope is told too


@dataclass(frozen=True)
class Preset:
    """How much to run; γ, and rates c in η = c·s(γ), as (lowest, highest, how many)."""

    cases: tuple[tuple[str, int], ...] = (
        *(("sgd", depth) for depth in (2, 3, 4, 5, 6)),
        *(("adam", depth) for depth in (2, 3, 4, 5, 6)),
    )
    gammas: tuple[float, float, int] = (1.0, 1000.0, 7)
    sgd_rates: tuple[float, float, int] = (1.0, 100.0, 13)
    adam_rates: tuple[float, float, int] = (0.03, 3.0, 13)
    seeds: int = 3
    steps: int = 300
    width: int = 64


PRESETS = {
    "smoke": Preset(
        cases=(("sgd", 2),), gammas=(1.0, 100.0, 3), sgd_rates=(1.6, 100.0, 5), seeds=1, steps=60, width=32
    ),
    "cpu": Preset(),
    "gpu": Preset(
        gammas=(1.0, 3000.0, 8), sgd_rates=(1.0, 100.0, 25), adam_rates=(0.03, 3.0, 25), seeds=8, steps=1000, width=256
    ),
    "paper": Preset(seeds=2, steps=3000, width=1024),
}


def measure(preset: Preset, place: Place) -> Found:
    """All cases."""
    rows = [row(preset, place, optimizer, depth) for optimizer, depth in preset.cases]
    claims = claims_of(rows)
    return Found(claims, meaning(claims), picture(rows), {"rows": rows})


def claims_of(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """Each exponent, and for each optimizer those of all depths together."""
    claims = [
        near(
            f"{row['optimizer']}, L = {row['depth']}", row["predicted"], TOLERANCE, row["measured"], row["interval"],
            reason(row),
        )
        for row in rows
    ]  # fmt: skip
    for optimizer in dict.fromkeys(row["optimizer"] for row in rows):
        own = sorted((row for row in rows if row["optimizer"] == optimizer), key=lambda row: int(row["depth"]))
        if len(own) > 1:
            claims += [falls(optimizer, own), common(optimizer, own)]
    return claims


def reason(row: dict[str, Any]) -> str:
    """What else was measured of a case: the slopes between neighbouring γ, and that of the large ones."""
    late = "" if row["late"] is None else f"; {row['late']:.2f} from γ = {LATE:g} on"
    return local_slopes(row["gammas"], row["log10_best"]) + late


def falls(optimizer: str, rows: Sequence[dict[str, Any]]) -> Claim:
    """Whether each depth's exponent is below that of the one before."""
    drops = [before["measured"] - after["measured"] for before, after in pairwise(rows)]
    what = f"{optimizer}, smallest fall of the exponent from a depth to the next"
    return above(
        what, 0.0, min(drops), why="from depth to depth " + ", ".join(f"{row['measured']:.3f}" for row in rows)
    )


def common(optimizer: str, rows: Sequence[dict[str, Any]]) -> Claim:
    """The number a whose a/L fits the exponents best, by least squares for each seed; its interval is over seeds."""
    inverse = [1 / row["depth"] for row in rows]
    per_seed = [
        sum(own * one for own, one in zip(slopes, inverse, strict=True)) / sum(one**2 for one in inverse)
        for slopes in zip(*(row["slopes"] for row in rows), strict=True)
    ]
    what, power = f"{optimizer}, common a of the exponents a/L", POWERS[optimizer]
    why = "exponent × L from depth to depth " + ", ".join(f"{row['measured'] * row['depth']:.2f}" for row in rows)
    return near(what, power, COMMON_TOLERANCE * power, fmean(per_seed), t_interval(per_seed), why)


def meaning(claims: Sequence[Claim]) -> str:
    """One sentence on how many claims hold and which do not."""
    held, missed = sum(claim.holds for claim in claims), [claim for claim in claims if not claim.holds]
    told = "; ".join(f"{one.what} is {number(one.measured, '.2f')} instead of {one.predicted}" for one in missed)
    return (
        f"The best rate's power of γ is that which the depth sets, 2/L under SGD and 1/L under Adam, in {held} of "
        f"{len(claims)} numbers{', but ' * bool(missed)}{told}."
    )


def row(preset: Preset, place: Place, optimizer: str, depth: int) -> dict[str, Any]:
    """Best rates over γ and their slope, for one optimizer and depth."""
    stream = place.stream
    build = partial(MLP, math.prod(stream.shape), stream.classes, width=preset.width, depth=depth)
    recipe = Recipe(
        build, stream, "mse", optimizer, preset.steps,  # type: ignore[arg-type]
        depth=float(depth), device=place.device, dtype=torch.float64,
    )  # fmt: skip
    grid = Grid.log(preset.gammas, preset.sgd_rates if optimizer == "sgd" else preset.adam_rates, preset.seeds)
    made = portrait(recipe, grid, place.work / f"{optimizer}-L{depth}")
    points = critical_rates(made.records, "best")
    lines = [line_of([point for point in points if point.seed == seed]) for seed in range(preset.seeds)]
    if min(len(set(x)) for x, _ in lines) < min(FEWEST, len(grid.gammas)):
        raise UsageError(f"{optimizer}, L = {depth}: too few best rates of a seed lie inside the grid; widen its rates")
    measured, interval = seeds_slope(lines)
    law = EtaLaw(depth, optimizer)  # type: ignore[arg-type]
    late = line_of([point for point in points if point.gamma >= LATE])
    of = {gamma: [math.log10(p.lr) for p in points if p.gamma == gamma] for gamma in grid.gammas}
    means = {gamma: fmean(logs) for gamma, logs in of.items() if logs}
    return {
        "optimizer": optimizer,
        "depth": depth,
        "gammas": list(means),
        "log10_best": [round(log, 3) for log in means.values()],
        "log10_c": [round(log - math.log10(law.factor(gamma)), 3) for gamma, log in means.items()],
        "predicted": law.rich,
        "measured": round(measured, 4),
        "interval": interval and tuple(round(end, 4) for end in interval),
        "slopes": [round(slope(*line)[0], 4) for line in lines],
        "late": round(slope(*late)[0], 4) if len(set(late[0])) > 1 else None,
        "outside": len(grid.gammas) * preset.seeds - len(points),
    }


def line_of(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    """log₁₀ γ and log₁₀ η of points."""
    return [math.log10(point.gamma) for point in points], [math.log10(point.lr) for point in points]


def picture(rows: list[dict[str, Any]]) -> Figure:
    """log₁₀ c of the best rate against γ, a panel for each optimizer: a level line is a perfect law."""
    optimizers = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure = Figure(figsize=(5.4 * len(optimizers), 4.6), layout="constrained")
    for axes, optimizer in zip(figure.subplots(1, len(optimizers), squeeze=False)[0], optimizers, strict=True):
        for row in (row for row in rows if row["optimizer"] == optimizer):
            label = f"L = {row['depth']}: {row['measured']:.2f} ({row['predicted']:.2f} predicted)"
            axes.plot(row["gammas"], row["log10_c"], marker="o", label=label)
        axes.set_xscale("log")
        axes.set_xlabel("feature-learning strength γ")
        axes.set_ylabel("log₁₀ of best η / s(γ)")
        axes.set_title(optimizer, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("depth", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
