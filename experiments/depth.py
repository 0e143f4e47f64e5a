"""The exponent of the best rate against depth and optimizer: predicted 2/L for SGD and 1/L for Adam, γ ≥ 1.

    python experiments/depth.py --preset cpu

Augmented digits, MSE, MLP of width 64 in mean-field form, one pass. For each γ the best rate is the vertex of a
parabola through log held-out loss on a grid of rates around the law's; the exponent is the slope of log η* in log γ.
Writes results/depth/PRESET.json and .png beside this file and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from _sweep import best_rates, even, parser, slope, write
from matplotlib.figure import Figure

from gammaopt import EtaLaw
from gammaopt.online import MLP, Digits, Recipe

TOLERANCE = 0.1


@dataclass(frozen=True)
class Preset:
    """How much to run; rates in decades of c = η/s(γ)."""

    cases: tuple[tuple[str, int], ...] = (("sgd", 2), ("sgd", 3), ("sgd", 5), ("adam", 2), ("adam", 3), ("adam", 5))
    gammas: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    sgd_rates: tuple[float, float, int] = (0.4, 2.0, 9)
    adam_rates: tuple[float, float, int] = (-1.2, 0.4, 9)
    seeds: int = 2
    steps: int = 300
    cores: int | None = None


PRESETS = {
    "smoke": Preset(cases=(("sgd", 2),), gammas=(1.0, 30.0), sgd_rates=(0.2, 2.0, 4), seeds=1, steps=60, cores=1),
    "cpu": Preset(),
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, "depth", PRESETS).parse_args(arguments)
    preset = PRESETS[options.preset]
    rows = [measure(preset, optimizer, depth) for optimizer, depth in preset.cases]
    path = write(options.results, options.preset, {"rows": rows})
    picture(rows).savefig(path.with_suffix(".png"), dpi=110)
    print("| optimizer | L | predicted | measured | standard error | holds |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['optimizer']} | {row['depth']} | {row['predicted']:.3f} | {row['measured']:.3f} "
            f"| {row['error']:.3f} | {'yes' if row['holds'] else 'no'} |"
        )


def measure(preset: Preset, optimizer: str, depth: int) -> dict[str, object]:
    """Best rates over γ and their slope, for one optimizer and depth."""
    grid = even(*(preset.sgd_rates if optimizer == "sgd" else preset.adam_rates))
    build = partial(MLP, 144, 10, width=64, depth=depth)
    recipe = Recipe(build, Digits(), "mse", optimizer, preset.steps, depth=float(depth))  # type: ignore[arg-type]
    logs = best_rates(recipe, preset.gammas, grid, preset.seeds, preset.cores)
    law = EtaLaw(depth, optimizer)  # type: ignore[arg-type]
    best = [c + math.log10(law.factor(gamma)) for c, gamma in zip(logs, preset.gammas, strict=True)]
    measured, error = slope([math.log10(gamma) for gamma in preset.gammas], best)
    return {
        "optimizer": optimizer,
        "depth": depth,
        "gammas": list(preset.gammas),
        "log10_c": [round(c, 3) for c in logs],
        "predicted": law.rich,
        "measured": round(measured, 4),
        "error": round(error, 4),
        "holds": abs(measured - law.rich) <= TOLERANCE,
    }


def picture(rows: list[dict[str, object]]) -> Figure:
    """log₁₀ c of the best rate against γ: a level line is a perfect law."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        dash = "-" if row["optimizer"] == "sgd" else "--"
        label = f"{row['optimizer']}, L = {row['depth']}: {row['measured']:.2f} ({row['predicted']:.2f} predicted)"
        axes.plot(row["gammas"], row["log10_c"], dash, marker="o", label=label)  # type: ignore[arg-type]
    axes.set_xscale("log")
    axes.set_xlabel("feature-learning strength γ")
    axes.set_ylabel("log₁₀ of best η / s(γ)")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
