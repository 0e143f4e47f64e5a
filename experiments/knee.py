"""The knee: where the stable edge of a network in standard form bends from γ² to γ^(2/L), against gammaopt.knee.

    python experiments/knee.py --preset cpu

3-layer ReLU MLP and CNN with weights N(0, 1/fan_in), no re-initialisation (as_is), SGD, MSE, one pass. At each γ the
largest rate that trains is found by bisection, under a law that is told nothing of the knee. The bend is where the
two-segment line with slopes 2 and 2/L, fitted to log edge against log γ, changes its slope. Predicted: gammaopt.knee,
within half a decade, which its interval need not be. Writes results/knee/PRESET.json and .png and prints predicted |
measured | interval | holds; the interval is Student's, from the standard error of the jackknife over γ.
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
from _experiment import Claim, Found, Place, run
from _intervals import jackknife_half
from _sweep import EdgeJob, even, neighbour_slopes, stable_edges
from matplotlib.figure import Figure
from torch import nn

import gammaopt
from gammaopt.online import Recipe, Staircase, Stream, build_model

DEPTH = 3
TOLERANCE = 0.5  # decades
LAW = gammaopt.EtaLaw(DEPTH)
CNN_TASK = "digits, CNN"
IMAGES = "images", "images, CNN"  # of a data set
CNNS = CNN_TASK, IMAGES[1]
BATCH_SIZE = 32


@dataclass(frozen=True)
class Preset:
    """How much to run; edges are looked for between two decades of c = η/s(γ), s bent at 1."""

    cases: tuple[tuple[str, int], ...] = (
        ("digits", 64),
        ("digits", 256),
        ("staircase", 64),
        ("staircase", 256),
        (CNN_TASK, 32),
    )
    gammas: tuple[float, ...] = tuple(10**x for x in even(-1, 3, 9))
    rates: tuple[float, float] = (-3.0, 1.6)
    seeds: int = 1
    steps: int = 300


PRESETS = {
    "smoke": Preset(cases=(("digits", 32),), gammas=(1.0, 10.0, 100.0), rates=(-1.5, 1.2), steps=100),
    "cpu": Preset(),
    "gpu": Preset(
        cases=(
            *((task, width) for task in ("digits", "staircase") for width in (64, 256, 1024)),
            *((CNN_TASK, width) for width in (32, 128)),
        ),
        seeds=4,
        steps=1000,
    ),
    "paper": Preset(
        cases=(*((IMAGES[0], width) for width in (64, 256, 1024)), *((IMAGES[1], width) for width in (32, 128))),
        seeds=2,
        steps=3000,
    ),
}


def stream_of(task: str, place: Place) -> Stream:
    """What a task trains on: the place's images, or a staircase."""
    return Staircase(32, 4) if task == "staircase" else place.stream


def standard(task: str, stream: Stream, width: int) -> nn.Module:
    """The standard form: weights N(0, 1/fan_in), no biases."""
    model = "cnn" if task in CNNS else "mlp"
    net: nn.Module = build_model(model, stream.shape, stream.classes or 1, width=width, depth=DEPTH)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.0, parameter[0].numel() ** -0.5)
    return net


def measure(preset: Preset, place: Place) -> Found:
    """One row for each task and width."""
    rows = measure_rows(preset, place)
    claims = [claim(row) for row in rows]
    return Found(claims, meaning(rows, claims), picture(rows), {"rows": rows})


def claim(row: dict[str, Any]) -> Claim:
    """Measured bend over predicted knee."""
    over = row["measured"] / row["predicted"]
    holds = abs(math.log10(over)) <= TOLERANCE
    what = f"bend over knee, {row['task']}, width {row['width']} (knee {row['predicted']:.1f})"
    within = f"{10**-TOLERANCE:.2f} … {10**TOLERANCE:.2f}"
    interval = row["low"] / row["predicted"], row["high"] / row["predicted"]
    slopes = ", ".join(f"{one:.2f}" for one in neighbour_slopes(row["gammas"], row["log10_edge"]))
    why = f"local slopes {slopes}, where {LAW.lazy:g} below the bend and {LAW.rich:.2f} above it are predicted"
    made = Claim(what, within, over, interval, holds, why, centre=1.0)
    return replace(made, why="") if holds and made.off is None else made


def meaning(rows: Sequence[dict[str, Any]], claims: Sequence[Claim]) -> str:
    """One sentence on how many bends are where the knee is, and how far off they are."""
    bends, knees = [row["measured"] for row in rows], [row["predicted"] for row in rows]
    held = sum(claim.holds for claim in claims)
    off = max(abs(math.log10(bend / knee)) for bend, knee in zip(bends, knees, strict=True))
    return (
        f"Outside mean-field form lazy turns rich at γ ≈ {min(bends):.1f} to {max(bends):.1f} where gammaopt.knee "
        f"predicts {min(knees):.1f} to {max(knees):.1f} from one batch: {held} of {len(claims)} bends lie within half "
        f"a decade of it, the furthest off by a factor of {10**off:.1f}."
    )


def measure_rows(preset: Preset, place: Place) -> list[dict[str, Any]]:
    """Stable edges over γ, their bend and the predicted knee."""

    def name(case: tuple[str, int], gamma: float, seed: int) -> str:
        return f"{case[0]} {case[1]} {gamma:g} {seed}"

    jobs = {
        name(case, gamma, seed): EdgeJob(recipe(preset, place, *case), gamma, seed, *preset.rates)
        for case in preset.cases
        for gamma in preset.gammas
        for seed in range(preset.seeds)
    }
    of = stable_edges(jobs, place.file("edges.jsonl", preset), place.cores)
    rows = []
    for case in preset.cases:
        edges = [fmean(of[name(case, gamma, s)] for s in range(preset.seeds)) for gamma in preset.gammas]
        predicted = predict(preset, place, *case)
        logs = [math.log10(gamma) for gamma in preset.gammas]
        level, bent = bend(logs, edges)
        without = [bend(logs[:i] + logs[i + 1 :], edges[:i] + edges[i + 1 :])[1] for i in range(len(logs))]
        half = jackknife_half(without)
        rows.append(
            {
                "task": case[0],
                "width": case[1],
                "gammas": [round(gamma, 4) for gamma in preset.gammas],
                "log10_edge": [round(edge, 3) for edge in edges],
                "log10_edge_at_bend": round(level, 3),
                "predicted": round(predicted, 3),
                "measured": round(10**bent, 3),
                "low": round(10 ** (bent - half), 3),
                "high": round(10 ** (bent + half), 3),
            }
        )
    return rows


def recipe(preset: Preset, place: Place, task: str, width: int) -> Recipe:
    stream = stream_of(task, place)
    build = partial(standard, task, stream, width)
    return Recipe(
        build,
        stream,
        "mse",
        "sgd",
        place.steps(preset.steps, BATCH_SIZE),
        BATCH_SIZE,
        parametrization="as_is",
        depth=float(DEPTH),
        knee=1.0,
        device=place.device,
    )


def predict(preset: Preset, place: Place, task: str, width: int) -> float:
    """Geometric mean of gammaopt.knee over the runs' networks, on 256 samples."""
    logs, stream = [], stream_of(task, place)
    for seed in range(preset.seeds):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            net = recipe(preset, place, task, width).build()
        logs.append(math.log(gammaopt.knee(net, stream.batches(seed, 0, 1, 256)[0][0])))
    return math.exp(sum(logs) / len(logs))


def bend(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Height and place of the corner of the least-squares line with slopes ``LAW.lazy`` and ``LAW.rich``."""
    points, values = np.asarray(x), np.asarray(y)
    fits = []
    for corner in np.linspace(points[0], points[-1], 1001):
        line = np.where(points < corner, LAW.lazy, LAW.rich) * (points - corner)
        level = float((values - line).mean())
        fits.append((float(((values - line - level) ** 2).sum()), level, float(corner)))
    return min(fits)[1:]


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Stable edge against γ with the fitted line; the predicted knee is dashed."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4.8 * len(tasks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, task in zip(panels, tasks, strict=True):
        for row in (row for row in rows if row["task"] == task):
            label = f"N = {row['width']}: bend {row['measured']:.1f}, knee {row['predicted']:.1f} predicted"
            (points,) = axes.plot(row["gammas"], [10**edge for edge in row["log10_edge"]], "o", label=label)
            ends = (row["gammas"][0], row["measured"], row["gammas"][-1])
            corner = 10 ** row["log10_edge_at_bend"]
            heights = [
                corner * (gamma / row["measured"]) ** (LAW.lazy if gamma < row["measured"] else LAW.rich)
                for gamma in ends
            ]
            axes.plot(ends, heights, color=points.get_color(), linewidth=1)
            axes.axvline(row["predicted"], color=points.get_color(), linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("feature-learning strength γ")
        axes.set_title(task, fontsize=10)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    panels[0].set_ylabel("largest rate that trains")
    return figure


def main(argv: Sequence[str] | None = None) -> Path:
    return run("knee", __doc__, PRESETS, measure, argv)


if __name__ == "__main__":
    main()
