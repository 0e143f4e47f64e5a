"""The exponent of the best rate against depth and optimizer: predicted 2/L for SGD and 1/L for Adam, γ ≥ 1.

    python experiments/depth.py --preset cpu

Augmented digits, MSE, MLP of width 64 in mean-field form, one pass, float64. For each γ and seed the best rate is the
vertex of a parabola through log held-out loss on a grid of rates around the law's; the exponent is the slope of log η*
in log γ. Its 95 % interval comes from resampling the points, each moved at random within its grid's step. Cells are
kept in --work, so a killed run goes on.
Writes results/depth/PRESET.json and .png beside this file and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _experiment import Found, Place, near, run
from _sweep import slope
from matplotlib.figure import Figure

from gammaopt import EtaLaw
from gammaopt._fit import critical_rates, fit_slopes
from gammaopt.diagnostics import Grid, portrait
from gammaopt.online import MLP, Recipe

TOLERANCE = 0.1
BEND_ENDS = 30.0  # from where the power stands alone in a deep network too


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
    claims = [
        near(
            f"{row['optimizer']}, L = {row['depth']}", row["predicted"], TOLERANCE, row["measured"], row["interval"],
            f"the bend of a deep network is broad: {row['late']:.2f} from γ = {BEND_ENDS:g} on",
        )
        for row in rows
    ]  # fmt: skip
    worst = max(abs(row["measured"] - row["predicted"]) for row in rows)
    deepest = max(depth for _, depth in preset.cases)
    meaning = (
        f"The best rate follows the power of γ that the depth sets, 2/L under SGD and 1/L under Adam, from L = 2 to "
        f"{deepest}: the exponents are off by {worst:.2f} at most."
    )
    return Found(claims, meaning, picture(rows), {"rows": rows})


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
    slopes = fit_slopes(points, bend=1.0)
    if slopes.rich is None or slopes.rich_interval is None:
        raise ValueError(f"{optimizer}, L = {depth}: too few best rates lie inside the grid; widen it")
    law = EtaLaw(depth, optimizer)  # type: ignore[arg-type]
    late = [point for point in points if point.gamma > BEND_ENDS]
    of = {gamma: [math.log10(p.lr / law.factor(gamma)) for p in points if p.gamma == gamma] for gamma in grid.gammas}
    return {
        "optimizer": optimizer,
        "depth": depth,
        "gammas": [gamma for gamma, logs in of.items() if logs],
        "log10_c": [round(fmean(logs), 3) for logs in of.values() if logs],
        "predicted": law.rich,
        "measured": round(slopes.rich, 4),
        "interval": tuple(round(end, 4) for end in slopes.rich_interval),
        "late": round(slope([math.log(p.gamma) for p in late], [math.log(p.lr) for p in late])[0], 4),
        "outside": len(grid.gammas) * preset.seeds - len(points),
    }


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
