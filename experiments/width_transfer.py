"""Width transfer: how far the best learning rate moves with width in mean-field form, with base= and in plain form.

    python experiments/width_transfer.py --preset cpu

Augmented digits, MSE, 3-layer MLP, one pass. The best rate of each width is the vertex of a parabola through log
held-out loss on a grid of an eighth of a decade around it, looked for from the smallest width's. Predicted: the largest
over the smallest is at most 2 in mean-field form and with base= (a network of width 64), and more than 2 in plain form,
the contrast. Of noisy numbers that ratio is above 1 where nothing moves, which is why it has no interval; the slope of
log best rate in log width beside it is not biased, and has Student's over the widths. It is predicted to change the
rate by less than a factor of 2 over the widths, in plain form to lower it by more. Base and plain start from torch's
own initialisation, and under SGD from N(0, 1/fan_in) too, three times the variance.
Writes results/width_transfer/PRESET.json and .png beside this file and prints predicted | measured | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _experiment import Claim, Found, Place, below, near, run
from _intervals import slope_interval
from _sweep import Job, best_rate, even, local_slopes, mean_score, run_all
from matplotlib.figure import Figure
from torch import nn

from gammaopt._errors import UsageError
from gammaopt.online import MLP, Recipe

BASE_WIDTH = 64
SPREAD = 2.0  # largest over smallest best rate
STEP = 0.25  # decades between two rates
MOST = 12  # steps outside the first grid
TICKS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Case(NamedTuple):
    """A form of the network and an optimizer; the rates tried first at the smallest width, in decades."""

    form: str  # "mean field", "base" or "plain"
    start: str  # "torch", its own initialisation, or "normal", N(0, 1/fan_in)
    optimizer: str
    gamma: float
    low: float
    high: float


Cell = tuple[Case, int, float]  # case, width, log₁₀ rate
Grids = dict[tuple[Case, int], list[float]]  # log₁₀ rates, ascending


@dataclass(frozen=True)
class Preset:
    """How much to run."""

    cases: tuple[Case, ...] = (
        Case("mean field", "normal", "sgd", 0.1, 0.25, 1.75),
        Case("mean field", "normal", "sgd", 1.0, 0.25, 1.75),
        Case("mean field", "normal", "sgd", 30.0, 0.25, 1.75),
        Case("mean field", "normal", "adam", 0.1, -1.25, 0.25),
        Case("mean field", "normal", "adam", 1.0, -1.25, 0.25),
        Case("mean field", "normal", "adam", 30.0, -1.25, 0.25),
        Case("base", "torch", "sgd", 1.0, -0.5, 1.0),
        Case("base", "torch", "adam", 1.0, -3.25, -1.75),
        Case("base", "normal", "sgd", 1.0, -1.25, 0.5),
        Case("plain", "torch", "sgd", 1.0, -0.75, 0.75),
        Case("plain", "torch", "adam", 1.0, -4.25, -1.75),
        Case("plain", "normal", "sgd", 1.0, -2.25, 0.0),
    )
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    widest: tuple[int, ...] = (2048,)  # of mean-field form under SGD too: a run takes 20 times as long as at 64
    seeds: int = 2
    steps: int = 160


PRESETS = {
    "smoke": Preset(
        cases=(Case("mean field", "normal", "sgd", 1.0, 0.5, 1.5), Case("base", "torch", "sgd", 1.0, -0.5, 0.5)),
        widths=(16, 24, 32),
        widest=(),
        seeds=1,
        steps=30,
    ),
    "cpu": Preset(),
    "gpu": Preset(widths=(64, 128, 256, 512, 1024, 2048), widest=(), seeds=4, steps=500),
    "paper": Preset(widths=(64, 128, 256, 512, 1024, 2048), widest=(), seeds=2, steps=3000),
}


def measure(preset: Preset, place: Place) -> Found:
    """One row for each case."""
    rows = measure_rows(preset, place)
    ratios, slopes = [ratio(row, rows) for row in rows], [moved(row, rows) for row in rows]
    return Found([*ratios, *slopes], meaning(rows, ratios), picture(rows), {"rows": rows})


def ratio(row: dict[str, Any], rows: list[dict[str, Any]]) -> Claim:
    """Largest over smallest best rate."""
    transfers, measured = row["form"] != "plain", row["measured"]
    holds = (measured <= SPREAD) == transfers
    predicted = f"{'≤' if transfers else '>'} {SPREAD:g}"
    what = f"largest over smallest best rate, {told(row)}"
    return Claim(what, predicted, measured, None, holds, "" if holds else reason(row, rows))


def moved(row: dict[str, Any], rows: list[dict[str, Any]]) -> Claim:
    """Slope of log best rate in log width, and its interval."""
    bound = round(math.log(SPREAD) / math.log(max(row["widths"]) / min(row["widths"])), 3)
    measured, interval = slope_interval([math.log10(width) for width in row["widths"]], row["log10_best"])
    what, why = f"slope of log best rate in log width, {told(row)}", reason(row, rows)
    if row["form"] == "plain":
        return below(what, -bound, measured, interval, why)
    return near(what, 0.0, bound, measured, interval, why)


def reason(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """What else was measured of the case: slopes and losses over widths, and how far the other form's rate moves.

    A loss that falls with width says that the narrow networks are far from their limit: a lazy one of N units has the
    noise of so many random features. The other form is the plain one for base= and the reverse, with the same start,
    optimizer and γ.
    """
    known = [local_slopes(row["widths"], row["log10_best"], "N")]
    known.append("lowest loss " + ", ".join(f"{loss:.3f}" for loss in row["loss"]))
    other = {"base": "plain", "plain": "base"}.get(row["form"])
    alike = "start", "optimizer", "gamma"
    twins = [one for one in rows if one["form"] == other and all(one[key] == row[key] for key in alike)]
    return "; ".join([*known, *(f"{name(twin)}: × {twin['measured']:.2f}" for twin in twins)])


def told(row: dict[str, Any]) -> str:
    """A case in words."""
    return f"{name(row)}, {row['optimizer']}, γ = {row['gamma']:g}, widths to {max(row['widths'])}"


def meaning(rows: list[dict[str, Any]], ratios: Sequence[Claim]) -> str:
    """One sentence on how many cases of each form are as predicted, and how far their rates move."""
    parts = []
    for form in dict.fromkeys(row["form"] for row in rows):
        own = [claim for row, claim in zip(rows, ratios, strict=True) if row["form"] == form]
        held, most = sum(claim.holds for claim in own), max(row["measured"] for row in rows if row["form"] == form)
        words = "more than" if form == "plain" else "at most"
        parts.append(f"{form} by {words} {SPREAD:g} × in {held} of {len(own)} cases ({most:.1f} × at most)")
    low, high = min(min(row["widths"]) for row in rows), max(max(row["widths"]) for row in rows)
    return f"From width {low} to {high} the best rate moves: {', '.join(parts)}."


def measure_rows(preset: Preset, place: Place) -> list[dict[str, Any]]:
    """Best rates over widths and their spread, one row for each case."""
    widths = {case: widths_of(preset, case) for case in preset.cases}
    scores: dict[Cell, float] = {}
    grids: Grids = {}
    for case in preset.cases:
        grids[case, widths[case][0]] = even(case.low, case.high, round((case.high - case.low) / STEP) + 1)
    look(preset, place, grids, scores)
    for case in preset.cases:
        first = lowest((case, widths[case][0]), grids, scores)
        grids |= {(case, width): [first - STEP, first, first + STEP] for width in widths[case][1:]}
    look(preset, place, grids, scores)
    # Once more around each lowest score, at half the distance.
    for net, grid in grids.items():
        best = lowest(net, grids, scores)
        grids[net] = sorted({*grid, best - STEP / 2, best + STEP / 2})
    train(preset, place, grids, scores)
    rows = []
    for case in preset.cases:
        best_rates = [
            best_rate(grids[case, width], [scores[case, width, rate] for rate in grids[case, width]])
            for width in widths[case]
        ]
        rows.append(
            {
                "form": case.form,
                "start": case.start,
                "optimizer": case.optimizer,
                "gamma": case.gamma,
                "widths": widths[case],
                "log10_best": [round(rate, 3) for rate in best_rates],
                "loss": [
                    math.exp(min(scores[case, width, rate] for rate in grids[case, width])) for width in widths[case]
                ],
                "measured": round(10 ** (max(best_rates) - min(best_rates)), 3),
            }
        )
    return rows


def widths_of(preset: Preset, case: Case) -> list[int]:
    """Of a case, the smallest first."""
    wide = case.form == "mean field" and case.optimizer == "sgd"
    return sorted([*preset.widths, *(preset.widest if wide else ())])


def lowest(net: tuple[Case, int], grids: Grids, scores: dict[Cell, float]) -> float:
    """The rate with the lowest score; of several that diverged the smallest."""
    return min(grids[net], key=lambda rate: scores[(*net, rate)])


def look(preset: Preset, place: Place, grids: Grids, scores: dict[Cell, float]) -> None:
    """Train on the grids, and extend each one until its lowest score is not at its end.

    Raises:
        UsageError: if a grid has been extended ``MOST`` times, and still is too short.
    """
    for _ in range(MOST):
        train(preset, place, grids, scores)
        short = False
        for net, grid in grids.items():
            best = lowest(net, grids, scores)
            if best in (grid[0], grid[-1]):
                short, further = True, best + (STEP if best == grid[-1] else -STEP)
                grids[net] = sorted([*grid, further])
        if not short:
            return
    raise UsageError(f"a best rate lies further than {MOST * STEP:g} decades outside its grid; move its case's")


def train(preset: Preset, place: Place, grids: Grids, scores: dict[Cell, float]) -> None:
    """Train each cell that has no score yet on all seeds and add its mean score to ``scores``."""
    # The longest runs first, so that no core waits for them.
    nets = sorted(grids, key=lambda net: -net[1])
    cells = [(*net, rate) for net in nets for rate in grids[net] if (*net, rate) not in scores]

    def key(cell: Cell, seed: int) -> str:
        return f"{tuple(cell[0])} {cell[1]} {cell[2]:.4f} {seed}"

    jobs = {
        key(cell, seed): Job(recipe(preset, place, cell[0], cell[1]), cell[0].gamma, 10 ** cell[2], seed)
        for cell in cells
        for seed in range(preset.seeds)
    }
    records = run_all(jobs, place.file("runs.jsonl", preset), place.cores)
    for cell in cells:
        scores[cell] = mean_score(records[key(cell, seed)] for seed in range(preset.seeds))


def recipe(preset: Preset, place: Place, case: Case, width: int) -> Recipe:
    stream = place.stream
    return Recipe(
        partial(network, stream.shape, stream.classes, case.start, width),
        stream,
        "mse",
        case.optimizer,  # type: ignore[arg-type]
        preset.steps,
        parametrization="mean_field" if case.form == "mean field" else "as_is",
        depth=3.0,
        device=place.device,
        base=partial(network, stream.shape, stream.classes, case.start, BASE_WIDTH) if case.form == "base" else None,
    )


def network(shape: tuple[int, ...], classes: int, start: str, width: int) -> MLP:
    net = MLP(math.prod(shape), classes, width=width, depth=3)
    if start == "normal":
        for parameter in net.parameters():
            nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    return net


def name(row: dict[str, Any]) -> str:
    normal = row["form"] != "mean field" and row["start"] == "normal"
    return f"{row['form']}{', N(0, 1/fan_in)' if normal else ''}"


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Best rate against width, over its value at the smallest one: a level line transfers."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, optimizer in zip(panels, ("sgd", "adam"), strict=True):
        for row in (row for row in rows if row["optimizer"] == optimizer):
            label = f"{name(row)}, γ = {row['gamma']:g}: × {row['measured']:.2f}"
            relative = [10 ** (rate - row["log10_best"][0]) for rate in row["log10_best"]]
            axes.plot(row["widths"], relative, "--" if row["form"] == "plain" else "-", marker="o", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        widths = sorted({width for row in rows for width in row["widths"]})
        axes.set_xticks(widths, [str(width) for width in widths])
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.set_xlabel("width N")
        axes.set_title(optimizer, fontsize=10)
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0].set_ylabel("best rate / best rate at the smallest width")
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("width_transfer", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
