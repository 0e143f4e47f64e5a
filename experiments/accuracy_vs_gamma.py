"""Online accuracy against γ at several budgets: where it is best, and how that moves with the budget.

    python experiments/accuracy_vs_gamma.py --preset cpu

MLPs of width 64 in mean-field form learn augmented digits in one pass, SGD, float64. At each γ and budget the rate c in
η = c·s(γ) is chosen by mean prequential accuracy on tuning seeds, and all numbers shown come from fresh ones. Accuracy
is prequential (each batch is scored before the step that trains on it) and, at the end, of held-out samples. The best
γ is chosen on tuning seeds too, so its gain over γ = 1, paired over the fresh seeds, is no winner's luck; its interval
is Student's t. How far the best γ moves between the shortest and longest budget has an interval from resampled seeds.
This is a sweep at equal steps, 9 rates at each γ; tuned_vs_one.py compares at an equal budget of trials.
Writes results/accuracy_vs_gamma/PRESET.json and .png and prints predicted | measured | interval | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _experiment import Claim, Found, Place, above, run
from _sweep import steps_done
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gammaopt.diagnostics import Grid, portrait
from gammaopt.online import MLP, Recipe, RunRecord
from gammaopt.tuning import Confirmation, paired_t

Array = NDArray[np.float64]
METRICS = {"prequential_accuracy": "prequential accuracy", "final_accuracy": "accuracy at the end"}
FRESH = 1000  # the first fresh seed
RESAMPLES = 2000
BATCH_SIZE = 32


@dataclass(frozen=True)
class Preset:
    """How much to run; γ and c in η = c·s(γ) as (lowest, highest, how many)."""

    losses: tuple[str, ...] = ("cross_entropy", "mse")
    gammas: tuple[float, float, int] = (0.01, 1000.0, 11)
    rates: tuple[tuple[float, float, int], ...] = ((0.1, 30.0, 9), (1.0, 100.0, 9))  # of each loss
    budgets: tuple[int, ...] = (100, 300, 1000)
    seeds: int = 3
    fresh: int = 10
    width: int = 64


PRESETS = {
    "smoke": Preset(
        losses=("cross_entropy",), gammas=(0.1, 10.0, 3), rates=((0.5, 8.0, 3),), budgets=(20, 60), seeds=1, fresh=2,
        width=16,
    ),
    "cpu": Preset(),
    "gpu": Preset(
        budgets=(300, 1000, 3000, 10_000), seeds=8, fresh=32, width=256, rates=((0.05, 60.0, 17), (0.5, 200.0, 17))
    ),
    "paper": Preset(budgets=(1000, 10_000, 40_000), seeds=2, fresh=10, width=1024),
}  # fmt: skip


class Sweep(NamedTuple):
    """One loss: γ, budgets, the chosen rates (γ, budget), and accuracies of fresh and of tuning seeds there.

    ``fresh[metric]`` is (γ, budget, seed); ``tuning`` (γ, budget, seed) is prequential.
    """

    loss: str
    gammas: Array
    budgets: tuple[int, ...]
    rates: Array
    fresh: dict[str, Array]
    tuning: Array
    at_edge: int


def sweep(preset: Preset, place: Place, loss: str, rates: tuple[float, float, int]) -> Sweep:
    """Choose a rate for each γ and budget, and train it on fresh seeds."""
    stream = place.stream
    budgets = tuple(sorted({place.steps(budget, BATCH_SIZE) for budget in preset.budgets}))
    build = partial(MLP, math.prod(stream.shape), stream.classes, width=preset.width, depth=3)
    recipe = Recipe(
        build, stream, loss, "sgd", max(budgets), BATCH_SIZE, depth=3.0, device=place.device, dtype=torch.float64,  # type: ignore[arg-type]
    )  # fmt: skip
    grid = Grid.log(preset.gammas, rates, preset.seeds)
    folder = place.work / loss
    tuned = portrait(recipe, grid, folder, budgets=budgets, on_progress=steps_done(f"{loss}, tuning"))
    scores = np.stack([tuned.arrays(budget)["prequential_accuracy"] for budget in budgets], axis=1)
    best = scores.mean(-1).argmax(-1)  # (γ, budget)
    tuning = np.take_along_axis(scores, best[..., None, None], axis=2)[:, :, 0]
    fresh = {metric: np.zeros((*best.shape, preset.fresh)) for metric in METRICS}
    for i, gamma in enumerate(grid.gammas):
        chosen = tuple(sorted({grid.rates[j] for j in best[i]}))
        seeds = tuple(range(FRESH, FRESH + preset.fresh))
        made = portrait(
            recipe, Grid((gamma,), chosen, seeds), folder,
            budgets=budgets, on_progress=steps_done(f"{loss}, γ = {gamma:.2g}"),
        )  # fmt: skip
        of = {(record.lr, record.steps, record.seed): record for record in made.records}
        for k, budget in enumerate(budgets):
            for s, seed in enumerate(seeds):
                record: RunRecord = of[grid.rates[best[i, k]], budget, seed]
                for metric in METRICS:
                    fresh[metric][i, k, s] = getattr(record, metric)
    last = len(grid.rates) - 1
    return Sweep(
        loss, np.array(grid.gammas), budgets, np.array(grid.rates)[best], fresh, tuning,
        int(((best == 0) | (best == last)).sum()),
    )  # fmt: skip


def best_gamma(gammas: Array, scores: Array) -> float:
    """log₁₀ of the best γ: the vertex of a parabola through the best and its neighbours, as far as they."""
    at = int(scores.argmax())
    logs = np.log10(gammas)
    if at in (0, len(scores) - 1):
        return float(logs[at])
    left, middle, right = scores[at - 1 : at + 2]
    shift = 0.5 * (left - right) / (left + right - 2 * middle) if left + right < 2 * middle else 0.0
    return float(logs[at] + shift * (logs[1] - logs[0]))


def gain_of(found: Sweep, metric: str, k: int) -> tuple[float, Confirmation]:
    """The γ with the best prequential accuracy on tuning seeds, and its gain over γ = 1 on fresh ones, in points."""
    one = int(np.abs(np.log(found.gammas)).argmin())
    at = int(found.tuning[:, k].mean(-1).argmax())
    runs = 100 * found.fresh[metric][:, k]
    return float(found.gammas[at]), paired_t(metric, list(range(runs.shape[-1])), list(runs[at]), list(runs[one]))


def table(sweeps: Sequence[Sweep]) -> str:
    """Markdown: the chosen γ of each loss and budget, and its gain in both accuracies."""
    rows = ["| loss | steps | γ̂ | prequential gain (95 %) | gain at the end (95 %) |", "|---" * 5 + "|"]
    for found in sweeps:
        for k, budget in enumerate(found.budgets):
            told = []
            for metric in METRICS:
                gamma, gain = gain_of(found, metric, k)
                low, high = gain.ci95
                told.append(f"{gain.mean_difference:+.2f} ({low:+.2f} … {high:+.2f})")
            rows.append(f"| {found.loss.replace('_', '-')} | {budget} | {gamma:.2g} | {told[0]} | {told[1]} |")
    return "\n".join(rows)


def claims_of(found: Sweep) -> list[Claim]:
    """What the best γ gains over γ = 1 at each budget, and how it moves with the budget."""
    loss = found.loss.replace("_", "-")
    claims = []
    for k, budget in enumerate(found.budgets):
        gamma, gain = gain_of(found, "prequential_accuracy", k)
        what = f"points gained by γ = {gamma:.2g} over γ = 1, {loss}, {budget} steps"
        claims.append(above(what, 0.0, gain.mean_difference, gain.ci95, "γ = 1 was chosen" if gamma == 1 else ""))
    runs = found.fresh["prequential_accuracy"]
    draws = np.random.default_rng(0).integers(runs.shape[-1], size=(RESAMPLES, runs.shape[-1]))
    moved = [
        best_gamma(found.gammas, runs[:, -1, draw].mean(-1)) - best_gamma(found.gammas, runs[:, 0, draw].mean(-1))
        for draw in draws
    ]
    measured = best_gamma(found.gammas, runs[:, -1].mean(-1)) - best_gamma(found.gammas, runs[:, 0].mean(-1))
    low, high = np.percentile(moved, [2.5, 97.5])
    claims.append(
        above(
            f"decades that the best γ moves over {found.budgets[0]} to {found.budgets[-1]} steps, {loss}", 0.0,
            measured, (float(low), float(high)),
        )
    )  # fmt: skip
    return claims


def measure(preset: Preset, place: Place) -> Found:
    """Both losses."""
    sweeps = [sweep(preset, place, loss, rates) for loss, rates in zip(preset.losses, preset.rates, strict=True)]
    claims = [claim for found in sweeps for claim in claims_of(found)]
    told = []
    for found in sweeps:
        runs = found.fresh["prequential_accuracy"].mean(-1)
        best = [10 ** best_gamma(found.gammas, runs[:, k]) for k in range(len(found.budgets))]
        told.append(f"{' → '.join(f'{gamma:.2g}' for gamma in best)} under {found.loss.replace('_', '-')}")
    budgets = ", ".join(map(str, sweeps[0].budgets))  # a data set may have had too few samples for those asked for
    meaning = f"The best γ over {budgets} steps is {', '.join(told)}."
    data = {
        found.loss: {
            "gammas": found.gammas.tolist(), "budgets": list(found.budgets), "rates": found.rates.tolist(),
            "choices_at_the_end_of_the_rates": found.at_edge,
            **{metric: np.round(runs.mean(-1), 5).tolist() for metric, runs in found.fresh.items()},
        }
        for found in sweeps
    }  # fmt: skip
    return Found(claims, meaning, picture(sweeps), {"sweeps": data}, table(sweeps))


def picture(sweeps: Sequence[Sweep]) -> Figure:
    """Accuracy against γ, a line for each budget: a row for each loss, a column for each metric."""
    figure = Figure(figsize=(10, 3.6 * len(sweeps)), layout="constrained")
    grid: list[list[Axes]] = figure.subplots(len(sweeps), 2, squeeze=False).tolist()
    for row, found in zip(grid, sweeps, strict=True):
        for axes, (metric, told) in zip(row, METRICS.items(), strict=True):
            for k, budget in enumerate(found.budgets):
                runs = 100 * found.fresh[metric][:, k]
                error = 1.96 * runs.std(-1, ddof=1) / math.sqrt(runs.shape[-1])
                (line,) = axes.plot(found.gammas, runs.mean(-1), "o-", markersize=3, label=f"{budget} steps")
                axes.fill_between(
                    found.gammas, runs.mean(-1) - error, runs.mean(-1) + error, alpha=0.2, color=line.get_color()
                )
            axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.set_xlabel("feature-learning strength γ")
            axes.set_ylabel(f"{told}, %")
            axes.set_title(found.loss.replace("_", "-"), fontsize=10)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("accuracy_vs_gamma", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
