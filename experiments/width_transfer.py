"""Width transfer: one learning rate serves widths 64 to 1,024 in mean-field form and relative to a base network.

    python experiments/width_transfer.py --preset cpu

Augmented digits, MSE, 3-layer MLP, one pass. The best rate of each width is the vertex of a parabola through log
held-out loss on a grid of an eighth of a decade. Predicted: the largest over the smallest is at most 2 in mean-field
form and with base= (a network of width 64), and more than 2 in plain form, the contrast. Base and plain start from
torch's own initialisation, and under SGD from N(0, 1/fan_in) too, three times the variance.
Writes results/width_transfer/PRESET.json and .png beside this file and prints predicted | measured | holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _experiment import Claim, Found, Place, run
from _sweep import Job, best_rate, even, mean_score, run_all
from matplotlib.figure import Figure
from torch import nn

from gammaopt.online import MLP, Recipe

BASE_WIDTH = 64
SPREAD = 2.0  # largest over smallest best rate
STEP = 0.25  # decades between two rates
TICKS = (0.25, 0.5, 1.0, 2.0, 4.0)


class Case(NamedTuple):
    """A form of the network and an optimizer; rates in decades."""

    form: str  # "mean field", "base" or "plain"
    start: str  # "torch", its own initialisation, or "normal", N(0, 1/fan_in)
    optimizer: str
    gamma: float
    low: float
    high: float


Cell = tuple[Case, int, float]  # case, width, log₁₀ rate


@dataclass(frozen=True)
class Preset:
    """How much to run."""

    cases: tuple[Case, ...] = (
        Case("mean field", "normal", "sgd", 1.0, 0.25, 1.75),
        Case("mean field", "normal", "sgd", 30.0, 0.25, 1.75),
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
    seeds: int = 2
    steps: int = 160


PRESETS = {
    "smoke": Preset(
        cases=(Case("mean field", "normal", "sgd", 1.0, 0.5, 1.5), Case("base", "torch", "sgd", 1.0, -0.5, 0.5)),
        widths=(16, 32),
        seeds=1,
        steps=30,
    ),
    "cpu": Preset(),
    "gpu": Preset(widths=(64, 128, 256, 512, 1024, 2048), seeds=4, steps=500),
    "paper": Preset(widths=(64, 128, 256, 512, 1024, 2048), seeds=2, steps=3000),
}


def measure(preset: Preset, place: Place) -> Found:
    """One row for each case."""
    rows = measure_rows(preset, place)
    claims = [
        Claim(
            f"largest over smallest best rate, {name(row)}, {row['optimizer']}, γ = {row['gamma']:g}", row["predicted"],
            row["measured"], None, row["holds"], why_not(row),
        )
        for row in rows
    ]  # fmt: skip
    form = [row["measured"] for row in rows if row["form"] == "mean field"]
    meaning = (
        f"From width {min(preset.widths)} to {max(preset.widths)} one learning rate serves: in mean-field form the "
        f"best one moves by {max(form):.1f} × at most."
    )
    return Found(claims, meaning, picture(rows), {"rows": rows})


def why_not(row: dict[str, Any]) -> str:
    """Of a case that misses its bar."""
    if row["holds"]:
        return ""
    if row["form"] == "plain":
        return "torch's own small readout keeps SGD's best rate in place too"
    return "base= keeps the start that it is given; with N(0, 1/fan_in) the plain form's rate moves as much"


def measure_rows(preset: Preset, place: Place) -> list[dict[str, Any]]:
    """Best rates over widths and their spread, one row for each case."""
    # The longest runs first, so that no core waits for them.
    nets = [(case, width) for width in sorted(preset.widths, reverse=True) for case in preset.cases]
    scores: dict[Cell, float] = {}
    grids = {net: even(net[0].low, net[0].high, round((net[0].high - net[0].low) / STEP) + 1) for net in nets}
    train(preset, place, [(*net, rate) for net in nets for rate in grids[net]], scores)
    # Once more around each lowest score, at half the distance.
    for net, grid in grids.items():
        best = min(grid, key=lambda rate: scores[(*net, rate)])
        grids[net] = sorted({*grid, best - STEP / 2, best + STEP / 2})
    train(preset, place, [(*net, rate) for net in nets for rate in grids[net] if (*net, rate) not in scores], scores)
    rows = []
    for case in preset.cases:
        best_rates = []
        for width in preset.widths:
            grid = grids[case, width]
            best_rates.append(best_rate(grid, [scores[case, width, rate] for rate in grid]))
        spread = 10 ** (max(best_rates) - min(best_rates))
        transfers = case.form != "plain"
        rows.append(
            {
                "form": case.form,
                "start": case.start,
                "optimizer": case.optimizer,
                "gamma": case.gamma,
                "widths": list(preset.widths),
                "log10_best": [round(rate, 3) for rate in best_rates],
                "predicted": f"{'≤' if transfers else '>'} {SPREAD:g}",
                "measured": round(spread, 3),
                "holds": (spread <= SPREAD) == transfers,
            }
        )
    return rows


def train(preset: Preset, place: Place, cells: list[Cell], scores: dict[Cell, float]) -> None:
    """Train each cell on all seeds and add its mean score to ``scores``."""

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
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, optimizer in zip(panels, ("sgd", "adam"), strict=True):
        for row in (row for row in rows if row["optimizer"] == optimizer):
            label = f"{name(row)}, γ = {row['gamma']:g}: × {row['measured']:.2f}"
            relative = [10 ** (rate - row["log10_best"][0]) for rate in row["log10_best"]]
            axes.plot(row["widths"], relative, "--" if row["form"] == "plain" else "-", marker="o", label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(rows[0]["widths"], [str(width) for width in rows[0]["widths"]])
        axes.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.set_xlabel("width N")
        axes.set_title(optimizer, fontsize=10)
        axes.grid(alpha=0.25)
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("best rate / best rate at the smallest width")
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("width_transfer", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
